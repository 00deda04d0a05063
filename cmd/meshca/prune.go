package main

import (
	"context"
	"time"
)

// prune forgets, every hour, ledger entries whose certificates ended long ago, and agents that are gone as long.
func (d *daemon) prune(ctx context.Context) {
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	began := time.Now()
	var clock pruneClock
	for {
		now := time.Now()
		jump, trusted := clock.trusted(now.Round(0).Sub(began.Round(0)), now.Sub(began))
		switch {
		case trusted:
			d.pruneEndedBefore(ctx, now.Add(-d.config.Ledger.KeepAfterExpiry.Duration))
		case jump != 0:
			d.log.Warn("the clock jumped; nothing is pruned from the ledger for a day, so that it can be set right", "by", jump.Round(time.Second))
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
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

// pruneClock keeps a wrong clock from costing what it says has ended: after a jump nothing is pruned for a day.
type pruneClock struct {
	offset time.Duration // of the wall clock from the monotonic one, when it was last looked at
	until  time.Duration // on the monotonic clock; no pruning before
}

const (
	clockJump     = time.Hour
	jumpStandsFor = 24 * time.Hour
)

// trusted is told how far the wall clock and the monotonic clock went since the start. A jump is reported once.
func (c *pruneClock) trusted(wall, monotonic time.Duration) (jump time.Duration, ok bool) {
	if by := wall - monotonic - c.offset; by.Abs() > clockJump {
		c.offset += by
		c.until = monotonic + jumpStandsFor
		return by, false
	}
	return 0, monotonic >= c.until
}
