package ca

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"
)

// restricted has a certificate allow these extended key usages alone.
func restricted(usages ...x509.ExtKeyUsage) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.ExtKeyUsage = usages }
}

func TestCheckIssuerUsage(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(*x509.Certificate)
		says string // empty: it is good
	}{
		"none":            {func(*x509.Certificate) {}, ""},
		"both":            {restricted(x509.ExtKeyUsageCodeSigning, x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth), ""},
		"any":             {restricted(x509.ExtKeyUsageEmailProtection, x509.ExtKeyUsageAny), ""},
		"clientAuth":      {restricted(x509.ExtKeyUsageClientAuth), "extended key usages without serverAuth,"},
		"serverAuth":      {restricted(x509.ExtKeyUsageServerAuth), "extended key usages without clientAuth,"},
		"emailProtection": {restricted(x509.ExtKeyUsageEmailProtection), "extended key usages without serverAuth and clientAuth,"},
		"an unknown one": {func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} },
			"extended key usages without serverAuth and clientAuth,"},
	} {
		t.Run(name, func(t *testing.T) {
			err := CheckIssuerUsage(newRoot(t, "root", time.Hour, c.edit).root)
			if c.says == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A root below which verifiers accept nothing is never trusted anew. Where one is trusted already it must not keep the CA
// from the start with which it is replaced.
func TestRestrictedRootsAreNotTrusted(t *testing.T) {
	bad, good := newRoot(t, "bad", time.Hour, restricted(x509.ExtKeyUsageClientAuth)).root, newRoot(t, "root", time.Hour).root
	if _, err := trustOn(t, &memory{}, []*x509.Certificate{bad}); !errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), "without serverAuth") {
		t.Errorf("a first start: %v", err)
	}
	store := &memory{}
	trust, err := trustOn(t, store, []*x509.Certificate{good})
	if err != nil {
		t.Fatal(err)
	}
	if err := trust.AddRoots(t.Context(), bad); !errors.Is(err, ErrUsage) {
		t.Errorf("one that is added: %v", err)
	}
	if _, err := trustOn(t, store, []*x509.Certificate{good}, bad); !errors.Is(err, ErrUsage) {
		t.Errorf("an anchor: %v", err)
	}
	later := TrustConfig{TrustDomain: testDomain, Store: store, Roots: []*x509.Certificate{bad}, Others: []*x509.Certificate{good}}
	if _, err := NewTrust(t.Context(), later); err != nil {
		t.Errorf("a start with its successor: %v", err)
	}
	store.bundle, err = store.bundle.With(bad) // by an earlier build
	if err != nil {
		t.Fatal(err)
	}
	trust, err = trustOn(t, store, []*x509.Certificate{good}, bad)
	if err != nil {
		t.Fatalf("a start with an anchor that is trusted already: %v", err)
	}
	if b, _ := trust.Bundle(); len(b.X509Authorities()) != 2 {
		t.Errorf("then the bundle has %d roots", len(b.X509Authorities()))
	}
}

// No intermediate comes into use in whose path an authority does not allow what leaves are for: Go's verifier asks that of
// the root too.
func TestNoIntermediateBelowARestrictedAuthority(t *testing.T) {
	below := func(h *house, edit func(*x509.Certificate)) error {
		key := newKey(t)
		template := &x509.Certificate{
			SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "middle"}, SubjectKeyId: []byte{1, 2, 3},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
			KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: 1,
		}
		edit(template)
		middle := sign(t, template, h.upstream.root, key.Public(), h.upstream.key)
		h.upstream.after = func(c []*x509.Certificate) []*x509.Certificate {
			return []*x509.Certificate{sign(t, c[0], middle, c[0].PublicKey, key), middle}
		}
		_, err := h.line.Renew(t.Context())
		return err
	}
	h := newHouse(t, time.Hour, 72*time.Hour)
	before := h.line.current.Load()
	if err := below(h, restricted(x509.ExtKeyUsageEmailProtection)); !errors.Is(err, ErrUsage) || h.line.current.Load() != before ||
		!strings.Contains(err.Error(), `"CN=middle" of its path has extended key usages without serverAuth and clientAuth`) {
		t.Errorf("below a restricted issuer: %v", err)
	}
	if err := below(h, restricted(x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth)); err != nil {
		t.Errorf("below one that allows both: %v", err)
	}
	bad := newRoot(t, "bad", 1000*time.Hour, restricted(x509.ExtKeyUsageClientAuth))
	template := *h.upstream.root
	if _, err := checkPath([]*x509.Certificate{sign(t, &template, bad.root, newKey(t).Public(), bad.key)}, []*x509.Certificate{bad.root}, time.Now()); !errors.Is(err, ErrUsage) {
		t.Errorf("below a restricted root: %v", err)
	}
	leaf := sign(t, &x509.Certificate{SerialNumber: big.NewInt(3), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, bad.root, newKey(t).Public(), bad.key)
	roots := x509.NewCertPool()
	roots.AddCert(bad.root)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots}); err == nil || !strings.Contains(err.Error(), "incompatible key usage") {
		t.Errorf("Go's verifier says of a leaf below it: %v", err)
	}
}
