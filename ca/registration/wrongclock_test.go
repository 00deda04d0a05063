package registration_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/test/world"
)

// daysBehind is the time of a machine that came up with its clock two days behind: it signs for hours.
func daysBehind(t *testing.T, w *world.World) {
	t.Helper()
	for i := range 300 {
		at := time.Now().Add(-48*time.Hour + time.Duration(i)*time.Minute)
		entry := ca.LedgerEntry{Serial: []byte{2, byte(i >> 8), byte(i)}, ID: fmt.Sprintf("spiffe://mesh.test/late%d", i), Profile: "workload", IssuedAt: at, NotAfter: at.Add(time.Hour), Evidence: []byte("{}")}
		if err := w.Store.AppendLedger(t.Context(), []ca.LedgerEntry{entry}); err != nil {
			t.Fatal(err)
		}
	}
}

// What lives is found below what was signed while the clock was days behind: by a review, by who remembers causes of death, and
// by an order that has to cover what a fast clock has issued.
func TestAClockThatWasBehindHidesNothing(t *testing.T) {
	w := world.New(t, "rules: [{}]")
	if _, err := w.Issue(w.AttestAgent(world.Agent), world.Web); err != nil {
		t.Fatal(err)
	}
	fast := time.Now().Add(time.Hour)
	entry := ca.LedgerEntry{Serial: []byte{1}, ID: "spiffe://mesh.test/web", Profile: "workload", IssuedAt: fast, NotAfter: fast.Add(time.Hour), Evidence: []byte("{}")}
	if err := w.Store.AppendLedger(t.Context(), []ca.LedgerEntry{entry}); err != nil {
		t.Fatal(err)
	}
	daysBehind(t, w)
	w.SetPolicy("rules: [{deny: true}]")
	sum, err := w.RA.Review(t.Context(), time.Now().Add(time.Second), w.Store.ScanLiving)
	if err != nil || sum.Doubted != 1 {
		t.Errorf("a review doubts %+v: %v", sum, err)
	}
	endings := registration.NewEndings()
	if err := endings.Recall(t.Context(), w.Store.ScanLiving); err != nil {
		t.Fatal(err)
	}
	if held, _ := endings.Count(); held != 1 {
		t.Errorf("%d holders are known", held)
	}
	if err := w.RA.Orders.RenewAll(t.Context(), "a step", time.Minute); err != nil {
		t.Fatal(err)
	}
	if standing, _ := w.RA.Orders.Get(); !standing.Renew[0].IssuedBefore.After(fast) {
		t.Errorf("the order does not cover what is issued at %s: %+v", fast, standing.Renew)
	}
}

// ahead is what a machine signs that came up with its clock a year ahead, so long ago, and by a right one every half hour.
func ahead(t *testing.T, w *world.World, ago time.Duration) {
	t.Helper()
	add := func(serial byte, issued time.Time) {
		t.Helper()
		entry := ca.LedgerEntry{Serial: []byte{3, serial}, ID: "spiffe://mesh.test/ca", Profile: "server", IssuedAt: issued, NotAfter: issued.Add(time.Hour), Evidence: []byte("{}")}
		if err := w.Store.AppendLedger(t.Context(), []ca.LedgerEntry{entry}); err != nil {
			t.Fatal(err)
		}
	}
	add(0, time.Now().Add(365*24*time.Hour))
	for i := byte(1); ago > 0; ago -= 30 * time.Minute {
		add(i, time.Now().Add(-ago))
		i++
	}
}

// What a clock far ahead has issued is covered by the orders that are given while somebody may hold it, and those are over
// soon after. Later ones have nothing to do with it, also where such an order stands.
func TestAClockThatWasFarAheadIsCoveredForAWhile(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for name, c := range map[string]struct {
		ago     time.Duration
		stands  bool
		covered bool
	}{
		"an hour ago":                           {time.Hour, false, true},
		"five hours ago":                        {5 * time.Hour, false, true},
		"ten hours ago":                         {10 * time.Hour, false, false},
		"ten hours ago, and an order covers it": {10 * time.Hour, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := world.New(t, "")
			ahead(t, w, c.ago)
			if c.stands {
				r := ca.RenewOrder{IssuedBefore: time.Now().Add(year), Given: time.Now(), Spread: time.Second, Until: time.Now().Add(ca.MaxTTL)}
				if err := w.RA.Orders.Renew(t.Context(), r); err != nil {
					t.Fatal(err)
				}
			}
			from := time.Now()
			if err := w.RA.Orders.RenewAll(t.Context(), "a step", time.Minute); err != nil {
				t.Fatal(err)
			}
			standing, _ := w.RA.Orders.Get()
			r := standing.Renew[len(standing.Renew)-1]
			if covered := r.IssuedBefore.After(from.Add(year)); covered != c.covered || r.IssuedBefore.After(from.Add(time.Hour)) != c.covered {
				t.Errorf("the order is for what was issued before %s", r.IssuedBefore)
			}
			if r.Until.Before(from.Add(ca.MaxTTL)) || r.Until.After(time.Now().Add(2*ca.MaxTTL)) {
				t.Errorf("the order stands until %s", r.Until)
			}
		})
	}
}

// An order that names what is issued now is told to no agent any more when it is over, also where no other one follows it.
func TestAnOrderThatIsOverIsToldToNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		s := registration.Standing{Renew: []ca.RenewOrder{{IssuedBefore: now.Add(1000 * time.Hour), Until: now.Add(time.Hour)}, {IssuedBefore: now, Until: now.Add(time.Hour)}}}
		agent := spiffeid.RequireFromString("spiffe://mesh.test/meshca/agent/one/node1")
		if n := len(s.RenewBy(agent)); n != 2 {
			t.Errorf("at first %d are told", n)
		}
		time.Sleep(time.Hour)
		if n := len(s.RenewBy(agent)); n != 1 {
			t.Errorf("then %d are told", n)
		}
	})
}

// An agent that got something while the clock was a year ahead counts until that is certainly in use no more, by how long this
// process runs, and is forgotten like any other.
func TestAnAgentOfAClockThatWasFarAhead(t *testing.T) {
	const year = 365 * 24 * time.Hour
	fast := func(r *ca.AgentRecord) {
		r.LastSeen, r.HoldsUntil = time.Now().Add(year), time.Now().Add(year+time.Hour)
		r.Instances = []ca.AgentInstance{{Serial: "01", PodUID: "pod", Namespace: "mesh", ServiceAccount: "agent", NotAfter: time.Now().Add(year + time.Hour)}}
	}
	right := func(r *ca.AgentRecord) {
		r.LastSeen, r.HoldsUntil = time.Now(), time.Now().Add(time.Hour)
		r.Instances = []ca.AgentInstance{{Serial: "01", PodUID: "pod", Namespace: "mesh", ServiceAccount: "agent", NotAfter: time.Now().Add(time.Hour)}}
	}
	for name, c := range map[string]struct {
		record func(*ca.AgentRecord)
		counts time.Duration
		// confirms: its stream has come back, and another pod of it confirms while this one is away.
		confirms bool
	}{
		"silent":                          {fast, ca.InUse, false},
		"silent, and the clock was right": {right, time.Hour, false},
		"a pod of it is away":             {fast, ca.InUse, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				id := spiffeid.RequireFromString("spiffe://mesh.test/meshca/agent/one/node1")
				store, err := bolt.Open(dir + "/store")
				if err != nil {
					t.Fatal(err)
				}
				defer store.Close()
				if err := store.UpdateAgent(t.Context(), id.String(), func(r *ca.AgentRecord) error { c.record(r); return nil }); err != nil {
					t.Fatal(err)
				}
				book, err := registration.OpenAgentBook(t.Context(), store)
				if err != nil {
					t.Fatal(err)
				}
				if c.confirms {
					other := book.Connected(id, "02", "v1")
					defer other.Close()
					other.Acknowledge(5, nil)
				}
				time.Sleep(c.counts - time.Second)
				if n := len(book.Unconfirmed(5, time.Now())); n != 1 {
					t.Errorf("a second before its end %d are waited for", n)
				}
				shown := book.List()[0].CountsUntil()
				time.Sleep(time.Second)
				if n := len(book.Unconfirmed(5, time.Now())); n != 0 {
					t.Errorf("at its end %d are waited for", n)
				}
				if again := book.List()[0].CountsUntil(); !again.Equal(shown) || !c.confirms && !shown.Equal(time.Now()) {
					t.Errorf("it is shown to count until %s, and then until %s", shown, again)
				}
				if c.confirms {
					return
				}
				const kept = 30 * 24 * time.Hour
				time.Sleep(kept - c.counts - time.Hour)
				for _, left := range []int{1, 0} {
					if err := book.Forget(t.Context(), time.Now().Add(-kept)); err != nil || len(book.List()) != left {
						t.Errorf("%d are on record, want %d: %v", len(book.List()), left, err)
					}
					time.Sleep(2 * time.Hour)
				}
			})
		})
	}
}
