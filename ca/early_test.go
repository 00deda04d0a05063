package ca

import (
	"crypto/x509"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

// ahead puts an intermediate into use as a clock that far ahead brought it, and has been set back since.
func (h *house) ahead(t *testing.T, by time.Duration) {
	t.Helper()
	key := newKey(t)
	h.upstream.edit = func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = c.NotBefore.Add(by), c.NotAfter.Add(by)
	}
	chain, err := h.upstream.SignIntermediate(t.Context(), h.line.Root().Ref, IntermediateRequest{PublicKey: key.Public(), TrustDomain: testDomain, Life: h.authority.Life(), CommonName: "i"})
	if err != nil {
		t.Fatal(err)
	}
	h.upstream.edit = nil
	if err := h.line.use(newSigner(h.upstream.root, Kept{Key: key, Chain: chain, Received: time.Now()}, chain[0].NotAfter), false); err != nil {
		t.Fatal(err)
	}
}

// Nobody takes what is signed below an intermediate that is not valid yet, so nothing is, and the CA says that it is not ready.
func TestNothingIsIssuedUnderAnIntermediateThatIsNotValidYet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, 6*time.Hour, 72*time.Hour)
		h.ahead(t, 2*time.Hour)
		_, err := h.issuer.Issue(t.Context(), workloadRequest(t))
		wantReason(t, err, refusal.IssuerNotReady)
		err = h.authority.Ready()
		wantReason(t, err, refusal.IssuerNotReady)
		if err == nil || !strings.Contains(err.Error(), "1h59m0s") {
			t.Errorf("it does not say since when it is valid: %v", err)
		}
		if until := h.authority.IssuesUntil(); !until.IsZero() {
			t.Errorf("it says that it can issue until %s", until)
		}
		term, err := h.line.Renew(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if begins := h.line.current.Load().Certificate().NotBefore; !term.NotBefore.Equal(begins) {
			t.Errorf("its loop is told %s, and the intermediate is valid from %s on", term.NotBefore, begins)
		}
		if _, err := h.issuer.Issue(t.Context(), workloadRequest(t)); err != nil || h.authority.Ready() != nil || h.authority.IssuesUntil().IsZero() {
			t.Errorf("under its successor: %v, ready: %v", err, h.authority.Ready())
		}

		h.ahead(t, 2*time.Hour)
		time.Sleep(2 * time.Hour)
		if _, err := h.issuer.Issue(t.Context(), workloadRequest(t)); err != nil {
			t.Errorf("when its time has come: %v", err)
		}
	})
}

// The same goes for what the CA shows to its callers.
func TestTheServingSVIDIsNotReadyBeforeItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, 6*time.Hour, 72*time.Hour)
		s, err := NewServing(h.issuer)
		if err != nil {
			t.Fatal(err)
		}
		term, err := s.Renew(t.Context())
		if err != nil || s.Ready() != nil {
			t.Fatal(err, s.Ready())
		}
		if svid, _, _ := s.Status(); !term.NotBefore.Equal(svid.Chain[0].NotBefore) && !term.NotBefore.Equal(svid.Chain[1].NotBefore) {
			t.Errorf("its loop is told %s", term.NotBefore)
		}
		early := *s.current.Load()
		leaf := *early.svid.Chain[0]
		leaf.NotBefore = time.Now().Add(time.Hour)
		early.svid.Chain = []*x509.Certificate{&leaf, early.svid.Chain[1]}
		s.current.Store(&early)
		wantReason(t, s.Ready(), refusal.IssuerNotReady)
	})
}
