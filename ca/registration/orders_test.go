package registration_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

// An order with a mark is given once, also across a restart, and another one does not pass for it, whatever the clock said
// when that was given: one may have come before the last SVID that this one is for.
func TestAnOrderWithAMarkIsGivenOnce(t *testing.T) {
	const mark = "a step"
	now := time.Now()
	for name, c := range map[string]struct {
		stands ca.RenewOrder
		given  bool
	}{
		"nothing":                           {given: true},
		"its own":                           {ca.RenewOrder{IssuedBefore: now.Add(-time.Hour), For: mark}, false},
		"another step's":                    {ca.RenewOrder{IssuedBefore: now.Add(time.Second), For: "another step"}, true},
		"an operator's":                     {ca.RenewOrder{IssuedBefore: now.Add(-time.Second)}, true},
		"one from before a clock went back": {ca.RenewOrder{IssuedBefore: now.Add(time.Hour)}, true},
	} {
		t.Run(name, func(t *testing.T) {
			w := world.New(t, "")
			c.stands.Until = now.Add(2 * time.Hour)
			if !c.stands.IssuedBefore.IsZero() {
				if err := w.RA.Orders.Renew(t.Context(), c.stands); err != nil {
					t.Fatal(err)
				}
			}
			orders, stood := w.RA.Orders, 1
			for range 2 { // the second time by a process of its own
				if err := orders.RenewAll(t.Context(), mark, time.Minute); err != nil {
					t.Fatal(err)
				}
				standing, _ := orders.Get()
				got := standing.Renew[len(standing.Renew)-1]
				if got.For != mark || !c.given && len(standing.Renew) != stood {
					t.Fatalf("what stands is %+v", standing.Renew)
				}
				if got.IssuedBefore.After(c.stands.IssuedBefore) != c.given || got.Until.Before(c.stands.Until) {
					t.Errorf("before was %+v, and now %+v", c.stands, got)
				}
				c.stands, c.given, stood = got, false, len(standing.Renew)
				var err error
				if orders, err = registration.OpenOrders(t.Context(), w.Store, w.Store.ScanLiving); err != nil {
					t.Fatal(err)
				}
			}
			if err := orders.RenewAll(t.Context(), "", time.Minute); err != nil {
				t.Fatal(err)
			}
			standing, _ := orders.Get()
			if last := standing.Renew[len(standing.Renew)-1]; !last.IssuedBefore.After(c.stands.IssuedBefore) || last.For != "" {
				t.Errorf("an order without a mark was not given: %+v", standing.Renew)
			}
		})
	}
}

// Who was told to renew within minutes is not put off by an order that came later and is spread over more: also where he was
// away meanwhile, for both orders stand, and longer than the first one's spread. One that is due sooner takes its place.
func TestALaterOrderPutsOffNothing(t *testing.T) {
	const web, db = "spiffe://mesh.test/web", "spiffe://mesh.test/db"
	for name, c := range map[string]struct {
		first, second string // identities
		ago, spread   time.Duration
		both          bool
	}{
		"all, and then all over longer":       {spread: time.Hour, both: true},
		"all, and then all as soon":           {spread: time.Second},
		"all, and then all when that is over": {ago: 2 * time.Minute, spread: time.Hour, both: true},
		"one, and then all over longer":       {first: web, spread: time.Hour, both: true},
		"one, and then all as soon":           {first: web, spread: time.Second},
		"one, and then the same over longer":  {first: web, second: web, spread: time.Hour, both: true},
		"one, and then the same as soon":      {first: web, second: web, spread: time.Second},
		"one, and then another one":           {first: web, second: db, spread: time.Second, both: true},
		"all, and then one":                   {second: web, spread: time.Second, both: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := world.New(t, "")
			now := time.Now()
			first := ca.RenewOrder{ID: c.first, IssuedBefore: now.Add(-c.ago), Spread: time.Minute, Until: now.Add(time.Hour)}
			second := ca.RenewOrder{ID: c.second, IssuedBefore: now, Spread: c.spread, Until: now.Add(time.Hour)}
			for _, r := range []ca.RenewOrder{first, second} {
				if err := w.RA.Orders.Renew(t.Context(), r); err != nil {
					t.Fatal(err)
				}
			}
			again, err := registration.OpenOrders(t.Context(), w.Store, w.Store.ScanLiving)
			if err != nil {
				t.Fatal(err)
			}
			for what, o := range map[string]*registration.Orders{"stands": w.RA.Orders, "is stored": again} {
				standing, _ := o.Get()
				n := len(standing.Renew)
				if last := standing.Renew[n-1]; n == 2 != c.both || last.ID != c.second || last.Spread != c.spread || standing.Renew[0].Spread != time.Minute == c.both {
					t.Errorf("what %s is %+v", what, standing.Renew)
				}
			}
		})
	}
}

// Of the orders that are over one stands for each identity, and one for all, however many follow on another.
func TestOrdersThatAreOverAreFew(t *testing.T) {
	const web, db = "spiffe://mesh.test/web", "spiffe://mesh.test/db"
	w := world.New(t, "")
	orders, now := w.RA.Orders, time.Now()
	const minutes = 100
	for i := range minutes {
		for _, id := range []string{"", web, db, web} {
			at := now.Add(time.Duration(i-minutes) * time.Minute)
			r := ca.RenewOrder{ID: id, IssuedBefore: at, Spread: 30 * time.Second, Until: now.Add(time.Hour)}
			if err := orders.Renew(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
	}
	var stand []string
	standing, _ := orders.Get()
	for _, r := range standing.Renew {
		stand = append(stand, r.ID)
	}
	if !slices.Equal(stand, []string{"", db, web}) {
		t.Errorf("what stands is %+v", standing.Renew)
	}
}

// What has passed of an order's spread counts from when it was given, whatever it has to cover, and over a restart.
func TestAnOrdersSpreadBeginsWhenItIsGiven(t *testing.T) {
	for name, fast := range map[string]time.Duration{"clocks that are right": 0, "one that was fast": time.Hour} {
		t.Run(name, func(t *testing.T) {
			w := world.New(t, "")
			now := time.Now()
			issued := now.Add(fast)
			entry := ca.LedgerEntry{
				Serial: []byte{1}, ID: "spiffe://mesh.test/web", Profile: "workload", IssuedAt: issued, NotAfter: issued.Add(ca.MaxTTL), Evidence: []byte("{}"),
			}
			if err := w.Store.AppendLedger(t.Context(), []ca.LedgerEntry{entry}); err != nil {
				t.Fatal(err)
			}
			if err := w.RA.Orders.RenewAll(t.Context(), "a step", 45*time.Minute); err != nil {
				t.Fatal(err)
			}
			again, err := registration.OpenOrders(t.Context(), w.Store, w.Store.ScanLiving)
			if err != nil {
				t.Fatal(err)
			}
			for what, o := range map[string]*registration.Orders{"stands": w.RA.Orders, "is stored": again} {
				standing, _ := o.Get()
				r := standing.Renew[0]
				late := 30 * time.Minute
				if passed := r.Elapsed(time.Now().Add(late)); passed < late || passed > late+time.Minute {
					t.Errorf("of what %s %v have passed: %+v", what, passed, r)
				}
				if passed := r.Elapsed(now.Add(-time.Hour)); passed != 0 {
					t.Errorf("of what %s %v have passed by a clock that was set back", what, passed)
				}
			}
		})
	}
}

// Orders for one identity each are bounded. One for all is never refused: it takes the place of all, and is as soon as each.
func TestAnOrderForAllIsNeverRefused(t *testing.T) {
	w := world.New(t, "")
	orders, now := w.RA.Orders, time.Now()
	for i := range 64 {
		r := ca.RenewOrder{ID: fmt.Sprintf("spiffe://mesh.test/w%d", i), IssuedBefore: now, Spread: 10 * time.Minute, Until: now.Add(time.Hour)}
		if err := orders.Renew(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if err := orders.Renew(t.Context(), ca.RenewOrder{ID: "spiffe://mesh.test/more", IssuedBefore: now, Until: now.Add(time.Hour)}); err == nil {
		t.Error("one more was taken")
	}
	if err := orders.RenewAll(t.Context(), "a step", time.Hour); err != nil {
		t.Fatal(err)
	}
	if standing, _ := orders.Get(); len(standing.Renew) != 1 || standing.Renew[0].Spread > 10*time.Minute || standing.Renew[0].For != "a step" {
		t.Errorf("what stands is %+v", standing.Renew)
	}
}

// What was issued while the clock was fast is issued later than an order by a clock that was set right since. It is covered, and
// each further order has a moment of its own: agents tell them apart by that.
func TestAnOrderCoversWhatAFastClockIssued(t *testing.T) {
	w := world.New(t, "")
	now := time.Now()
	fast := now.Add(time.Hour)
	var entries []ca.LedgerEntry
	for i, at := range []time.Time{now.Add(-time.Minute), fast, now.Add(-time.Second)} { // in their order
		entries = append(entries, ca.LedgerEntry{
			Index: uint64(i), Serial: []byte{byte(i + 1)}, ID: "spiffe://mesh.test/web", Profile: "workload", IssuedAt: at, NotAfter: at.Add(ca.MaxTTL), Evidence: []byte("{}"),
		})
	}
	if err := w.Store.AppendLedger(t.Context(), entries); err != nil {
		t.Fatal(err)
	}
	var before time.Time
	for _, mark := range []string{"a step", "the next one", ""} {
		if err := w.RA.Orders.RenewAll(t.Context(), mark, time.Minute); err != nil {
			t.Fatal(err)
		}
		standing, _ := w.RA.Orders.Get()
		last := standing.Renew[len(standing.Renew)-1]
		if !last.IssuedBefore.After(fast) || !last.IssuedBefore.After(before) || last.Until.Before(fast.Add(ca.MaxTTL)) || last.For != mark {
			t.Errorf("an SVID was issued at %s, and the order is %+v", fast, last)
		}
		before = last.IssuedBefore
	}
}
