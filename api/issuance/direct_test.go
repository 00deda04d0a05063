package issuance_test

import (
	"crypto/x509"
	"testing"

	"github.com/meshca/meshca/api/issuance"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/test/world"
)

func (d *door) issue(client meshcav1.IssuanceServiceClient, items ...*meshcav1.X509SVIDRequest) (*meshcav1.IssueX509SVIDsResponse, error) {
	return client.IssueX509SVIDs(d.t.Context(), &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster, Requests: items})
}

// A workload that policy lets call by itself needs no client certificate: its token is the proof.
func TestAWorkloadCallsByItself(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	d.SetPolicy("rules: [{serviceAccounts: [web], direct: true}, {}]")
	client := d.dial(nil)
	r, err := d.issue(client, d.item())
	if err != nil {
		t.Fatal(err)
	}
	svid := r.GetResults()[0].GetSvid()
	if svid.GetSpiffeId() != "spiffe://mesh.test/ns/shop/sa/web" || len(r.GetIntermediates()) != 1 {
		t.Errorf("got %v", r)
	}
	if line := d.Audit.Last(t); line["way"] != "direct" || line["outcome"] != "issued" {
		t.Errorf("audit line: %v", line)
	}
	if _, err := d.issue(client, d.item(), d.item()); refusal.Of(err) != refusal.BatchTooLarge {
		t.Errorf("two requests: %v", err)
	}
	till := world.Web
	till.ServiceAccount = "till"
	r, err = d.issue(client, &meshcav1.X509SVIDRequest{Token: d.Token(till, "meshca").Secret(), Csr: world.CSR(t, world.NewKey(t), x509.CertificateRequest{})})
	if err != nil || r.GetResults()[0].GetRefusal().GetReason() != string(refusal.DirectNotAllowed) {
		t.Errorf("an account that may not: %v, %v", r, err)
	}
	d.SetPolicy("rules: [{}]")
	if _, err := d.issue(client, d.item()); refusal.Of(err) != refusal.AgentRequired {
		t.Errorf("policy closed the way again: %v", err)
	}
}

// What a stranger costs is bounded by its address, whatever policy opens: its tokens are looked at so often and no more.
func TestCallersByThemselvesAreBounded(t *testing.T) {
	d := newDoor(t, issuance.Limits{CallsPerSecondWithoutSVID: 1})
	d.SetPolicy("rules: [{direct: true}]")
	client := d.dial(nil)
	outcomes := map[refusal.Reason]int{}
	for range 20 {
		r, err := d.issue(client, &meshcav1.X509SVIDRequest{Token: "made.up.token"})
		if err == nil {
			err = &refusal.Error{Reason: refusal.Reason(r.GetResults()[0].GetRefusal().GetReason())}
		}
		outcomes[refusal.Of(err)]++
	}
	if outcomes[refusal.PeerLimit] < 10 || outcomes[refusal.TokenMalformed] < 1 || outcomes[refusal.TokenMalformed] > 10 {
		t.Errorf("20 calls at once: %v", outcomes)
	}
}

// An agent's word for a pod travels with its UID.
func TestAnAgentVouchesForAPod(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	d.SetPolicy("rules: [{nodeVouched: true}]")
	id, err := attestor.NewIdentity(world.Cluster, "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	d.Pods.Store(attestor.PodRef{Namespace: "shop", Name: "web-1", UID: "pod-web-1"}, attestor.Evidence{
		Proven: true, Vouched: true, Identity: id, Method: "kubernetes/nodeVouched", PodName: "web-1", PodUID: "pod-web-1", NodeName: "node1", NodeUID: "uid-node1",
	})
	ask := func(uid string) *meshcav1.X509SVIDRequest {
		return &meshcav1.X509SVIDRequest{
			Csr: world.CSR(t, world.NewKey(t), x509.CertificateRequest{}), Pod: &meshcav1.PodReference{Namespace: "shop", Name: "web-1", Uid: uid},
		}
	}
	cert := d.attest()
	r, err := d.issue(d.dial(cert), ask("pod-web-1"), ask("another"))
	if err != nil {
		t.Fatal(err)
	}
	if got := r.GetResults()[0].GetSvid().GetSpiffeId(); got != "spiffe://mesh.test/ns/shop/sa/web" {
		t.Errorf("got %v", r.GetResults()[0])
	}
	if got := r.GetResults()[1].GetRefusal().GetReason(); got != string(refusal.NodeVouchedNotAllowed) {
		t.Errorf("another pod of that name: %v", r.GetResults()[1])
	}
}
