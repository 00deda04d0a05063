package registration_test

import (
	"context"
	"crypto/x509"
	"testing"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

// slow has the world bound its pods to n SVIDs.
func slow(t *testing.T, w *world.World, n int) {
	t.Helper()
	pace, err := registration.NewPace(n)
	if err != nil {
		t.Fatal(err)
	}
	w.RA.Pace = pace
}

func TestNoPodFillsTheLedger(t *testing.T) {
	w := world.New(t, "")
	agent := w.AttestAgent(world.Agent)
	const most = 3
	slow(t, w, most)
	before := ledgerSize(t, w)
	for i := range 2 * most {
		_, err := w.Issue(agent, world.Web)
		if want := i >= most; (refusal.Of(err) == refusal.PodLimit) != want || !want && err != nil {
			t.Fatalf("SVID %d: %v", i, err)
		}
	}
	if n := ledgerSize(t, w) - before; n != most {
		t.Errorf("the ledger grew by %d entries, want %d", n, most)
	}
	if line := w.Audit.Last(t); line["outcome"] != string(refusal.PodLimit) || line["podUID"] != world.Web.PodUID {
		t.Errorf("audit line: %v", line)
	}
	other := world.Web
	other.Pod, other.PodUID = "web-2", "pod-web-2"
	if _, err := w.Issue(agent, other); err != nil {
		t.Errorf("the next pod of the account pays for it: %v", err)
	}
}

// Who takes an agent's pod over cannot do it with agents' SVIDs either.
func TestNoAgentFillsTheLedger(t *testing.T) {
	w := world.New(t, "")
	slow(t, w, 1)
	w.AttestAgent(world.Agent)
	if err := attestWith(w, w.Token(world.Agent, registration.AgentAudience)); refusal.Of(err) != refusal.PodLimit {
		t.Errorf("got %v", err)
	}
}

// Objects of the cluster's API count for their pods, by whatever door others of that pod came.
func TestClaimsCountForTheirPod(t *testing.T) {
	w := known(t, "", world.Web)
	slow(t, w, 1)
	if _, err := byObject(t, w, claim(w, true)); err != nil {
		t.Fatal(err)
	}
	_, err := byObject(t, w, claim(w, true))
	if refusal.Of(err) != refusal.PodLimit || !refusal.Of(err).Passing() {
		t.Errorf("got %v", err)
	}
}

// out is an issuer that cannot sign.
type out struct{}

func (out) Issue(context.Context, ca.Request) (ca.SVID, error) {
	return ca.SVID{}, refusal.New(refusal.LedgerUnavailable, "the disk is full")
}

func TestWhatIsNotSignedDoesNotCount(t *testing.T) {
	w := world.New(t, "")
	agent := w.AttestAgent(world.Agent)
	slow(t, w, 1)
	signs := w.RA.Issuer
	w.RA.Issuer = out{}
	for range 3 {
		if _, err := w.Issue(agent, world.Web); refusal.Of(err) != refusal.LedgerUnavailable {
			t.Fatalf("got %v", err)
		}
	}
	w.RA.Issuer = signs
	by, err := w.RA.Admit(t.Context(), agent, world.Cluster)
	if err != nil {
		t.Fatal(err)
	}
	wrong := request(w)
	wrong.CSR = world.CSR(t, world.NewKey(t), x509.CertificateRequest{DNSNames: []string{"web.shop"}})
	if _, err := w.RA.Issue(t.Context(), by, wrong); refusal.Of(err) != refusal.CSRAsksMore {
		t.Fatalf("got %v", err)
	}
	if _, err := w.Issue(agent, world.Web); err != nil {
		t.Errorf("after an outage: %v", err)
	}
}
