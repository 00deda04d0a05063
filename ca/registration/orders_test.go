package registration_test

import (
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
			orders := w.RA.Orders
			for range 2 { // the second time by a process of its own
				if err := orders.RenewAll(t.Context(), mark, time.Minute); err != nil {
					t.Fatal(err)
				}
				standing, _ := orders.Get()
				if len(standing.Renew) != 1 || standing.Renew[0].For != mark {
					t.Fatalf("what stands is %+v", standing.Renew)
				}
				if got := standing.Renew[0]; got.IssuedBefore.After(c.stands.IssuedBefore) != c.given || got.Until.Before(c.stands.Until) {
					t.Errorf("before was %+v, and now %+v", c.stands, got)
				}
				c.stands, c.given = standing.Renew[0], false
				var err error
				if orders, err = registration.OpenOrders(t.Context(), w.Store); err != nil {
					t.Fatal(err)
				}
			}
			if err := orders.RenewAll(t.Context(), "", time.Minute); err != nil {
				t.Fatal(err)
			}
			if standing, _ := orders.Get(); !standing.Renew[0].IssuedBefore.After(c.stands.IssuedBefore) || standing.Renew[0].For != "" {
				t.Errorf("an order without a mark was not given: %+v", standing.Renew)
			}
		})
	}
}
