package issuance_test

import (
	"context"
	"crypto/x509"
	"log/slog"
	"math/big"
	"testing"
	"time"

	"github.com/meshca/meshca/api/issuance"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

// A change of policy reaches the agent whose SVIDs it concerns, on the stream that it has open, and no other one.
func TestSyncTellsWhatPolicyGrantsNoLonger(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	hello := &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: world.Cluster}}}
	mine := d.attest()
	if _, err := d.issue(d.dial(mine), d.item()); err != nil {
		t.Fatal(err)
	}
	beside := world.Agent
	beside.Node, beside.NodeUID, beside.Pod, beside.PodUID = "node2", "uid-node2", "agent-2", "pod-agent-2"
	key := world.NewKey(t)
	attested, err := d.dial(nil).AttestAgent(t.Context(), &meshcav1.AttestAgentRequest{
		Cluster: world.Cluster, Token: d.Token(beside, registration.AgentAudience).Secret(), Csr: world.CSR(t, key, x509.CertificateRequest{}),
	})
	if err != nil {
		t.Fatal(err)
	}
	streams := map[string]interface {
		Recv() (*meshcav1.SyncResponse, error)
	}{"mine": d.sync(mine, hello), "beside": d.sync(certificate(key, attested.GetSvid()), hello)}
	for name, s := range streams {
		if state, err := s.Recv(); err != nil || state.GetPolicyReviewedAt() != nil {
			t.Fatalf("%s: %v, %v", name, state, err)
		}
	}
	d.SetPolicy("rules: [{deny: true}]")
	if _, err := d.RA.Review(t.Context(), time.Now(), d.Store.ScanLiving); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int{"mine": 1, "beside": 0} {
		state, err := streams[name].Recv()
		if err != nil || len(state.GetRenew()) != want || state.GetPolicyReviewedAt() == nil {
			t.Fatalf("%s: %v, %v", name, state, err)
		}
		if want == 1 && (state.GetRenew()[0].GetSpiffeId() != "spiffe://mesh.test/ns/shop/sa/web" || state.GetRenew()[0].GetSpread().AsDuration() != 2*time.Second) {
			t.Errorf("told %v", state.GetRenew())
		}
	}
	r, err := d.issue(d.dial(mine), d.item())
	if err != nil || r.GetResults()[0].GetRefusal().GetReason() != string(refusal.PolicyDenied) {
		t.Errorf("asked again: %v, %v", r, err)
	}
}

// How much of an order's spread has passed is told as it is when the state is sent, to whoever comes and whenever.
func TestSyncTellsWhatHasPassedOfASpread(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	hello := &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: world.Cluster}}}
	mine := d.attest()
	const ago = 30 * time.Minute
	given := time.Now().Add(-ago)
	for _, r := range []ca.RenewOrder{
		{IssuedBefore: given, Spread: 45 * time.Minute, Until: given.Add(time.Hour)},
		{IssuedBefore: given.Add(time.Hour), Given: given, Spread: time.Hour, Until: given.Add(2 * time.Hour)},
	} {
		if err := d.RA.Orders.Renew(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	last := ago
	for range 2 {
		state, err := d.sync(mine, hello).Recv()
		if err != nil || len(state.GetRenew()) != 2 {
			t.Fatalf("%v, %v", state, err)
		}
		for _, r := range state.GetRenew() {
			if passed := r.GetElapsed().AsDuration(); passed < last || passed > ago+10*time.Minute {
				t.Errorf("told %v", r)
			}
		}
		last = time.Since(given)
	}
}

// What has ended with its cause is told to the agent that holds it, on the stream that it has open and on the next one.
func TestSyncTellsWhatHasEnded(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	hello := &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: world.Cluster}}}
	mine := d.attest()
	r, err := d.issue(d.dial(mine), d.item())
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(r.GetResults()[0].GetSvid().GetChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	stream := d.sync(mine, hello)
	if state, err := stream.Recv(); err != nil || len(state.GetEnded()) > 0 {
		t.Fatalf("%v, %v", state, err)
	}
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { defer close(done); d.RA.WatchCauses(ctx, d.Store.ScanLiving, slog.New(slog.DiscardHandler)) }()
	defer func() { cancel(); <-done }()
	d.Ends.Store(world.Web.PodUID, refusal.New(refusal.PodGone, "pod shop/web-1 does not exist"))
	for _, name := range []string{"the open one", "the next one"} {
		if name == "the next one" {
			stream = d.sync(mine, hello)
		}
		state, err := stream.Recv()
		if err != nil || len(state.GetEnded()) != 1 {
			t.Fatalf("%s: %v, %v", name, state, err)
		}
		e := state.GetEnded()[0]
		if len(e.GetSerials()) != 1 || new(big.Int).SetBytes(e.GetSerials()[0]).Cmp(leaf.SerialNumber) != 0 ||
			e.GetReason() != string(refusal.PodGone) || e.GetMessage() != "pod shop/web-1 does not exist" {
			t.Errorf("%s: told %v", name, e)
		}
	}
}
