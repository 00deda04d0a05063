package csi

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/api/refusal"
)

// again is how long a Writer that gave up is left alone.
const again = 5 * time.Second

// filing is a volume's files while they are kept. A nil filing keeps none.
type filing struct {
	cancel  context.CancelFunc
	done    chan struct{}
	written chan struct{} // closed when they were there for the first time

	mu   sync.Mutex
	once sync.Once
	why  error // of the last try
}

// file has the Writer keep the volume's files, where it wants some and nobody does yet.
func (d *Driver) file(v *volume, k *agent.Kept) {
	if v.files != nil || v.state == nil || len(v.state.Wish.Files) == 0 || d.config.Writer == nil {
		return
	}
	ctx, cancel := context.WithCancel(d.running)
	f := &filing{cancel: cancel, done: make(chan struct{}), written: make(chan struct{})}
	v.files = f
	dir, gid, options := v.inside(), v.state.GID, v.state.Wish.Files
	log := d.log.With("pod", v.state.Pod.String())
	go func() {
		defer close(f.done)
		for {
			err := d.config.Writer.Keep(ctx, k, dir, gid, options, f.report)
			if ctx.Err() != nil {
				return
			}
			log.Error("the files of a volume are not kept; it is tried again", "error", err)
			f.report(err)
			select {
			case <-time.After(again):
			case <-ctx.Done():
				return
			}
		}
	}()
}

// report notes what came of a try; nil: the files are there.
func (f *filing) report(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.why = err; err == nil {
		f.once.Do(func() { close(f.written) })
	}
}

// wait waits until the files are there for the first time.
func (f *filing) wait(ctx context.Context) error {
	if f == nil {
		return nil
	}
	select {
	case <-f.written:
		return nil
	case <-ctx.Done():
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	why := f.why
	if why == nil {
		why = refusal.New(refusal.SVIDPending, "its files are not written yet")
	} else {
		why = refusal.New(refusal.SVIDPending, "its files cannot be written yet: %w", why)
	}
	return errors.Join(why, ctx.Err())
}

// stop ends the keeping, and returns when nobody writes any more.
func (f *filing) stop() {
	if f == nil {
		return
	}
	f.cancel()
	<-f.done
}
