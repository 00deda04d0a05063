package agent

import (
	"crypto/x509"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/rotation"
)

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
					h := &held{term: rotation.Term{Life: 6 * time.Hour}, svid: &x509svid.SVID{
						ID: spiffeid.RequireFromString("spiffe://mesh.test/web"), Certificates: []*x509.Certificate{{NotAfter: issued.Add(6 * time.Hour)}},
					}}
					for range 3 { // the whole list comes again at each change
						o.apply(list, h, key)
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
