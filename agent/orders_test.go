package agent

import (
	"crypto/x509"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/rotation"
	"github.com/meshca/meshca/test/fakeca"
)

// heldSince is what orders look at of an SVID.
func heldSince(issued time.Time, life time.Duration) *held {
	return &held{term: rotation.Term{Life: life}, svid: &x509svid.SVID{
		ID: spiffeid.RequireFromString("spiffe://mesh.test/web"), Certificates: []*x509.Certificate{{NotAfter: issued.Add(life)}},
	}}
}

// What an SVID is to be renewed by stays, whatever is ordered later: an order that is spread over more takes the place of none
// that is due before, also where the CA names only that one any more. What was renewed since is called for no more.
func TestALaterOrderPutsOffNothing(t *testing.T) {
	type moment struct {
		at     time.Duration // since the first list
		spread time.Duration // of the order that is given then; negative: there is none, and the SVID is a new one
	}
	const key = "a key"
	soon, long := time.Minute, 12*time.Hour
	for name, c := range map[string]struct {
		lists []moment
		want  []time.Duration // the moments of the calls
		keeps bool            // the CA names the earlier orders, too
	}{
		"one alone":                      {[]moment{{0, soon}}, []time.Duration{placeIn(soon, key)}, false},
		"a longer one takes its place":   {[]moment{{0, soon}, {time.Second, long}}, []time.Duration{placeIn(soon, key)}, false},
		"a longer one beside it":         {[]moment{{0, soon}, {time.Second, long}}, []time.Duration{placeIn(soon, key)}, true},
		"a shorter one":                  {[]moment{{0, long}, {time.Second, soon}}, []time.Duration{time.Second + placeIn(soon, key)}, true},
		"a longer one when that is done": {[]moment{{0, soon}, {time.Hour, long}}, []time.Duration{placeIn(soon, key), time.Hour + placeIn(long, key)}, true},
		"it was renewed meanwhile":       {[]moment{{0, long}, {time.Second, -1}}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				called := make(chan time.Duration, 10)
				o := orders{wake: func() { called <- time.Since(began) }}
				defer o.stop()
				var list []*meshcav1.RenewOrder
				issued := began.Add(-time.Hour)
				for _, m := range c.lists {
					time.Sleep(time.Until(began.Add(m.at)))
					if !c.keeps {
						list = nil
					}
					if m.spread >= 0 {
						list = append(list, &meshcav1.RenewOrder{IssuedBefore: timestamppb.Now(), Spread: durationpb.New(m.spread)})
					} else {
						issued = time.Now()
					}
					for range 3 { // the whole list comes again at each change
						o.apply(list, time.Now(), heldSince(issued, 6*time.Hour), key)
					}
				}
				time.Sleep(24 * time.Hour)
				synctest.Wait()
				close(called)
				var calls []time.Duration
				for at := range called {
					calls = append(calls, at)
				}
				if len(calls) != len(c.want) {
					t.Fatalf("called at %v, want %v", calls, c.want)
				}
				for i, at := range calls {
					if at != c.want[i] {
						t.Errorf("called at %v, want %v", calls, c.want)
					}
				}
			})
		})
	}
}

// An SVID's place in a spread is the same moment for whoever hears of the order, and whenever: late, once more, or as
// another process. What is overdue is due soon, and is called for once.
func TestAPlaceInASpreadIsOneMoment(t *testing.T) {
	type heard struct {
		at, elapsed time.Duration // since the order was given; by the CA, of its spread
		restarted   bool
	}
	const spread, life = 45 * time.Minute, 6 * time.Hour
	key := "0"
	for i := 0; placeIn(spread, key) < 40*time.Minute; i++ {
		key = fmt.Sprint(i)
	}
	place := placeIn(spread, key)
	for name, c := range map[string]struct {
		heard    []heard
		from, to time.Duration // of the one call; none: there is none
	}{
		"at once":                              {[]heard{{}}, place, place},
		"late":                                 {[]heard{{30 * time.Minute, 30 * time.Minute, false}}, place, place},
		"again":                                {[]heard{{}, {time.Minute, time.Minute, false}, {time.Hour, time.Hour, false}}, place, place},
		"by another process":                   {[]heard{{}, {30 * time.Minute, 30 * time.Minute, true}}, place, place},
		"too late":                             {[]heard{{time.Hour, time.Hour, false}}, time.Hour, time.Hour + soonWithin},
		"too late, and again":                  {[]heard{{time.Hour, time.Hour, false}, {61 * time.Minute, 61 * time.Minute, false}}, time.Hour, time.Hour + soonWithin},
		"by a machine that was suspended":      {[]heard{{}, {time.Minute, time.Hour, false}}, time.Minute, time.Minute + soonWithin},
		"of a CA that does not tell, and late": {[]heard{{30 * time.Minute, 0, false}}, 30*time.Minute + place, 30*time.Minute + place},
		"with nonsense":                        {[]heard{{0, -time.Hour, false}}, place, place},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				called := make(chan time.Duration, 10)
				o := &orders{wake: func() { called <- time.Since(began) }}
				h := heldSince(began.Add(-time.Hour), life)
				order := &meshcav1.RenewOrder{IssuedBefore: timestamppb.Now(), Spread: durationpb.New(spread)}
				for _, m := range c.heard {
					time.Sleep(time.Until(began.Add(m.at)))
					if m.restarted {
						o.stop()
						o = &orders{wake: o.wake}
					}
					order.Elapsed = durationpb.New(m.elapsed)
					o.apply([]*meshcav1.RenewOrder{order}, time.Now(), h, key)
				}
				time.Sleep(24 * time.Hour)
				synctest.Wait()
				o.stop()
				close(called)
				var calls []time.Duration
				for at := range called {
					calls = append(calls, at)
				}
				if len(calls) != 1 || calls[0] < c.from || calls[0] > c.to {
					t.Errorf("called at %v, want once from %v to %v", calls, c.from, c.to)
				}
			})
		})
	}
}

// Many that are overdue do not come in one instant, and none waits long, nor longer than the order was spread over.
func TestWhatIsOverdueIsSpreadALittle(t *testing.T) {
	const many = 500
	now := time.Now()
	for name, c := range map[string]struct{ spread, life, within time.Duration }{
		"an emergency's":          {time.Hour, 6 * time.Hour, soonWithin},
		"of lives that are short": {time.Hour, time.Minute, time.Minute / 100},
		"of a short spread":       {time.Second, 6 * time.Hour, time.Second},
	} {
		h := heldSince(now.Add(-time.Second), c.life)
		order := &meshcav1.RenewOrder{IssuedBefore: timestamppb.New(now), Spread: durationpb.New(c.spread), Elapsed: durationpb.New(2 * time.Hour)}
		slots := make([]int, 10)
		for i := range many {
			in := moment(order, now, h, fmt.Sprint("key ", i), now).Sub(now)
			if in < 0 || in >= c.within {
				t.Fatalf("%s: due in %v", name, in)
			}
			slots[in*10/c.within]++
		}
		for i, n := range slots {
			if n < many/10/3 || n > many/10*3 {
				t.Errorf("%s: tenth %d: %d of %d", name, i, n, many)
			}
		}
	}
}

// The first SVID of a workload is on its way when the order comes: it is named by it, too, and renewed once.
func TestAnOrderNamesWhatIsOnItsWay(t *testing.T) {
	n := newNode(t)
	id := spiffeid.RequireFromString(n.workload("web"))
	release := make(chan struct{})
	n.ca.Refuse(func(asks spiffeid.ID) error {
		if asks == id {
			<-release
		}
		return nil
	})
	a := n.start()
	eventually(t, "asked", func() bool { return len(n.ca.Seen().Batches) > 0 && a.status().GetConnected() })
	heard := func() bool {
		a.renewals.mu.Lock()
		defer a.renewals.mu.Unlock()
		return len(a.renewals.list) > 0
	}
	s := fakeca.State{Renew: []*meshcav1.RenewOrder{{ // for this one alone: an agent that renews its own SVID hears all again
		SpiffeId: id.String(), IssuedBefore: timestamppb.New(time.Now().Add(time.Hour)), Spread: durationpb.New(time.Millisecond),
	}}}
	n.ca.Order(s)
	eventually(t, "the order is heard", heard)
	close(release)
	eventually(t, "renewed", func() bool { return n.ca.Seen().Issued[id] == 2 })
	n.ca.Order(s) // what has come now is older than the order says, too: the CA's clock was fast
	time.Sleep(1500 * time.Millisecond)
	if got := n.ca.Seen().Issued[id]; got != 2 {
		t.Errorf("it was issued %d times", got)
	}
}

// What is due at once is called, whatever is put off in the same moment. By the machine's clock: a bubble's calls at once.
func TestWhatIsDueAtOnceIsCalled(t *testing.T) {
	for range 200 {
		var s spread
		calls := make(chan struct{}, 1)
		call := func() { calls <- struct{}{} }
		s.after(0, call)
		s.after(10*time.Minute, call)
		select {
		case <-calls:
		case <-time.After(10 * time.Second):
			t.Fatal("it was put off")
		}
		s.stop()
	}
}
