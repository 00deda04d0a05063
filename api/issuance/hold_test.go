package issuance_test

import (
	"crypto/x509"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/meshca/meshca/api/issuance"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/world"
)

// While the trust bundle is held no agent is told of it: not by a new stream, not by one that is open, not with its SVID. What
// they are told is no verdict on them.
func TestAHeldBundleIsToldToNobody(t *testing.T) {
	var held atomic.Bool
	d := newDoor(t, issuance.Limits{}, func(s *issuance.Server, _ *world.World) {
		s.Hold = func() error {
			if held.Load() {
				return refusal.New(refusal.BundleHeld, "%w", errors.New("a root is back"))
			}
			return nil
		}
	})
	cert := d.attest()
	open := d.sync(cert, hello())
	if _, err := open.Recv(); err != nil {
		t.Fatal(err)
	}
	held.Store(true)
	bundle, _ := d.Trust.Bundle()
	sequence, _ := bundle.SequenceNumber()
	if _, err := d.Trust.RaiseSequence(t.Context(), sequence+8); err != nil {
		t.Fatal(err)
	}
	if state, err := open.Recv(); refusal.Of(err) != refusal.BundleHeld || !refusal.Of(err).Passing() {
		t.Errorf("an open stream was told %v, %v", state, err)
	}
	if state, err := d.sync(cert, hello()).Recv(); refusal.Of(err) != refusal.BundleHeld {
		t.Errorf("a new stream was told %v, %v", state, err)
	}
	if line := d.Audit.Last(t); line["outcome"] != string(refusal.BundleHeld) {
		t.Errorf("the audit line is %v", line)
	}
	request := &meshcav1.AttestAgentRequest{
		Cluster: world.Cluster, Token: d.Token(world.Agent, "meshca-agent").Secret(), Csr: world.CSR(t, world.NewKey(t), x509.CertificateRequest{}), Version: "v1",
	}
	if answer, err := d.dial(nil).AttestAgent(t.Context(), request); refusal.Of(err) != refusal.BundleHeld {
		t.Errorf("an agent that attests itself was told %v, %v", answer, err)
	}
	held.Store(false)
	if _, err := d.sync(cert, hello()).Recv(); err != nil {
		t.Errorf("later: %v", err)
	}
}
