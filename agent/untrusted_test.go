package agent

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
	"github.com/meshca/meshca/test/fakeca"
)

// An agent that was away while a root left renews at once what its workloads hold under it, whatever place they had in the
// order that went before.
func TestWhatTheBundleRefusesIsRenewedWhenTheAgentIsBack(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	a := n.start()
	w := a.roster.list()[0]
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" })
	n.ca.Stop()
	must(t, n.ca.ReplaceRoot())
	n.write("bundle.json", string(n.ca.Bundle()))
	n.ca.Order(fakeca.State{Renew: []*meshcav1.RenewOrder{{IssuedBefore: timestamppb.Now(), Spread: durationpb.New(maxSpread)}}})
	_, err := n.ca.Start()
	must(t, err)
	eventually(t, "renewed under the root that is left", func() bool {
		return a.trust.sequence() == 2 && w.holds().verify(a.trust, w.now()) == nil && a.state(0) == "fresh"
	})
}

// While what the bundle refuses cannot be renewed, status and checks say so, and why; a restart knows it, too.
func TestWhatTheBundleRefusesIsShown(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.status().GetConnected() })
	n.refuseWorkloads(refusal.KubernetesUnavailable)
	must(t, n.ca.ReplaceRoot())
	shown := func(a *running, why string) func() bool {
		return func() bool {
			w := a.status1()
			r := w.GetLastRefusal()
			return w.GetState() == "untrusted" && w.GetSvid() != nil && r.GetReason() == string(refusal.SVIDUntrusted) &&
				strings.Contains(r.GetMessage(), "sequence 2") && strings.Contains(r.GetMessage(), why)
		}
	}
	eventually(t, "it is said that the renewal fails", shown(a, string(refusal.KubernetesUnavailable)))
	found := false
	for _, f := range a.findings() {
		if strings.Contains(f.GetDetail(), string(refusal.SVIDUntrusted)) {
			found = f.GetLevel() == meshcav1.Finding_LEVEL_ERROR && f.GetHint() == refusal.SVIDUntrusted.Do()
		}
	}
	if !found {
		t.Errorf("a check finds %v", a.findings())
	}
	if fetch(t, n.path("web.sock"), "default")["default"] == nil {
		t.Error("it is served no longer: peers with the bundle before may take it")
	}
	must(t, a.stop())
	n.ca.Stop()
	b := n.start()
	eventually(t, "it is known after a restart", shown(b, ""))
	n.ca.Refuse(nil)
	_, err := n.ca.Start()
	must(t, err)
	eventually(t, "renewed", func() bool { return b.state(0) == "fresh" && b.status1().GetLastRefusal() == nil })
}

// fleetOf are workloads that hold an SVID each, under the CA's first root, and serve the trust.
func fleetOf(t *testing.T, ca *fakeca.CA, tr *trust, home func(i int) home, now func() instant, many int) []*workload {
	t.Helper()
	must(t, tr.offer(ca.Bundle(), nil))
	all := make([]*workload, many)
	for i := range all {
		w := newWorkload(Workload{Socket: "/run/web", PodUID: "uid"}, home(i), tr, &clock{now: now}, slog.New(slog.DiscardHandler))
		answer, key := issued(t, ca, "/ns/a/sa/b", 6*time.Hour)
		h, err := receive(answer, key, tr, now())
		must(t, err)
		must(t, w.install(h))
		all[i] = w
	}
	return all
}

func TestWhatTheBundleRefuses(t *testing.T) {
	replace := func(t *testing.T, ca *fakeca.CA, tr *trust) {
		must(t, ca.ReplaceRoot())
		must(t, tr.offer(ca.Bundle(), nil))
	}
	for name, c := range map[string]struct {
		change  func(t *testing.T, ca *fakeca.CA, tr *trust)
		clock   time.Duration // the node's minus the CA's
		refused bool
	}{
		"its root left": {replace, 0, true},
		"another root came": {func(t *testing.T, ca *fakeca.CA, tr *trust) {
			must(t, ca.AddRoot())
			must(t, tr.offer(ca.Bundle(), nil))
		}, 24 * time.Hour, false},
		"a clock is wrong": {func(*testing.T, *fakeca.CA, *trust) {}, -48 * time.Hour, false},
		"it has ended": {func(t *testing.T, ca *fakeca.CA, tr *trust) {
			time.Sleep(7 * time.Hour)
			replace(t, ca, tr)
		}, 0, false},
		"there is no bundle": {func(_ *testing.T, _ *fakeca.CA, tr *trust) {
			tr.current.Set(newTrust(tr.domain, "", "", tr.log).current.Value())
		}, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := newCA(t)
				tr := newTestTrust(t, ca)
				now := func() instant { return instant{wall: time.Now().Add(c.clock)} }
				w := fleetOf(t, ca, tr, func(int) home { return nodeOf("node") }, now, 1)[0]
				if w.wokenWithin(time.Minute) || w.condition() != conditionFresh {
					t.Fatalf("at first it is %s", w.condition())
				}
				c.change(t, ca, tr)
				w.refresh()
				if refused := w.condition() == conditionUntrusted; refused != c.refused || w.wokenWithin(soonWithin) != c.refused {
					t.Errorf("it is %s", w.condition())
				}
				w.refresh()
				w.stop()
				if w.wokenWithin(time.Hour) {
					t.Error("woken after its end")
				}
			})
		})
	}
}

// What the CA issued while its clock was ahead is valid for nobody when that is set right: it is renewed as soon as the agent
// hears the clock. Where that or the node's own clock says that it is valid, it stays.
func TestWhatTheCAsClockMakesEarly(t *testing.T) {
	const right, behind, ahead = time.Duration(0), -2 * time.Hour, 2 * time.Hour
	for name, c := range map[string]struct {
		issued, theirs, own time.Duration // what clocks are off: the CA's at the issue and then, and the node's
		wait                time.Duration
		refused             bool
	}{
		"it was ahead":                             {issued: ahead, theirs: right, refused: true},
		"it was ahead by more than a life":         {issued: 300 * time.Hour, theirs: right, refused: true},
		"it was ahead by a little":                 {issued: time.Minute, theirs: right},
		"it is ahead":                              {issued: right, theirs: ahead},
		"it was ahead, and is so again":            {issued: ahead, theirs: ahead},
		"it was ahead, and the time has come":      {issued: ahead, theirs: right, wait: 2 * time.Hour},
		"it has fallen back":                       {issued: right, theirs: behind},
		"the node's has fallen back":               {issued: right, theirs: right, own: behind},
		"both have fallen back, as on one machine": {issued: right, theirs: behind, own: behind, refused: true},
		"it was ahead, and the node's is":          {issued: ahead, theirs: right, own: 3 * time.Hour},
		"all is right":                             {},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca, clocks := newCA(t), newTestClocks()
				ca.Skew(c.issued)
				w := fleetOf(t, ca, newTestTrust(t, ca), func(int) home { return nodeOf("node") }, clocks.now, 1)[0]
				hears := func(off time.Duration) {
					w.theirs.measure(timestamppb.New(time.Now().Add(off)), 0)
					w.heardClock()
				}
				if hears(c.issued); w.wokenWithin(time.Minute) || w.condition() != conditionFresh {
					t.Fatalf("at first it is %s", w.condition())
				}
				clocks.set(func() { clocks.ahead = c.own })
				time.Sleep(c.wait)
				hears(c.theirs)
				if refused := w.condition() == conditionUntrusted; refused != c.refused || w.wokenWithin(soonWithin) != c.refused {
					t.Errorf("it is %s", w.condition())
				}
				ca.Skew(c.theirs)
				answer, key := issued(t, ca, "/ns/a/sa/b", 6*time.Hour)
				h, err := receive(answer, key, w.roots, w.now())
				must(t, err)
				must(t, w.install(h))
				if w.wokenWithin(time.Hour) || w.condition() != conditionFresh {
					t.Errorf("renewed, it is %s", w.condition())
				}
				w.stop()
			})
		})
	}
}

// Where the CA's clock and the node's were both ahead, either may be set right first.
func TestTheClockThatIsSetLastIsHeard(t *testing.T) {
	for name, order := range map[string][]string{"the node's last": {"the CA's", "the node's"}, "the CA's last": {"the node's", "the CA's"}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const ahead = 2 * time.Hour
				ca, clocks := newCA(t), newTestClocks()
				ca.Skew(ahead)
				clocks.set(func() { clocks.ahead = ahead })
				w := fleetOf(t, ca, newTestTrust(t, ca), func(int) home { return nodeOf("node") }, clocks.now, 1)[0]
				a := &Agent{config: Config{now: clocks.now}}
				must(t, a.roster.add(w))
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				go a.watchClock(ctx)
				w.theirs.measure(timestamppb.New(time.Now().Add(ahead)), 0)
				w.heardClock()
				for i, which := range order {
					if time.Sleep(time.Minute); w.condition() != conditionFresh {
						t.Fatalf("before %s is set it is %s", which, w.condition())
					}
					if which == "the CA's" {
						w.theirs.measure(timestamppb.Now(), 0)
						w.heardClock() // which the CA's state has it do
					} else {
						clocks.set(func() { clocks.ahead = 0 })
					}
					if renewed := w.wokenWithin(clockEvery + soonWithin); renewed != (i == 1) {
						t.Errorf("%s is set, and it is renewed: %t", which, renewed)
					}
				}
				w.stop()
			})
		})
	}
}

// An agent hears the clock with the CA's state.
func TestASetClockIsHeardOnTheStream(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	n.ca.Skew(2 * time.Hour)
	a := n.start()
	w := a.roster.list()[0]
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.status().GetConnected() })
	first := w.holds()
	n.ca.Skew(0)
	n.ca.Order(fakeca.State{}) // a CA whose clock is set says so
	eventually(t, "renewed", func() bool { return w.holds() != first && a.state(0) == "fresh" })
}

// A bundle that comes and goes, as a restored CA's may, costs no renewal where it has the root again before its moment.
func TestWhatTheBundleTakesAgainIsNotRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t)
		tr := newTestTrust(t, ca)
		w := fleetOf(t, ca, tr, func(int) home { return nodeOf("node") }, machineClocks(), 1)[0]
		with := tr.current.Value()
		must(t, ca.ReplaceRoot())
		must(t, tr.offer(ca.Bundle(), nil))
		w.refresh()
		tr.current.Set(with)
		w.refresh()
		if w.wokenWithin(time.Hour) || w.condition() != conditionFresh {
			t.Errorf("it is %s", w.condition())
		}
	})
}

// A fleet whose root has left does not come in one instant, and nobody waits long.
func TestWhatTheBundleRefusesIsSpreadALittle(t *testing.T) {
	const many = 200
	synctest.Test(t, func(t *testing.T) {
		ca := newCA(t)
		tr := newTestTrust(t, ca)
		fleet := fleetOf(t, ca, tr, func(i int) home { return nodeOf("node-" + string(rune('a'+i))) }, machineClocks(), many)
		must(t, ca.ReplaceRoot())
		must(t, tr.offer(ca.Bundle(), nil))
		began := time.Now()
		woken := make(chan time.Duration, many)
		for _, w := range fleet {
			w.refresh()
			go func() {
				<-w.wake
				woken <- time.Since(began)
			}()
		}
		slots := make([]int, 5)
		for range many {
			at := <-woken
			if at > soonWithin {
				t.Fatalf("woken after %v", at)
			}
			slots[min(at*5/soonWithin, 4)]++
		}
		for i, n := range slots {
			if n < many/5/3 || n > many/5*3 {
				t.Errorf("fifth %d: %d of %d", i, n, many)
			}
		}
	})
}

// issuing is a home whose CA signs whatever is asked.
type issuing struct {
	nodeOf
	ca    *fakeca.CA
	calls *atomic.Int32
}

func (h issuing) issue(_ context.Context, r *meshcav1.X509SVIDRequest) (*meshcav1.X509SVID, error) {
	h.calls.Add(1)
	return h.ca.Sign("/ns/a/sa/b", r.GetCsr(), 6*time.Hour)
}

// A CA that goes on signing what the bundle refuses is asked at the pace of any renewal that fails, and what is held stays.
func TestACAThatSignsWhatTheBundleRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, other := newCA(t), newCA(t)
		tr := newTestTrust(t, ca)
		calls := &atomic.Int32{}
		w := fleetOf(t, ca, tr, func(int) home { return issuing{"node", ca, calls} }, machineClocks(), 1)[0]
		first := w.holds()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = rotation.Keep(ctx, w, rotation.KeepOptions{Have: &first.term, Wake: w.wake, Observe: w.observed})
		}()
		must(t, other.ReplaceRoot())
		must(t, tr.offer(other.Bundle(), nil))
		w.refresh()
		time.Sleep(time.Hour)
		if n := calls.Load(); n < 10 || n > 100 || w.holds() != first || w.condition() != conditionUntrusted {
			t.Errorf("asked %d times in an hour, and it is %s", n, w.condition())
		}
		must(t, ca.AddRoot()) // a sequence for
		must(t, ca.AddRoot()) // the bundle with its root
		must(t, tr.offer(ca.Bundle(), nil))
		w.refresh()
		time.Sleep(10 * time.Minute)
		if w.holds() == first || w.condition() != conditionFresh {
			t.Errorf("when the bundle has its root it is %s", w.condition())
		}
		cancel()
		<-done
		w.stop()
	})
}
