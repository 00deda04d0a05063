package agent

import (
	"encoding/hex"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/fakeca"
)

// endingOf tells the end of what a workload holds.
func endingOf(t *testing.T, w *meshcav1.WorkloadStatus, reason refusal.Reason) *meshcav1.Ending {
	t.Helper()
	serial, err := hex.DecodeString(w.GetSvid().GetSerial())
	must(t, err)
	if len(serial) == 0 {
		t.Fatal("nothing is held")
	}
	// As the CA writes it: sixteen bytes, whatever the number's size.
	return &meshcav1.Ending{Serials: [][]byte{append(make([]byte, 16-len(serial)), serial...)}, Reason: string(reason), Message: "as the test says"}
}

// The CA's word ends what is held, with its streams and its key, and nothing else; and it is asked again, for somebody else
// may be at the socket by now, whom the word does not concern.
func TestWhatIsHeldEndsWithItsCause(t *testing.T) {
	n := newNode(t)
	id := n.workload("web")
	n.workload("db")
	a := n.start()
	p := newProxy(t, n.path("web.sock"), "default")
	p.ack(p.next())
	beside := newProxy(t, n.path("db.sock"), "default")
	beside.ack(beside.next())
	ending := endingOf(t, a.status1(), refusal.ServiceAccountGone)
	n.refuseWorkloads(refusal.ServiceAccountGone)
	n.ca.Order(fakeca.State{Ended: []*meshcav1.Ending{ending}})
	if err := p.ended(); refusal.Of(err) != refusal.ServiceAccountGone || !strings.Contains(err.Error(), "as the test says") {
		t.Errorf("the stream ended with %v", err)
	}
	w := a.status1()
	if w.GetState() != "refused" || w.GetLastRefusal().GetReason() != string(refusal.ServiceAccountGone) || w.GetLastSpiffeId() != id || w.GetSvid() != nil {
		t.Errorf("status %v", w)
	}
	if kept := n.kept(); len(kept) != 1 {
		t.Errorf("on disk: %v", kept)
	}
	if a.state(1) != "fresh" || a.status().GetWorkloads()[1].GetOpenStreams() != 1 {
		t.Error("another workload was ended too")
	}
	n.ca.Refuse(nil)
	a.roster.list()[0].renewNow() // a moment of its own within half a minute
	eventually(t, "the next one is served", func() bool { return a.state(0) == "fresh" })
	if fetch(t, n.path("web.sock"), "default")["default"] == nil {
		t.Error("nothing is served")
	}
}

// What is not known to end a life ends none, and neither does what names nothing that is held.
func TestOtherWordsEndNothing(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.status().GetConnected() })
	h := a.roster.list()[0].holds()
	for _, ending := range []*meshcav1.Ending{
		endingOf(t, a.status1(), refusal.PodNotOnNode), endingOf(t, a.status1(), "OF_A_LATER_VERSION"), endingOf(t, a.status1(), ""),
		{Serials: [][]byte{{1, 2, 3}, {}, nil}, Reason: string(refusal.PodGone)}, {Reason: string(refusal.PodGone)},
	} {
		a.apply(&meshcav1.SyncResponse{Ended: []*meshcav1.Ending{ending}}, false)
		if a.roster.list()[0].holds() != h {
			t.Fatalf("%v ended it", ending)
		}
	}
	a.apply(&meshcav1.SyncResponse{Ended: []*meshcav1.Ending{endingOf(t, a.status1(), refusal.PodGone)}}, false)
	if a.roster.list()[0].holds() != nil {
		t.Error("a pod that is gone ended nothing")
	}
}

// An answer can be on its way while the CA says that it has ended.
func TestAnAnswerThatHasEnded(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" })
	w := a.roster.list()[0]
	h := w.holds()
	a.apply(&meshcav1.SyncResponse{Ended: []*meshcav1.Ending{endingOf(t, a.status1(), refusal.PodGone)}}, false)
	if err := w.install(h); refusal.Of(err) != refusal.PodGone || w.holds() != nil {
		t.Errorf("it was taken: %v", err)
	}
	if kept := n.kept(); len(kept) != 0 {
		t.Errorf("on disk: %v", kept)
	}
}

// An agent that was away hears it when it comes back, of what an earlier run kept too.
func TestEndedWhileTheAgentWasAway(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" })
	ending := endingOf(t, a.status1(), refusal.PodGone)
	must(t, a.stop())
	n.refuseWorkloads(refusal.IssuerEnding) // no renewal helps
	n.ca.Order(fakeca.State{Ended: []*meshcav1.Ending{ending}})
	b := n.start()
	eventually(t, "it hears of it", func() bool { return b.status1().GetLastRefusal().GetReason() == string(refusal.PodGone) })
	if kept := n.kept(); len(kept) != 0 {
		t.Errorf("on disk: %v", kept)
	}
}

// An agent whose own node is no more has nobody to tell it what of the node has ended: all has.
func TestAllEndsWithTheNode(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	n.workload("db")
	a := n.start()
	p := newProxy(t, n.path("db.sock"), "default")
	p.ack(p.next())
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.state(1) == "fresh" })
	of := func(reason refusal.Reason) func(spiffeid.ID) error {
		return func(id spiffeid.ID) error {
			if strings.HasPrefix(id.Path(), "/meshca/agent/") {
				return refusal.New(reason, "as the test says")
			}
			return nil
		}
	}
	n.ca.Refuse(of(refusal.PodGone)) // the agent's pod may be replaced, and its node goes on
	a.self.renewNow()
	eventually(t, "it was tried", func() bool { err, _ := a.self.lastError(); return refusal.Of(err) == refusal.PodGone })
	if a.state(0) != "fresh" || a.state(1) != "fresh" {
		t.Error("the end of the agent's pod ended its workloads")
	}
	n.ca.Refuse(of(refusal.NodeGone))
	a.self.renewNow()
	if err := p.ended(); refusal.Of(err) != refusal.NodeGone {
		t.Errorf("the stream ended with %v", err)
	}
	eventually(t, "all has ended", func() bool { return a.roster.list()[0].holds() == nil && len(n.kept()) == 0 })
}

// A thousand that end at once do not ask at once.
func TestThoseThatEndedAskAtMomentsOfTheirOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const many = 1000
		a := &Agent{metrics: newMetrics(&Agent{}), proxies: newProxies(t.TempDir(), nil, slog.New(slog.DiscardHandler))}
		woken := make(chan time.Duration, many)
		began, roots := time.Now(), newTestTrust(t, newCA(t))
		for i := range many {
			w := failing(i, time.Hour, time.Hour)
			w.roots = roots
			a.die(w, refusal.New(refusal.PodGone, "as the test says"))
			go func() {
				<-w.wake
				woken <- time.Since(began)
			}()
		}
		halves := [2]int{}
		for range many {
			d := <-woken
			if d > askAfterEnd {
				t.Fatalf("asked after %v", d)
			}
			if d < askAfterEnd/2 {
				halves[0]++
			} else {
				halves[1]++
			}
		}
		if halves[0] < many/3 || halves[1] < many/3 {
			t.Errorf("in the halves of the time %v ask", halves)
		}
	})
}
