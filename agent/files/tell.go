package files

import (
	"context"
	"errors"
	"time"
)

// tell tells of the files, one at a time: what changes meanwhile is told after.
func (k *keeper) tell(ctx context.Context) {
	if k.told || k.held == "" || k.telling != nil || later(k.tells.at, k.settled).After(time.Now()) {
		return
	}
	done := make(chan error, 1)
	secrets := secretsOf(k.files)
	k.telling, k.about = done, k.held
	go func() { done <- k.hook.tell(ctx, secrets) }()
}

// toldIt takes the outcome.
func (k *keeper) toldIt(err error) {
	k.telling = nil
	if err == nil || errors.Is(err, errStarting) {
		k.settled = time.Now().Add(settle)
	}
	if k.about != k.held {
		return // there is more to tell already, and that is what counts
	}
	switch {
	case err == nil:
		k.told, k.tells, k.tellFault = true, retry{}, ""
		k.shown.AfterAt = time.Now()
		k.markTold()
		k.log.Info("told of the new files", "how", k.hook.String())
	case errors.Is(err, errStarting):
		k.absent, k.tellFault = 0, ""
	case errors.Is(err, errNobody):
		k.absent++
		k.tells.failed()
		k.tellFault = ""
	default:
		k.absent = 0
		k.tells.failed()
		if k.failed(&k.tellFault, err) {
			k.log.Error("nobody could be told of the new files; it is tried again", "error", err)
		}
		return
	}
	k.took()
}

// markTold lets the next run know. Where that fails the next run tells once more.
func (k *keeper) markTold() {
	d, err := openDirectory(k.config.Dir)
	if err == nil {
		err = d.mark(k.held)
		d.close()
	}
	if err != nil {
		k.log.Debug("that they were told is not kept", "error", err)
	}
}

// wasTold reports whether an earlier run told of what is there.
func (k *keeper) wasTold() bool {
	d, err := openDirectory(k.config.Dir)
	if err != nil {
		return false
	}
	defer d.close()
	return d.marked(k.held)
}
