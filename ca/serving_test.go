package ca

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/meshca/meshca/api/refusal"
)

// handshake is a client's that knows the bundle alone, as an agent does.
func handshake(t *testing.T, h *house, s *Serving) error {
	t.Helper()
	client, server := net.Pipe()
	defer client.Close()
	go func() {
		c := tls.Server(server, &tls.Config{GetCertificate: s.Certificate, MinVersion: tls.VersionTLS13})
		_ = c.Handshake() // the client's side tells
		_ = server.Close()
	}()
	bundle := x509bundle.FromX509Authorities(testDomain, []*x509.Certificate{h.upstream.root})
	return tls.Client(client, tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(s.id))).Handshake()
}

func TestServing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, 6*time.Hour, 72*time.Hour)
		s, err := NewServing(h.issuer)
		if err != nil {
			t.Fatal(err)
		}
		wantReason(t, s.Ready(), refusal.IssuerNotReady)
		if handshake(t, h, s) == nil {
			t.Error("a handshake without a certificate")
		}
		term, err := s.Renew(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := handshake(t, h, s); err != nil {
			t.Fatal(err)
		}
		if term.Life != 6*time.Hour || term.Left != term.Life || !s.Due(term).Equal(time.Now().Add(3*time.Hour)) || s.Ready() != nil {
			t.Errorf("term %+v, due %s, ready %v", term, s.Due(term), s.Ready())
		}
		first, _, _ := s.Status()
		if first.ID.String() != "spiffe://example.org/meshca/server" || !h.authority.IsOwnKey(first.Chain[0].PublicKey) {
			t.Errorf("id %s", first.ID)
		}
		if e := h.store.all()[0]; e.Profile != ProfileServer || string(e.Evidence) != servingEvidence {
			t.Errorf("the ledger has %+v", e)
		}
		// A workload cannot get an SVID for the CA's key.
		r := workloadRequest(t)
		r.PublicKey = first.Chain[0].PublicKey
		_, err = h.issuer.Issue(t.Context(), r)
		wantReason(t, err, refusal.CSRKeyIsCA)

		// A failure keeps the old one, a success replaces it.
		h.store.set(errors.New("full"), nil)
		if _, err := s.Renew(t.Context()); err == nil {
			t.Error("renewed without a ledger")
		}
		if kept, _, last := s.Status(); last == nil || !kept.Chain[0].Equal(first.Chain[0]) {
			t.Errorf("after a failure: %v", last)
		}
		h.store.set(nil, nil)
		if _, err := s.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		if next, _, last := s.Status(); last != nil || next.Chain[0].Equal(first.Chain[0]) || samePublicKey(next.Chain[0].PublicKey, first.Chain[0].PublicKey) {
			t.Error("the same certificate or key again")
		}
		s.Expired()
		wantReason(t, s.Ready(), refusal.IssuerNotReady)
		if handshake(t, h, s) == nil {
			t.Error("an ended certificate is served")
		}
	})
}
