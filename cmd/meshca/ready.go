package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// notReady says why the CA cannot sign now, a sentence each.
func (d *daemon) notReady() []string {
	var why []string
	signs := d.authority.Assignment().Root.ID
	if c, err := d.returned(); err != nil && ca.RootID(c) != signs {
		why = append(why, d.takenOut(err))
	}
	if err := d.barred(signs); err != nil {
		why = append(why, d.signsNothing(err))
	} else if err := d.issuer.Ready(); err != nil {
		why = append(why, err.Error())
		if s := d.rolloutWaits(); s != "" {
			why = append(why, s)
		}
	}
	if err := d.serving.Ready(); err != nil {
		why = append(why, err.Error())
	}
	store := d.metrics.ledger.Err()
	if store == nil { // what fails between two issuances, nobody else has heard of
		store = d.store.Ready()
	}
	for _, err := range []error{d.continuity.Ready(), store, d.ledger.Ready(), d.journal.Ready()} {
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

// signsNothing says what leads out where the root that signs by the store must not.
func (d *daemon) signsNothing(barred error) string {
	s, _ := d.roller.Standing()
	text := fmt.Sprintf("the root that signs by the store was tainted: %v. %s", barred, leadsOut(s.Rollout))
	if waits := d.rolloutWaits(); waits != "" {
		text += ". Now " + waits
	}
	return text
}

// leadsOut says what brings in another root in the place of one that must not sign.
func leadsOut(r rotation.Rollout) string {
	heir, bringsIn := r.Heir()
	if !bringsIn && r.Active() && r.Stays().ID != r.Signer().ID { // an order about the one that signs would go on to this one
		return fmt.Sprintf("The rollout goes to the root %s, which was tainted too: `certctl ca taint root %[1]s --issuer REF` brings in another", heir.ID)
	}
	if !bringsIn {
		return "`certctl ca taint root --issuer REF` brings in another"
	}
	return fmt.Sprintf("The rollout brings in the root %s by itself, and waits for nobody to confirm that; if it cannot, "+
		"`certctl ca taint root %[1]s --issuer REF` brings in a third one", heir.ID)
}

// takenOut says what becomes of a root that is back by a backup, and what it takes.
func (d *daemon) takenOut(returned error) string {
	text := fmt.Sprintf("%v. Nobody is told of the trust bundle before it is out again, which the CA sees to by itself", returned)
	if s, _ := d.roller.Standing(); s.Err != nil {
		text += fmt.Sprintf("; the last try failed: %v", s.Err)
	}
	return text
}

// barred says why the root with this ID must not sign; nil when it may.
func (d *daemon) barred(id string) error {
	s, _ := d.roller.Standing()
	return s.Rollout.Barred(id)
}

// waitsTold bounds how many names of those that a rollout waits for are told.
const waitsTold = 5

// rolloutWaits says what keeps a root that is being rolled out from signing; empty: none is. Where the one before it cannot
// sign any more, the CA waits for that.
func (d *daemon) rolloutWaits() string {
	s, _ := d.roller.Standing()
	r := s.Rollout
	if !r.Active() || r.Signs(r.Stays().ID) {
		return ""
	}
	text := fmt.Sprintf("the root %.16s… is %s and signs for nobody yet", r.Stays().ID, r.Step)
	if n := len(s.Waits); n > 0 {
		text += fmt.Sprintf("; it waits for %s", strings.Join(s.Waits[:min(n, waitsTold)], ", "))
		if n > waitsTold {
			text += fmt.Sprintf(" and %d more", n-waitsTold)
		}
		if !s.Until.IsZero() {
			text += fmt.Sprintf(", until %s at the latest", s.Until.UTC().Format(time.RFC3339))
		}
		text += ": `certctl ca status` tells more, `certctl ca continue --despite NAME` gives one up"
	}
	if s.Err != nil {
		text += fmt.Sprintf("; its last try failed: %v", s.Err)
	}
	return text
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
