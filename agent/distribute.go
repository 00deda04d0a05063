package agent

import (
	"context"
	"time"
)

// distribute follows the bundle: it goes to every socket, and new calls go over a connection that was verified by it.
func (a *Agent) distribute(ctx context.Context) {
	for first := true; ; first = false {
		bundle, stale := a.trust.current.Get()
		for _, w := range a.roster.list() {
			w.refresh()
		}
		if !first {
			if err := a.client.Redial(); err != nil {
				a.log.Error("the connection to the CA stays the old one", "error", err)
			}
		}
		for !a.trust.ensureKept() && !fresher(stale) && ctx.Err() == nil {
			sleep(ctx, 10*time.Second)
		}
		if sequence, ok := bundle.SequenceNumber(); ok && !fresher(stale) {
			a.distributed.Set(sequence)
		}
		select {
		case <-stale:
		case <-ctx.Done():
			return
		}
	}
}

// fresher reports whether a value's channel says that there is another.
func fresher(stale <-chan struct{}) bool {
	select {
	case <-stale:
		return true
	default:
		return false
	}
}

// taken waits until every open stream and every reader has a bundle newer than after, and returns its sequence. Where
// they make it wait for longer than patience, it returns after, and who they are. While streams of before a restart, or
// that the agent ended, have not come back, their peers are known to have what was acknowledged then, and nothing newer.
func (a *Agent) taken(ctx context.Context, after uint64, patience time.Duration) (sequence uint64, waitsFor []string, err error) {
	late := time.NewTimer(patience)
	defer late.Stop()
	for {
		newest, stale := a.distributed.Get()
		sequence := newest
		away, back := a.proxies.awaits()
		if away > 0 {
			sequence = min(sequence, a.trust.confirmed())
		}
		var changed, took <-chan struct{}
		var over <-chan time.Time
		if newest > after {
			over = late.C
		}
		if sequence > after {
			streams, readers := 0, 0
			streams, changed = a.sds.Acknowledged(sequence)
			readers, took = a.readers.lacking(sequence)
			if streams+readers == 0 && !fresher(back) { // a stream that was ended meanwhile is awaited, and open no more
				a.trust.confirm(sequence)
				return sequence, nil, nil
			}
		}
		select {
		case <-changed:
		case <-took:
		case <-stale:
		case <-back:
		case <-over:
			return after, a.lacking(newest), nil
		case <-ctx.Done():
			return 0, nil, ctx.Err()
		}
	}
}
