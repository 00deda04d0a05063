package registration

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/policy"
)

// How a change of policy is spread. What may have lost its grant is asked for within moments, most of it to be refused;
// what has its identity still, for another time or with other DNS names, is in no hurry.
const (
	reviewWithin  = 2 * time.Second
	reviewsPerSec = 2000
	alteredWithin = 10 * time.Minute
	// maxReviews bounds the orders of one agent; it renews all that it holds instead of more.
	maxReviews = 500
)

// Reviewed is what a review found.
type Reviewed struct {
	// Doubted are the identities, counted for each agent, that policy may grant no longer; Altered those that it certainly
	// grants still, and otherwise than before. What seems to be replaced is in neither.
	Doubted, Altered int
	// Within is when all of Doubted have been asked for again, if their agents are connected.
	Within time.Duration
}

// Review holds what lives against the policy in force. Every SVID whose grant rests on rules that are no longer the ones
// that decide about it is to be renewed by its agent; whether it can be, the CA then decides as ever. since is when the
// policy came into force. SVIDs that workloads got themselves (direct) have nobody to tell.
func (a *Authority) Review(ctx context.Context, since time.Time, scan LedgerScan) (Reviewed, error) {
	// 1. What was decided under the policy before is in the ledger now.
	a.Orders.settle()
	now := time.Now()
	r := review{policy: a.Policy.Value(), since: since.Truncate(time.Second), now: now, current: map[holder]bool{}, found: map[holder]finding{}}
	// 2. Who holds what rests on other rules.
	err := scan(ctx, now, func(e ca.LedgerEntry) (bool, error) { return true, r.look(e) })
	if err != nil {
		return Reviewed{}, fmt.Errorf("what lives under the policy before: %w", err)
	}
	// 3. Tell their agents.
	sum := r.sum()
	a.Orders.review(r.orders(sum), now)
	return sum, nil
}

// holder is who has an SVID, as far as the ledger tells them apart.
type holder struct{ agent, podUID, id string }

type finding struct {
	doubted bool
	// behind: a newer SVID of the holder stands, so this one has been replaced, unless it is of another volume of the pod, which
	// renews in its own time. issued is then the moment of its issue.
	behind           bool
	issued, notAfter time.Time
}

type review struct {
	policy     *policy.Policy
	since, now time.Time
	// current holds newer SVIDs that stand; found what does not.
	current map[holder]bool
	found   map[holder]finding
}

func (r *review) look(e ca.LedgerEntry) error {
	if e.Profile != ca.ProfileWorkload {
		return nil
	}
	var v LedgerEvidence
	if err := json.Unmarshal(e.Evidence, &v); err != nil {
		return fmt.Errorf("the ledger's entry %d: %w", e.Index, err)
	}
	h := holder{v.Agent, v.PodUID, e.ID}
	if v.Agent == "" {
		return nil
	}
	in := policy.Input{Cluster: v.Cluster, Namespace: v.Namespace, ServiceAccount: v.ServiceAccount}
	basis := policy.ParseBasis(v.Basis)
	if r.policy.Stands(in, basis) {
		// Of what came since the policy did, one socket of a pod may have it and another not yet.
		r.current[h] = r.current[h] || e.IssuedAt.Before(r.since)
		return nil
	}
	d, certain, err := r.policy.Foresee(in)
	same := certain && err == nil && d.ID.String() == e.ID && (v.Way != wayNodeVouched || d.NodeVouched)
	if basis == 0 && (same || !certain) {
		return nil // of an earlier version, which did not tell
	}
	f, known := r.found[h]
	if !known {
		f = finding{behind: r.current[h], issued: e.IssuedAt}
	}
	r.found[h] = finding{doubted: f.doubted || !same, behind: f.behind, issued: f.issued, notAfter: later(f.notAfter, e.NotAfter)}
	return nil
}

func (r *review) sum() (s Reviewed) {
	for _, f := range r.found {
		switch {
		case f.behind:
		case f.doubted:
			s.Doubted++
		default:
			s.Altered++
		}
	}
	if s.Doubted > 0 {
		s.Within = max(reviewWithin, time.Duration(s.Doubted)*time.Second/reviewsPerSec)
	}
	return s
}

// orders are what each agent is told.
func (r *review) orders(s Reviewed) map[string][]ca.RenewOrder {
	byAgent := map[string]map[string]ca.RenewOrder{}
	for h, f := range r.found {
		o := ca.RenewOrder{ID: h.id, IssuedBefore: r.now, Given: r.now, Spread: max(alteredWithin, s.Within), Until: f.notAfter}
		if held := r.now.Add(2 * ca.MaxTTL); held.Before(o.Until) { // issued by a clock far ahead, see covering
			o.Until = held
		}
		if f.doubted {
			o.Spread = max(s.Within, reviewWithin)
		}
		if f.behind { // where it has been replaced, this concerns nobody
			o.IssuedBefore = f.issued.Truncate(time.Second).Add(time.Second) // agents know it to the second
		}
		of := byAgent[h.agent]
		if of == nil {
			of = map[string]ca.RenewOrder{}
			byAgent[h.agent] = of
		}
		if before, ok := of[h.id]; ok {
			o.Spread, o.Until, o.IssuedBefore = min(o.Spread, before.Spread), later(o.Until, before.Until), later(o.IssuedBefore, before.IssuedBefore)
		}
		of[h.id] = o
	}
	all := make(map[string][]ca.RenewOrder, len(byAgent))
	for agent, of := range byAgent {
		orders := slices.SortedFunc(maps.Values(of), func(x, y ca.RenewOrder) int { return cmp.Compare(x.ID, y.ID) })
		if len(orders) > maxReviews {
			whole := ca.RenewOrder{Spread: orders[0].Spread, Given: r.now}
			for _, o := range orders {
				whole.Spread, whole.Until, whole.IssuedBefore = min(whole.Spread, o.Spread), later(whole.Until, o.Until), later(whole.IssuedBefore, o.IssuedBefore)
			}
			orders = []ca.RenewOrder{whole}
		}
		all[agent] = orders
	}
	return all
}
