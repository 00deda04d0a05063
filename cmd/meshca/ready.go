package main

import (
	"context"
	"fmt"
	"time"
)

// notReady says why the CA cannot sign now, a sentence each.
func (d *daemon) notReady() []string {
	var why []string
	if err := d.issuer.Ready(); err != nil {
		why = append(why, err.Error())
	}
	if err := d.serving.Ready(); err != nil {
		why = append(why, err.Error())
	}
	for _, err := range []error{d.continuity.Ready(), d.metrics.ledger.Err(), d.ledger.Ready(), d.journal.Ready()} {
		if err != nil {
			why = append(why, err.Error())
		}
	}
	// One cluster that is away must not take the others' CA out of its Service; all of them away means nobody is served.
	var faults []string
	for _, name := range sortedNames(d.clusters) {
		if err := d.clusters[name].Ready(); err != nil {
			faults = append(faults, fmt.Sprintf("cluster %s: %v", name, err))
		}
	}
	if len(faults) == len(d.clusters) {
		why = append(why, faults...)
	}
	return why
}

// followReadiness carries readiness over to gRPC's health service, and into the log when it changes.
func (d *daemon) followReadiness(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	ready, told := false, false
	for {
		why := d.notReady()
		if bad := d.degraded(); (len(bad) > 0) != told {
			if told = len(bad) > 0; told {
				d.log.Warn("degraded: the CA can sign, but something it needs does not answer", "why", bad)
			} else {
				d.log.Info("no longer degraded")
			}
		}
		if now := len(why) == 0; now != ready {
			ready = now
			d.door.SetServing(ready)
			if ready {
				d.log.Info("ready: the CA can sign")
			} else {
				d.log.Warn("not ready", "why", why)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
