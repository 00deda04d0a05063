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

	mu  sync.Mutex
	why error // of the last try
}

// file has the Writer keep the volume's files, where it wants some and nobody does yet.
func (d *Driver) file(v *volume, k *agent.Kept) {
	if v.files != nil || v.state == nil || len(v.state.Wish.Files) == 0 || d.config.Writer == nil {
		return
	}
	ctx, cancel := context.WithCancel(d.running)
	f := &filing{cancel: cancel, done: make(chan struct{}), written: make(chan struct{})}
	v.files = f
	where := Files{Dir: v.inside(), GID: v.state.GID, Options: v.state.Wish.Files}
	written := sync.OnceFunc(func() { close(f.written) })
	log := d.log.With("pod", v.state.Pod.String())
	go func() {
		defer close(f.done)
		for {
			err := d.config.Writer.Keep(ctx, k, where, written)
			if ctx.Err() != nil {
				return
			}
			log.Error("the files of a volume are not kept; it is tried again", "error", err)
			f.failed(err)
			select {
			case <-time.After(again):
			case <-ctx.Done():
				return
			}
		}
	}()
}

func (f *filing) failed(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.why = err
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
