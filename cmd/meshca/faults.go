package main

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// tryAgain is how often a store or an audit log that failed is tried, until it works.
const tryAgain = 3 * time.Second

// fault is why the ledger's last commit failed. Nothing but a durable write ends it: an unready CA may get no request,
// and then no commit would show that the store has recovered, so probe tries one.
type fault struct {
	mu    sync.Mutex
	err   error // nil when the last commit succeeded, or a probe since
	count uint64
}

// committed is told how each commit ended.
func (f *fault) committed(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
	if err != nil {
		f.count++
	}
}

// Err says why nothing can be recorded; nil when it can, or nothing was recorded yet.
func (f *fault) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		return nil
	}
	return fmt.Errorf("the ledger's last commit failed: %w", f.err)
}

// probe tries a write while the fault lasts. A commit that failed meanwhile is a fault of its own.
func (f *fault) probe(ctx context.Context, write func(context.Context) error, log *slog.Logger) {
	f.mu.Lock()
	err, seen := f.err, f.count
	f.mu.Unlock()
	if err == nil || write(ctx) != nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil && f.count == seen {
		f.err = nil
		log.Info("the store can be written again")
	}
}

// mend tries what failed until it works again, and watches the clock.
func (d *daemon) mend(ctx context.Context) {
	tick := time.NewTicker(tryAgain)
	defer tick.Stop()
	jumped := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			d.watchClock(&jumped)
			d.metrics.ledger.probe(ctx, d.store.Probe, d.log)
			if d.store.Ready() != nil { // what fails between two issuances is no fault of a commit
				_ = d.store.Probe(ctx)
			}
			d.journal.Restore()
			lines, _ := d.authority.Lines()
			for _, l := range lines {
				l.Mend()
			}
		}
	}
}
