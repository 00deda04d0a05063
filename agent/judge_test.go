package agent

import (
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// status1 is the only workload, as status shows it.
func (r *running) status1() *meshcav1.WorkloadStatus { return r.status().GetWorkloads()[0] }

// refuseWorkloads makes every renewal of a workload be refused so, and none of an agent.
func (n *node) refuseWorkloads(reason refusal.Reason) {
	n.ca.Refuse(func(id spiffeid.ID) error {
		if id.Path() == "/ns/test/sa/web" {
			return refusal.New(reason, "as the test says")
		}
		return nil
	})
}

// kept are the SVIDs of workloads that are on disk.
func (n *node) kept() []string {
	n.t.Helper()
	list, err := filepath.Glob(filepath.Join(n.config.RuntimeDir, "keys", "svid-*"))
	must(n.t, err)
	return list
}

// ended waits for the end of a stream, and returns why.
func (p *proxy) ended() error {
	p.t.Helper()
	late := time.After(15 * time.Second)
	for {
		select {
		case _, open := <-p.got:
			if open {
				continue
			}
			_, err := p.stream.Recv() // the status stays
			return err
		case <-late:
			p.t.Fatal("the stream is still open")
		}
	}
}

// Who the SVID was for is no more: nothing is served, the streams end with the reason, and the socket waits for whoever
// comes next.
func TestStreamsEndWithTheirPod(t *testing.T) {
	for _, reason := range []refusal.Reason{
		refusal.PodGone, refusal.PodRecreated, refusal.PodFinished, refusal.ServiceAccountGone, refusal.NamespaceGone, refusal.NodeGone,
	} {
		t.Run(string(reason), func(t *testing.T) {
			n := newNode(t)
			id := n.workload("web")
			n.give("web.token", "web", "uid-1", 1)
			a := n.start()
			p := newProxy(t, n.path("web.sock"), "default")
			p.ack(p.next())
			n.refuseWorkloads(reason)
			a.roster.list()[0].renewNow()
			if got := refusal.Of(p.ended()); got != reason {
				t.Errorf("the stream ended with %s", got)
			}
			w := a.status1()
			if w.GetState() != "refused" || w.GetLastRefusal().GetReason() != string(reason) || w.GetLastSpiffeId() != id || w.GetSvid() != nil {
				t.Errorf("status %v", w)
			}
			if kept := n.kept(); len(kept) != 0 {
				t.Errorf("on disk: %v", kept)
			}
			if got := refusal.Of(newProxy(t, n.path("web.sock"), "default").ended()); got != reason {
				t.Errorf("a new stream ended with %s", got)
			}
			n.ca.Stop() // what is known stays known
			a.roster.list()[0].renewNow()
			eventually(t, "it was tried", func() bool { return a.status1().GetNextTry() != nil })
			if w := a.status1(); w.GetLastRefusal().GetReason() != string(reason) || w.GetState() != "refused" {
				t.Errorf("status %v", w)
			}

			n.ca.Refuse(nil)
			_, err := n.ca.Start()
			must(t, err)
			n.give("web.token", "web", "uid-2", 1)
			a.roster.list()[0].renewNow()
			eventually(t, "the next pod is served", func() bool { return a.state(0) == "fresh" })
			if fetch(t, n.path("web.sock"), "default")["default"] == nil {
				t.Error("nothing is served to the next pod")
			}
		})
	}
}

// Any other refusal leaves what is held alone: it was given for good reason, and lasts until its end.
func TestStreamsOutliveOtherRefusals(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	a := n.start()
	p := newProxy(t, n.path("web.sock"), "default")
	p.ack(p.next())
	for _, reason := range []refusal.Reason{
		refusal.PolicyError, refusal.PolicyFactsUnknown, refusal.DNSNameInvalid, refusal.TokenExpired, refusal.NodeUnknown, refusal.KubernetesUnavailable, refusal.Internal,
	} {
		n.refuseWorkloads(reason)
		a.roster.list()[0].renewNow()
		eventually(t, "refused with "+string(reason), func() bool {
			a.roster.list()[0].renewNow()
			return a.status1().GetLastRefusal().GetReason() == string(reason)
		})
		if w := a.status1(); w.GetState() != "stale" || w.GetOpenStreams() != 1 {
			t.Errorf("%s: status %v", reason, w)
		}
	}
	if fetch(t, n.path("web.sock"), "default")["default"] == nil {
		t.Error("it is served no longer")
	}
}

// The same words about the call, which is the agent's, say nothing of the workload.
func TestAWordAgainstTheAgentIsNoneAgainstItsWorkloads(t *testing.T) {
	for _, reason := range []refusal.Reason{refusal.PodGone, refusal.IdentityDenied} {
		w := failing(1, time.Hour, time.Hour)
		w.roots = newTestTrust(t, newCA(t))
		h := w.holds()
		w.judge(Bearer{}, refusal.New(reason, "the agent's"))
		if w.holds() != h || w.state.gone != nil || w.state.denied {
			t.Errorf("%s: a call that was refused as a whole took what is held", reason)
		}
		w.judge(Bearer{}, verdict{refusal.New(reason, "the workload's")})
		if w.holds() != nil || !errors.As(w.state.refused, new(verdict)) {
			t.Errorf("%s: the verdict did nothing", reason)
		}
	}
}

// Where the token names somebody else by now, and the CA does not take the agent, nobody has said anything of who that is.
func TestAWordAgainstTheAgentIsNoneAgainstTheNextBearer(t *testing.T) {
	was, next := Bearer{Subject: "system:serviceaccount:test:web"}, Bearer{Subject: "system:serviceaccount:test:heir"}
	for _, reason := range []refusal.Reason{refusal.AgentNotListed, refusal.AgentUnknown, refusal.TokenRejected, refusal.NodeGone} {
		w := failing(1, time.Hour, time.Hour)
		w.roots = newTestTrust(t, newCA(t))
		h := w.holds()
		h.bearer = was
		w.judge(next, refusal.New(reason, "the agent's"))
		if w.holds() != h || w.state.turnedAway != (Bearer{}) {
			t.Errorf("%s: a call that was refused as a whole took what is held", reason)
		}
		w.judge(next, verdict{refusal.New(reason, "the workload's")})
		if w.holds() != nil {
			t.Errorf("%s: the verdict did nothing", reason)
		}
	}
	for name, refuse := range map[string]func(*node){
		"the call is refused": func(n *node) {
			n.ca.RefuseCallers(func(*x509.Certificate) error { return refusal.New(refusal.AgentUnknown, "as the test says") })
		},
		"each request is": func(n *node) {
			n.ca.Refuse(func(id spiffeid.ID) error {
				if strings.HasPrefix(id.Path(), "/meshca/") {
					return nil
				}
				return refusal.New(refusal.AgentUnknown, "as the test says")
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.workload("web")
			n.give("web.token", "web", "uid-1", 1)
			a := n.start()
			eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.status().GetConnected() })
			refuse(n)
			n.give("web.token", "heir", "uid-2", 1)
			a.Find(n.path("web.sock")).TokenChanged()
			eventually(t, "it is refused", func() bool { return a.status1().GetLastRefusal() != nil })
			if fetch(t, n.path("web.sock"), "default")["default"] == nil {
				t.Errorf("it is served no longer, for %v", a.status1().GetLastRefusal())
			}
			n.ca.RefuseCallers(nil)
			n.ca.Refuse(nil)
			a.self.renewNow()
			eventually(t, "the heir has its own", func() bool {
				a.Find(n.path("web.sock")).TokenChanged()
				return a.status1().GetSvid().GetSpiffeId() == "spiffe://mesh.test/ns/test/sa/heir"
			})
		})
	}
}

func TestDenialSaysWhyAndWhom(t *testing.T) {
	n := newNode(t)
	id := n.workload("web")
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.status().GetConnected() })
	p := newProxy(t, n.path("web.sock"), "default")
	p.ack(p.next())
	n.ca.Order(stateOf(id))
	eventually(t, "denied", func() bool { return a.state(0) == "denied" })
	if err := p.ended(); refusal.Of(err) != refusal.IdentityDenied || !contains(err.Error(), id) {
		t.Errorf("the stream ended with %v", err)
	}
	w := a.status1()
	if why := w.GetLastRefusal(); why.GetReason() != string(refusal.IdentityDenied) || !contains(why.GetMessage(), id) || w.GetLastRefusalAt() == nil {
		t.Errorf("refused %v", why)
	}
	if w.GetLastSpiffeId() != id {
		t.Errorf("last held %q", w.GetLastSpiffeId())
	}
	n.ca.Stop() // a failure to ask is no news about it
	a.roster.list()[0].renewNow()
	eventually(t, "it was tried", func() bool { return a.status1().GetNextTry() != nil })
	if w := a.status1(); w.GetLastRefusal().GetReason() != string(refusal.IdentityDenied) || w.GetState() != "denied" {
		t.Errorf("status %v", w)
	}
}

// A denied workload goes on asking, and what the CA says then does not hide the denial. What does not last says nothing of it.
func TestADenialStandsWhateverElseIsRefused(t *testing.T) {
	n := newNode(t)
	id := n.workload("web")
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.status().GetConnected() })
	n.ca.Order(stateOf(id))
	eventually(t, "denied", func() bool { return a.state(0) == "denied" })
	for _, tt := range []struct{ refused, shown refusal.Reason }{
		{refusal.CARolledBack, refusal.IdentityDenied},
		{refusal.KubernetesUnavailable, refusal.IdentityDenied},
		{refusal.TokenExpired, refusal.TokenExpired},
		{refusal.CARolledBack, refusal.TokenExpired},
	} {
		var asked atomic.Int32
		n.ca.Refuse(func(id spiffeid.ID) error {
			if id.Path() != "/ns/test/sa/web" {
				return nil
			}
			asked.Add(1)
			return refusal.New(tt.refused, "as the test says")
		})
		eventually(t, "it was refused, and asks again", func() bool {
			a.roster.list()[0].renewNow()
			return asked.Load() > 1
		})
		if s := a.status1(); s.GetState() != "denied" || s.GetLastRefusal().GetReason() != string(tt.shown) {
			t.Errorf("refused %s: it is %s, for %s", tt.refused, s.GetState(), s.GetLastRefusal().GetReason())
		}
	}
	if f := find(a.findings(), "workload "+n.path("web.sock"), "an operator denied"); f == nil {
		t.Error("check does not tell of the denial")
	}
	// Once it is lifted, what is refused now is what counts.
	n.ca.Refuse(func(spiffeid.ID) error { return refusal.New(refusal.TokenExpired, "as the test says") })
	n.ca.Order(stateOf())
	eventually(t, "it is refused for its token alone", func() bool { return a.state(0) == "refused" })
}

func TestStatusShowsWhatProxiesRefuseAndMiss(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	a := n.start()
	p := newProxy(t, n.path("web.sock"), "default", "nobody", "else")
	q := newProxy(t, n.path("web.sock"), "default", "nobody")
	first := p.next()
	q.ack(q.next())
	must(t, p.stream.Send(&discoveryv3.DiscoveryRequest{
		ResourceNames: p.names, TypeUrl: secretType, ResponseNonce: first.GetNonce(), ErrorDetail: &rpcstatus.Status{Message: "unusable"},
	}))
	eventually(t, "the refusal is shown", func() bool { return a.status1().GetLastNack() == "unusable" })
	w := a.status1()
	if w.GetNacks() != 1 || w.GetOpenStreams() != 2 || w.GetUnknownCount() != 3 || len(w.GetUnknownNames()) != 2 || w.GetUnknownNames()[0] != "else" {
		t.Errorf("status %v", w)
	}
	a.roster.list()[0].renewNow()
	q.ack(q.next())
	if got := a.status1().GetLastNack(); got != "unusable" {
		t.Errorf("another stream's word hides the refusal: %q", got)
	}
	p.ack(p.next())
	eventually(t, "it is gone once the proxy took the next", func() bool { return a.status1().GetLastNack() == "" })
	if got := a.status1().GetNacks(); got != 1 {
		t.Errorf("%d refusals are counted", got)
	}
}

// Nobody knows what a damaged list denied: nothing that was kept goes out before the CA says it.
func TestDamagedDenials(t *testing.T) {
	for name, content := range map[string]string{
		"empty": "", "cut": `{"denied":["spiffe://me`, "another's": `{}`, "no ID": `{"denied":["x"]}`,
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			id := n.workload("web")
			n.workload("db")
			a := n.start()
			eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.state(1) == "fresh" })
			must(t, a.stop())
			n.ca.Stop()
			n.write("state/denied.json", content)

			b := n.start()
			for i := range 2 {
				if got := b.state(i); got != "pending" {
					t.Errorf("workload %d: %s", i, got)
				}
			}
			if why := b.status1().GetLastRefusal(); why.GetReason() != string(refusal.SVIDPending) || !contains(why.GetMessage(), "damaged") {
				t.Errorf("status says %v", why)
			}
			if f := find(b.findings(), "denials", "damaged"); f.GetLevel() != meshcav1.Finding_LEVEL_ERROR || f.GetHint() == "" {
				t.Errorf("check finds %v", f)
			}
			if len(n.kept()) != 2 {
				t.Error("what was kept is gone")
			}
			n.ca.Order(stateOf(id))
			n.ca.Refuse(func(id spiffeid.ID) error { // no renewal helps: what was kept is what is served
				if id.Path() == "/meshca/agent/test/node-1" {
					return nil
				}
				return refusal.New(refusal.IssuerEnding, "no")
			})
			_, err := n.ca.Start()
			must(t, err)
			eventually(t, "the CA's word is taken", func() bool { return b.state(0) == "denied" && b.status().GetWorkloads()[1].GetSvid() != nil })
			if fetch(t, n.path("db.sock"), "default")["default"] == nil || fetch(t, n.path("web.sock"), "default")["default"] != nil {
				t.Error("not what the CA said is served")
			}
			eventually(t, "the list is mended", func() bool {
				data, err := os.ReadFile(n.path("state/denied.json"))
				return err == nil && contains(string(data), id)
			})
		})
	}
}
