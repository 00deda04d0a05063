package lint

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	zx509 "github.com/zmap/zcrypto/x509"
	zlint "github.com/zmap/zlint/v3/lint"
)

// counting is a zlint lint that counts, and fails when told to.
type counting struct {
	runs *atomic.Int32
	fail *atomic.Bool
	hold chan struct{}
}

func (counting) CheckApplies(*zx509.Certificate) bool { return true }

func (c counting) Execute(*zx509.Certificate) *zlint.LintResult {
	c.runs.Add(1)
	if c.hold != nil {
		<-c.hold
	}
	if c.fail.Load() {
		return &zlint.LintResult{Status: zlint.Error, Details: "as told"}
	}
	return &zlint.LintResult{Status: zlint.Pass}
}

func withCounting(t *testing.T, max int, hold chan struct{}) (*Linter, *atomic.Int32, *atomic.Bool) {
	t.Helper()
	l, err := New(Options{MaxShapes: max})
	if err != nil {
		t.Fatal(err)
	}
	c := counting{&atomic.Int32{}, &atomic.Bool{}, hold}
	l.full.lints = append(l.full.lints, &zlint.CertificateLint{
		LintMetadata: zlint.LintMetadata{Name: "e_counting", Source: zlint.RFC5280, Citation: "none"},
		Lint:         func() zlint.CertificateLintInterface { return c },
	})
	return l, c.runs, c.fail
}

func leafAndIssuer(t *testing.T) (leaf, issuer *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	issuer = &x509.Certificate{PublicKey: key.Public(), SubjectKeyId: []byte("issuer"), NotAfter: now.Add(time.Hour)}
	issuer.Subject.CommonName = "issuer"
	leaf = &x509.Certificate{
		PublicKey: key.Public(), SerialNumber: big.NewInt(1 << 62), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Minute),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, MaxPathLen: -1, SubjectKeyId: []byte("leaf"), AuthorityKeyId: []byte("issuer"),
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/a"}},
	}
	return leaf, issuer
}

func TestOnceAShape(t *testing.T) {
	l, runs, _ := withCounting(t, 0, nil)
	leaf, issuer := leafAndIssuer(t)
	for i := range 5 {
		leaf.SerialNumber = big.NewInt(int64(i + 1)) // values are no part of a shape
		leaf.URIs[0].Path = "/" + strings.Repeat("a", i+1)
		if err := l.Lint(t.Context(), leaf, issuer, "workload"); err != nil {
			t.Fatal(err)
		}
	}
	if runs.Load() != 1 {
		t.Errorf("%d runs for one shape", runs.Load())
	}
	want := int32(1)
	for name, next := range map[string]func() string{
		"a DNS name": func() string { leaf.DNSNames = []string{"a"}; return "workload" },
		"another":    func() string { leaf.DNSNames = []string{"a", "b"}; return "workload" },
		"a profile":  func() string { return "agent" },
		"an issuer": func() string {
			issuer.SubjectKeyId, leaf.AuthorityKeyId = []byte("next"), []byte("next")
			return "workload"
		},
		"key agreement":  func() string { leaf.KeyUsage |= x509.KeyUsageKeyAgreement; return "workload" },
		"late in 2050":   func() string { leaf.NotAfter, issuer.NotAfter = late, late; return "workload" },
		"another's size": func() string { leaf.PublicKey = p384(t); return "workload" },
	} {
		profile := next()
		for range 2 {
			if err := l.Lint(t.Context(), leaf, issuer, profile); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if want++; runs.Load() != want {
			t.Errorf("%s: %d runs, want %d", name, runs.Load(), want)
		}
	}
}

var late = time.Date(2051, 1, 1, 0, 0, 0, 0, time.UTC)

func p384(t *testing.T) any {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key.Public()
}

func TestManyBringOneShape(t *testing.T) {
	hold := make(chan struct{})
	l, runs, _ := withCounting(t, 0, hold)
	leaf, issuer := leafAndIssuer(t)
	var wg sync.WaitGroup
	var passed atomic.Int32
	for range 20 {
		wg.Go(func() {
			if err := l.Lint(t.Context(), leaf, issuer, "workload"); err != nil {
				t.Error(err)
			}
			passed.Add(1)
		})
	}
	time.Sleep(20 * time.Millisecond)
	if passed.Load() != 0 {
		t.Error("someone passed before the shape was linted")
	}
	close(hold)
	wg.Wait()
	if runs.Load() != 1 {
		t.Errorf("%d runs", runs.Load())
	}
}

func TestWaiterMayLeave(t *testing.T) {
	hold := make(chan struct{})
	l, runs, _ := withCounting(t, 0, hold)
	leaf, issuer := leafAndIssuer(t)
	first := make(chan error)
	go func() { first <- l.Lint(t.Context(), leaf, issuer, "workload") }()
	for runs.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Lint(ctx, leaf, issuer, "workload"); !errors.Is(err, context.Canceled) {
		t.Errorf("one who left got %v", err)
	}
	close(hold)
	if err := <-first; err != nil {
		t.Error(err)
	}
}

func TestFailureIsNotRemembered(t *testing.T) {
	l, runs, fail := withCounting(t, 0, nil)
	leaf, issuer := leafAndIssuer(t)
	fail.Store(true)
	for range 2 {
		if err := l.Lint(t.Context(), leaf, issuer, "workload"); err == nil || !strings.Contains(err.Error(), "e_counting") {
			t.Errorf("got %v", err)
		}
	}
	fail.Store(false)
	if err := l.Lint(t.Context(), leaf, issuer, "workload"); err != nil {
		t.Error(err)
	}
	if runs.Load() != 3 {
		t.Errorf("%d runs", runs.Load())
	}
}

// A run that panicked refuses nobody who comes after it.
func TestPanicIsNotRemembered(t *testing.T) {
	l, runs, _ := withCounting(t, 0, nil)
	leaf, issuer := leafAndIssuer(t)
	whole := l.full
	l.full = nil
	func() {
		defer func() {
			if recover() == nil {
				t.Error("linting with nothing did not panic: this test tries nothing")
			}
		}()
		_ = l.Lint(t.Context(), leaf, issuer, "workload")
	}()
	l.full = whole
	if err := l.Lint(t.Context(), leaf, issuer, "workload"); err != nil {
		t.Errorf("after a panic: %v", err)
	}
	if runs.Load() != 1 {
		t.Errorf("%d runs: the shape must be linted before it passes", runs.Load())
	}
}

func TestCacheIsBounded(t *testing.T) {
	l, _, _ := withCounting(t, 3, nil)
	leaf, issuer := leafAndIssuer(t)
	for i := range 10 {
		leaf.DNSNames = append(leaf.DNSNames, strings.Repeat("a", i+1))
		if err := l.Lint(t.Context(), leaf, issuer, "workload"); err != nil {
			t.Fatal(err)
		}
		if len(l.shapes) > 3 {
			t.Fatalf("%d shapes are remembered", len(l.shapes))
		}
	}
}

// TestFullSetFindsFaults has zlint's own lints at work: what our rules would stop before is put to them directly.
func TestFullSetFindsFaults(t *testing.T) {
	full, err := newFullSet()
	if err != nil {
		t.Fatal(err)
	}
	if len(full.lints) < 100 {
		t.Errorf("only %d lints", len(full.lints))
	}
	for name, edit := range map[string]func(*x509.Certificate){
		"no authority key id": func(c *x509.Certificate) { c.AuthorityKeyId = nil },
		"a negative serial":   func(c *x509.Certificate) { c.SerialNumber = new(big.Int) },
		"keyCertSign":         func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
		"a DNS label of 64":   func(c *x509.Certificate) { c.DNSNames = []string{strings.Repeat("a", 64) + ".org"} },
	} {
		leaf, issuer := leafAndIssuer(t)
		if err := full.lint(leaf, issuer); err != nil {
			t.Fatalf("a good leaf: %v", err)
		}
		edit(leaf)
		if name == "no authority key id" {
			issuer.SubjectKeyId = nil
		}
		if err := full.lint(leaf, issuer); err == nil {
			t.Errorf("%s passes", name)
		}
	}
}
