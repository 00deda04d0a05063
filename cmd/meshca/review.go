package main

import (
	"context"
	"time"

	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca/policy"
	"github.com/meshca/meshca/ca/registration"
)

// reviewRetry is when a review that failed is tried again.
const reviewRetry = 5 * time.Second

// review holds what lives against the policy, at the start and whenever the policy has changed. Its next turn waits until
// agents have done what it ordered: a file that is written every second makes no storm.
func (d *daemon) review(ctx context.Context) {
	since := d.started
	for ctx.Err() == nil {
		_, stale := d.policy.current.Get()
		found, err := d.registration.Review(ctx, since, d.store.ScanLiving)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			d.log.Error("what was issued could not be held against the policy; it is tried again", "err", err)
			pause(ctx, reviewRetry)
			continue
		case found.Doubted+found.Altered > 0:
			d.log.Info("the policy changed for identities that live: their agents ask for them again", "doubted", found.Doubted,
				"altered", found.Altered, "within", found.Within)
		}
		pause(ctx, found.Within)
		select {
		case <-stale:
			since = time.Now()
		case <-ctx.Done():
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// want has each cluster gather what conditions of these policies ask about.
func (d *daemon) want(policies ...*policy.Policy) {
	for name, cluster := range d.clusters {
		var all attestor.Wants
		for _, p := range policies {
			w := registration.Wants(p, name)
			all.PodLabels = all.PodLabels || w.PodLabels
			all.PodAnnotations = all.PodAnnotations || w.PodAnnotations
			all.NamespaceLabels = all.NamespaceLabels || w.NamespaceLabels
		}
		cluster.Want(all)
	}
}
