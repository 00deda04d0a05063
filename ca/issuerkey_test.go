package ca

import (
	"crypto"
	"crypto/dsa" //nolint:staticcheck // what no authority may have
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"
)

func TestCheckIssuerKey(t *testing.T) {
	rsaOf := func(bits int) crypto.PublicKey {
		return &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), bits-1, 1), E: 65537}
	}
	ecOf := func(c elliptic.Curve) crypto.PublicKey {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key.Public()
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		key  crypto.PublicKey
		says string // empty: it is good
	}{
		"RSA 1024":     {rsaOf(1024), "an RSA key of 1024 bits"},
		"RSA 2047":     {rsaOf(2047), "an RSA key of 2047 bits"},
		"RSA 2048":     {rsaOf(2048), ""},
		"RSA 8192":     {rsaOf(8192), ""},
		"RSA, nothing": {&rsa.PublicKey{}, "an RSA key of 0 bits"},
		"P-224":        {ecOf(elliptic.P224()), "an ECDSA key on the curve P-224"},
		"P-256":        {ecOf(elliptic.P256()), ""},
		"P-384":        {ecOf(elliptic.P384()), ""},
		"P-521":        {ecOf(elliptic.P521()), ""},
		"Ed25519":      {ed, ""},
		"DSA":          {&dsa.PublicKey{}, "a key of another kind"},
		"none":         {nil, "a key of another kind"},
	} {
		t.Run(name, func(t *testing.T) {
			err := CheckIssuerKey(c.key)
			if c.says == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, ErrWeakKey) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "2048") {
				t.Errorf("got %v", err)
			}
		})
	}
}

// rootOf is a root with a key that a test has chosen.
func rootOf(t *testing.T, key crypto.Signer) *rootUpstream {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "weak"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: -1,
	}
	return &rootUpstream{root: sign(t, template, template, key.Public(), key), key: key}
}

func weakKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// A root that can be forged is never trusted anew, whoever brings it. Where one is trusted already it must not keep the CA
// from the start with which it is replaced.
func TestWeakRootsAreNotTrusted(t *testing.T) {
	weak, good := rootOf(t, weakKey(t)).root, newRoot(t, "root", time.Hour).root
	if _, err := trustOn(t, &memory{}, []*x509.Certificate{weak}); !errors.Is(err, ErrWeakKey) || !strings.Contains(err.Error(), "1024 bits") {
		t.Errorf("a first start: %v", err)
	}
	store := &memory{}
	trust, err := trustOn(t, store, []*x509.Certificate{good})
	if err != nil {
		t.Fatal(err)
	}
	if err := trust.AddRoots(t.Context(), weak); !errors.Is(err, ErrWeakKey) {
		t.Errorf("one that is added: %v", err)
	}
	if _, err := trustOn(t, store, []*x509.Certificate{good}, weak); !errors.Is(err, ErrWeakKey) {
		t.Errorf("an anchor: %v", err)
	}
	later := TrustConfig{TrustDomain: testDomain, Store: store, Roots: []*x509.Certificate{weak}, Others: []*x509.Certificate{good}}
	if _, err := NewTrust(t.Context(), later); err != nil {
		t.Errorf("a start with its successor: %v", err)
	}
}

// No intermediate comes into use in whose path a key can be broken: the root's, or one between.
func TestNoIntermediateBelowAWeakKey(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	before := h.line.current.Load()
	middleKey := weakKey(t)
	middle := sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "middle"}, SubjectKeyId: []byte{1, 2, 3},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: 1,
	}, h.upstream.root, middleKey.Public(), h.upstream.key)
	h.upstream.after = func(c []*x509.Certificate) []*x509.Certificate {
		c[0].SignatureAlgorithm = 0 // by the key
		return []*x509.Certificate{sign(t, c[0], middle, c[0].PublicKey, middleKey), middle}
	}
	if _, err := h.line.Renew(t.Context()); !errors.Is(err, ErrWeakKey) || h.line.current.Load() != before {
		t.Errorf("below a weak issuer: %v", err)
	}
	weak := rootOf(t, weakKey(t))
	middle.SignatureAlgorithm = 0
	if _, err := checkPath([]*x509.Certificate{sign(t, middle, weak.root, newKey(t).Public(), weak.key)}, []*x509.Certificate{weak.root}, time.Now()); !errors.Is(err, ErrWeakKey) {
		t.Errorf("below a weak root: %v", err)
	}
}
