package main

import (
	"context"
	"time"
)

// clockJump is how far ahead the wall clock must be of what is believed of it before that is told.
const clockJump = time.Hour

// prune forgets, every hour, ledger entries whose certificates ended long ago, and agents that are gone as long. A clock
// that was set forward costs nothing of what it says has ended before a day is over.
func (d *daemon) prune(ctx context.Context) {
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	for {
		// First: it finds what a clock far ahead has signed, which pruning leaves where it is and goes on behind.
		if err := d.store.NoteEnded(ctx, d.clock.Now()); err != nil && ctx.Err() == nil {
			d.log.Error("how much of the ledger has ended could not be noted: who looks for what lives reads more of it", "err", err)
		}
		d.pruneEndedBefore(ctx, d.clock.Now().Add(-d.config.Ledger.KeepAfterExpiry.Duration))
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// watchClock tells of a wall clock that was set forward, when it is and when that is over.
func (d *daemon) watchClock(told *bool) {
	switch ahead := d.clock.Ahead(); {
	case ahead > clockJump && !*told:
		d.log.Warn("the clock was set forward: what it says has ended since is neither pruned from the ledger nor taken as ended by a rollout for a day, so that it can be set right",
			"by", ahead.Round(time.Second))
		*told = true
	case ahead <= clockJump:
		*told = false
	}
}

func (d *daemon) pruneEndedBefore(ctx context.Context, before time.Time) {
	if n, err := d.store.PruneLedger(ctx, before); err != nil && ctx.Err() == nil {
		d.log.Error("the ledger could not be pruned", "err", err)
	} else if n > 0 {
		d.log.Info("old ledger entries were forgotten", "entries", n, "ended_before", before.UTC())
	}
	if err := d.agents.Forget(ctx, before); err != nil && ctx.Err() == nil {
		d.log.Error("agents that are gone could not be forgotten", "err", err)
	}
}
