package registration

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
)

const (
	// lookEvery is how often all that lives is held against what the clusters know. Ten thousand holders take a few
	// milliseconds of it; where a look takes long, it is followed by a pause of lookShare times as much, up to lookSlowest.
	lookEvery   = time.Second
	lookSlowest = 2 * time.Second
	lookShare   = 20
	// forgetEvery is how often it is looked what agents need not be told any more.
	forgetEvery = time.Minute
	recallRetry = 5 * time.Second
)

// WatchCauses ends what was issued through agents with its cause, until ctx ends: when a cluster says that the pod, its
// service account, its namespace or its node is no more, the agents that hold it are told. What the ledger says of the time before
// is known to the first look, and so is what ended while the CA was away.
func (a *Authority) WatchCauses(ctx context.Context, scan LedgerScan, log *slog.Logger) {
	known := a.recall(ctx, scan, log) // before the first look, so that what has several SVIDs ends as one
	var parts sync.WaitGroup
	defer parts.Wait()
	for name, member := range a.Clusters {
		parts.Go(func() {
			for ctx.Err() == nil {
				began := time.Now()
				a.look(ctx, name, member)
				a.bury(ctx, name, member)
				wait(ctx, min(max(lookEvery, lookShare*time.Since(began)), lookSlowest))
			}
		})
	}
	for !known && ctx.Err() == nil {
		wait(ctx, recallRetry)
		known = a.recall(ctx, scan, log)
	}
	for ctx.Err() == nil {
		wait(ctx, forgetEvery)
		a.Endings.forget(time.Now())
	}
}

func (a *Authority) recall(ctx context.Context, scan LedgerScan, log *slog.Logger) bool {
	err := a.Endings.Recall(ctx, scan)
	if err != nil && ctx.Err() == nil {
		log.Error("what lives could not be read from the ledger; until it can, what ends is told of new SVIDs alone", "err", err)
	}
	return err == nil
}

// look ends what has lost its cause in one cluster.
func (a *Authority) look(ctx context.Context, cluster string, member Member) {
	holders, evidence := a.Endings.of(cluster, time.Now())
	if len(holders) == 0 {
		return
	}
	gone := member.Cluster.Ended(ctx, evidence)
	if len(gone) == 0 {
		return
	}
	why := make(map[holding]*refusal.Error, len(gone))
	for i, refused := range gone {
		why[holders[i]] = refused
	}
	for _, x := range a.Endings.end(time.Now(), why) {
		a.Journal.ended(&x)
	}
}

// ended records what ended with its cause: a line in the audit log, a place in the ring, a count.
func (j *Journal) ended(x *ended) {
	d := &Decision{
		Time: time.Now(), Event: EventEnd, Cluster: x.cluster, Evidence: x.evidence,
		Outcome: string(x.why.Reason), Message: x.why.Detail, Claim: x.why.Claim, Serial: x.serials[0], NotAfter: x.until,
	}
	// Both were an SVID's of ours.
	d.ID, _ = spiffeid.FromString(x.id)
	d.Caller.ID, _ = spiffeid.FromString(x.agent)
	j.metrics.end(x.why.Reason)
	j.ring.add(d)
	j.line(d)
}

func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
