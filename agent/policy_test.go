package agent

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/fakeca"
)

// A policy that grants an identity no longer: the CA has the agent ask again, refuses, and what is held is gone; streams hear
// why. When policy grants it again, it comes back at the CA's word, and not at the end of a backoff.
func TestWhatPolicyGrantsNoLongerIsDropped(t *testing.T) {
	for _, reason := range []refusal.Reason{refusal.PolicyDenied, refusal.PolicyNoRule, refusal.NodeVouchedNotAllowed} {
		t.Run(string(reason), func(t *testing.T) {
			n := newNode(t)
			id := n.workload("web")
			a := n.start()
			p := newProxy(t, n.path("web.sock"), "default")
			p.ack(p.next())

			n.refuseWorkloads(reason)
			reviewed := time.Now().Add(time.Second) // an SVID's moment of issue has whole seconds
			n.ca.Order(fakeca.State{
				Renew:    []*meshcav1.RenewOrder{{SpiffeId: id, IssuedBefore: timestamppb.New(reviewed), Spread: durationpb.New(50 * time.Millisecond)}},
				Reviewed: timestamppb.New(reviewed),
			})
			eventually(t, "the SVID is dropped", func() bool { return a.state(0) == "refused" })
			w := a.status1()
			if w.GetLastRefusal().GetReason() != string(reason) || w.GetLastSpiffeId() != id {
				t.Errorf("status %v", w)
			}
			if got := refusal.Of(p.ended()); got != reason {
				t.Errorf("the stream ended with %s", got)
			}
			// Its proxy comes back and stays, and has the bundle.
			p = newProxy(t, n.path("web.sock"), "default", "ROOTCA")
			p.ack(p.next())
			if got := fetch(t, n.path("web.sock"), "ROOTCA"); got["ROOTCA"] == nil {
				t.Error("the bundle is served no longer")
			}
			if kept, _, err := a.store.load(a.roster.list()[0].name, a.roster.list()[0].Workload, n.config.TrustDomain); err != nil || kept != nil {
				t.Errorf("it is kept for a restart: %v, %v", kept, err)
			}

			n.ca.Refuse(nil)
			n.ca.Order(fakeca.State{Reviewed: timestamppb.New(reviewed.Add(time.Second))})
			eventually(t, "the SVID is back", func() bool { return a.state(0) == "fresh" })
			if certificateIn(t, p.next()) == "" {
				t.Error("it is not served again")
			}
		})
	}
}

// A workload that never had anything to drop is told of as well, once for each reason.
func TestWhatIsNeverGrantedIsLogged(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	n.refuseWorkloads(refusal.NodeVouchedNotAllowed)
	a := n.start()
	eventually(t, "it is refused", func() bool { return a.state(0) == "refused" })
	for range 3 {
		a.roster.list()[0].renewNow()
		time.Sleep(50 * time.Millisecond)
	}
	if got := strings.Count(n.log.String(), "NODE_VOUCHED_NOT_ALLOWED"); got != 1 {
		t.Errorf("it is logged %d times", got)
	}
}
