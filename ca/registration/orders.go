package registration

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// maxDenials and maxRenewOrders bound what is sent whole to every agent at each change.
const (
	maxDenials     = 10_000
	maxDenialBytes = 1 << 20 // of their IDs, together
	maxRenewOrders = 64
)

// OrderStore keeps what operators ordered, durably. All methods are safe for concurrent use.
type OrderStore interface {
	PutDenial(ctx context.Context, d ca.Denial) error
	// DeleteDenial reports whether there was one.
	DeleteDenial(ctx context.Context, id string) (bool, error)
	Denials(ctx context.Context) ([]ca.Denial, error)
	// SetRenewOrders stores these orders in place of all there are.
	SetRenewOrders(ctx context.Context, all []ca.RenewOrder) error
	RenewOrders(ctx context.Context) ([]ca.RenewOrder, error)
}

// Standing is what operators have ordered, as a whole; it is never changed once published.
type Standing struct {
	Denials map[string]ca.Denial
	Renew   []ca.RenewOrder
	// Reviews are renewals that a change of policy makes, by the agent that they are for, and Reviewed is when that was last
	// looked at. They are not stored: each start looks anew.
	Reviews  map[string][]ca.RenewOrder
	Reviewed time.Time
}

// RenewBy are the renewals that one agent has to make. One that covers what a clock far ahead has issued names all that is
// issued since, too, so that one goes when it is over.
func (s *Standing) RenewBy(agent spiffeid.ID) []ca.RenewOrder {
	now := time.Now()
	return slices.DeleteFunc(slices.Concat(s.Renew, s.Reviews[agent.String()]), func(r ca.RenewOrder) bool {
		return r.IssuedBefore.After(now) && !now.Before(r.Until)
	})
}

// DeniedIDs returns the denied SPIFFE IDs in order.
func (s *Standing) DeniedIDs() []string { return slices.Sorted(maps.Keys(s.Denials)) }

// Orders holds what operators ordered: identities that get nothing, SVIDs to be renewed now. Agents follow it by Get.
type Orders struct {
	store OrderStore
	scan  LedgerScan

	mu       sync.Mutex // serializes changes, so that what is published follows what is stored
	standing *rotation.Current[*Standing]
	// issuing is held for reading while something is issued; who denies waits for what began before.
	issuing sync.RWMutex
}

// LedgerScan calls fn for each entry of the ledger that ends after a moment, newest first, until it returns false or an error.
type LedgerScan func(ctx context.Context, at time.Time, fn func(ca.LedgerEntry) (bool, error)) error

// OpenOrders reads the store. The ledger is asked what an order to renew has to cover.
func OpenOrders(ctx context.Context, store OrderStore, ledger LedgerScan) (*Orders, error) {
	denials, err := store.Denials(ctx)
	if err != nil {
		return nil, err
	}
	renew, err := store.RenewOrders(ctx)
	if err != nil {
		return nil, err
	}
	s := &Standing{Denials: make(map[string]ca.Denial, len(denials))}
	for _, d := range denials {
		s.Denials[d.ID] = d
	}
	s.Renew = stillMatter(renew, time.Now())
	return &Orders{store: store, scan: ledger, standing: rotation.NewCurrent(s)}, nil
}

// Get returns what stands, and a channel that closes when it changes.
func (o *Orders) Get() (*Standing, <-chan struct{}) { return o.standing.Get() }

// Denial returns the denial of an identity, if there is one.
func (o *Orders) Denial(id spiffeid.ID) (ca.Denial, bool) {
	d, ok := o.standing.Value().Denials[id.String()]
	return d, ok
}

func (o *Orders) refuses(id spiffeid.ID) error {
	d, denied := o.Denial(id)
	if !denied {
		return nil
	}
	why := d.Why
	if why == "" {
		why = "no reason given"
	}
	return refusal.New(refusal.IdentityDenied, "%s was denied at %s by %s: %s", id, d.Since.UTC().Format(time.RFC3339), d.By, why)
}

// beginIssuing comes before policy and denials are asked, and endIssuing when the SVID is out or refused. Until then Deny
// does not return, so that what it finds in the ledger then is all that the identity ever got.
func (o *Orders) beginIssuing() { o.issuing.RLock() }

func (o *Orders) endIssuing() { o.issuing.RUnlock() }

// settle returns when all has ended that began before it was called.
func (o *Orders) settle() {
	o.issuing.Lock()
	o.issuing.Unlock() //nolint:staticcheck // a barrier, not a section
}

// Deny makes the identity get nothing new from when it returns, and agents drop what they hold of it. Denying again
// renews the reason and keeps the first moment.
func (o *Orders) Deny(ctx context.Context, d ca.Denial) (ca.Denial, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := o.standing.Value()
	if before, ok := now.Denials[d.ID]; ok {
		d.Since = before.Since
	} else if err := now.roomFor(d.ID); err != nil {
		return ca.Denial{}, err
	}
	if err := o.store.PutDenial(ctx, d); err != nil {
		return ca.Denial{}, refusal.New(refusal.StoreUnavailable, "the denial could not be stored: %w", err)
	}
	next := *now
	next.Denials = maps.Clone(now.Denials)
	next.Denials[d.ID] = d
	o.standing.Set(&next)
	o.settle() // what began before the denial was published
	return d, nil
}

func (s *Standing) roomFor(id string) error {
	size := len(id)
	for denied := range s.Denials {
		size += len(denied)
	}
	if len(s.Denials) >= maxDenials || size > maxDenialBytes {
		return fmt.Errorf("there are %d denials already; policy rules are the place for more", len(s.Denials))
	}
	return nil
}

// Allow lifts a denial; it reports whether there was one.
func (o *Orders) Allow(ctx context.Context, id string) (bool, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := o.standing.Value()
	was, err := o.store.DeleteDenial(ctx, id)
	if err != nil {
		return false, refusal.New(refusal.StoreUnavailable, "the denial could not be lifted: %w", err)
	}
	if _, stands := now.Denials[id]; stands {
		next := *now
		next.Denials = maps.Clone(now.Denials)
		delete(next.Denials, id)
		o.standing.Set(&next)
	}
	return was, nil
}

// Renew orders the renewal of what was issued before r.IssuedBefore, and of whatever the ledger knows that was issued later
// than now: by a clock that was set back since. It takes the place of earlier orders whose SVIDs it covers, but of one that
// has them renewed sooner: that goes on beside it, and agents keep to the earlier moment, also those that hear of it late.
func (o *Orders) Renew(ctx context.Context, r ca.RenewOrder) error {
	last, err := o.lastIssue(ctx)
	if err != nil {
		return refusal.New(refusal.StoreUnavailable, "the ledger could not be read for what has to be renewed: %w", err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	standing, now := o.standing.Value(), time.Now()
	if last.After(now) {
		r = covering(r, last.Add(time.Second)) // the ledger counts in seconds
	}
	all := stillMatter(standing.Renew, now)
	for _, x := range all {
		// Agents know an order by its moment, and follow each once. One that covers a clock far ahead does so for itself.
		if ahead := x.IssuedBefore.Sub(r.IssuedBefore); covers(r, x) && ahead >= 0 && ahead <= ca.MaxTTL {
			r = covering(r, x.IssuedBefore.Add(time.Nanosecond))
		}
	}
	kept := needed(append(all, r), now)
	if len(kept) > maxRenewOrders {
		if r.ID != "" {
			return fmt.Errorf("there are %d renewal orders already; order the renewal of all instead", maxRenewOrders)
		}
		kept = joined(kept, now)
	}
	// gofail: var renewalOrdered struct{}
	if err := o.store.SetRenewOrders(ctx, kept); err != nil {
		return refusal.New(refusal.StoreUnavailable, "the order could not be stored: %w", err)
	}
	// gofail: var renewalStored struct{}
	next := *standing
	next.Renew = kept
	o.standing.Set(&next)
	// gofail: var renewalPublished struct{}
	return nil
}

// lastIssue is the latest moment of issue of what lives. What a clock far ahead has issued lives for long by its own word,
// and agents hold it no longer than any other. So it does not count below an entry that is older than anything they hold.
func (o *Orders) lastIssue(ctx context.Context) (last time.Time, err error) {
	now := time.Now()
	longAgo, farAhead, old := now.Add(-ca.MaxTTL), now.Add(ca.MaxTTL), false
	err = o.scan(ctx, longAgo, func(e ca.LedgerEntry) (bool, error) { // those that ended lately show what is older
		old = old || e.IssuedAt.Before(longAgo)
		if e.NotAfter.After(now) && !(old && e.IssuedAt.After(farAhead)) {
			last = later(last, e.IssuedAt)
		}
		return true, nil
	})
	return last, err
}

// covering is the order for what was issued before a later moment, and is remembered for as much longer, at most for a
// life: where a clock was far ahead, all that is issued meanwhile is named, too.
func covering(r ca.RenewOrder, before time.Time) ca.RenewOrder {
	if r.Given.IsZero() {
		r.Given = r.IssuedBefore
	}
	r.IssuedBefore, r.Until = before, r.Until.Add(min(before.Sub(r.IssuedBefore), ca.MaxTTL))
	return r
}

// rest is what is left of the time over which an order is spread.
func rest(x ca.RenewOrder, now time.Time) time.Duration { return max(0, x.Spread-x.Elapsed(now)) }

// covers reports whether a later order names all that x names.
func covers(later, x ca.RenewOrder) bool { return later.ID == x.ID || later.ID == "" }

// needed are those of the orders, in the order in which they were given, that have something renewed sooner than each later
// one that covers them. One whose spread is over stays for who was away: it has that renewed at once.
func needed(orders []ca.RenewOrder, now time.Time) (kept []ca.RenewOrder) {
	for i, x := range orders {
		left := rest(x, now)
		if !slices.ContainsFunc(orders[i+1:], func(later ca.RenewOrder) bool { return covers(later, x) && rest(later, now) <= left }) {
			kept = append(kept, x)
		}
	}
	return kept
}

// joined puts one order for all, the last one, in the place of the others, as soon as the soonest of those that are under
// way. What is over stays where it was for all.
func joined(orders []ca.RenewOrder, now time.Time) (kept []ca.RenewOrder) {
	n := len(orders) - 1
	last := orders[n]
	for _, x := range orders[:n] {
		if left := rest(x, now); left > 0 {
			last.Spread = min(last.Spread, left)
		} else if x.ID == "" {
			kept = append(kept, x)
		}
	}
	return append(kept, last)
}

// review replaces what the review before ordered: it looked at the same, and more.
func (o *Orders) review(reviews map[string][]ca.RenewOrder, at time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	next := *o.standing.Value()
	next.Reviews, next.Reviewed = reviews, at
	o.standing.Set(&next)
}

// RenewAll orders the renewal of all that has been issued, spread over a while, unless the order with this very mark stands:
// another one may have been given before the last that this one is for. Without a mark it orders always.
func (o *Orders) RenewAll(ctx context.Context, mark string, spread time.Duration) error {
	for _, r := range o.standing.Value().Renew {
		if mark != "" && r.For == mark {
			return nil
		}
	}
	now := time.Now()
	return o.Renew(ctx, ca.RenewOrder{IssuedBefore: now, Spread: spread, Until: now.Add(ca.MaxTTL), For: mark})
}

func stillMatter(orders []ca.RenewOrder, now time.Time) []ca.RenewOrder {
	return slices.DeleteFunc(slices.Clone(orders), func(r ca.RenewOrder) bool { return !now.Before(r.Until) })
}
