package lint_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/lint"
)

func newKey(t testing.TB, c elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// intermediate makes an issuer's certificate.
func intermediate(t testing.TB) *x509.Certificate {
	t.Helper()
	key := newKey(t, elliptic.P256())
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "meshca intermediate"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(72 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// template is a leaf as the CA makes them.
func template(t testing.TB, issuer *x509.Certificate) *x509.Certificate {
	t.Helper()
	now := time.Now().UTC().Truncate(time.Second)
	return &x509.Certificate{
		PublicKey: newKey(t, elliptic.P256()).Public(), SerialNumber: new(big.Int).Lsh(big.NewInt(0x7f), 120),
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(6 * time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, MaxPathLen: -1,
		SubjectKeyId: []byte("01234567890123456789"), AuthorityKeyId: issuer.SubjectKeyId,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/ns/shop/sa/cart"}},
	}
}

func TestWhatTheCAMakesPasses(t *testing.T) {
	l, err := lint.New(lint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	issuer := intermediate(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*x509.Certificate){
		"P-256": func(*x509.Certificate) {},
		"P-384": func(c *x509.Certificate) { c.PublicKey = newKey(t, elliptic.P384()).Public() },
		"RSA": func(c *x509.Certificate) {
			c.PublicKey = rsaKey.Public()
			c.KeyUsage |= x509.KeyUsageKeyEncipherment
		},
		"DNS names": func(c *x509.Certificate) { c.DNSNames = []string{"cart.shop.svc.cluster.local", "cart"} },
		"late":      func(c *x509.Certificate) { c.NotAfter = issuer.NotAfter },
	} {
		c := template(t, issuer)
		edit(c)
		if err := l.Lint(t.Context(), c, issuer, "workload"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Each size is a shape, and shapes are remembered up to a number.
func TestRSASizes(t *testing.T) {
	issuer := intermediate(t)
	c := template(t, issuer)
	accepted := map[int]bool{}
	for bits := 1024; bits <= 8192; bits++ {
		c.PublicKey = &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), bits-1, 1), E: 65537}
		for _, rule := range lint.Rules() {
			if rule.Name == "subject_public_key" && rule.Check(c, issuer) == nil {
				accepted[bits] = true
			}
		}
	}
	if len(accepted) != 3 || !accepted[2048] || !accepted[3072] || !accepted[4096] {
		t.Errorf("%d sizes pass", len(accepted))
	}
}

// TestEachRule breaks one rule at a time, and wants that rule to say so: no rule stands idle.
func TestEachRule(t *testing.T) {
	issuer := intermediate(t)
	broken := map[string]func(*x509.Certificate){
		"spiffe_one_uri_san":             func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) },
		"spiffe_id_valid":                func(c *x509.Certificate) { c.URIs[0].Scheme = "https" },
		"spiffe_leaf_id_has_path":        func(c *x509.Certificate) { c.URIs[0].Path = "" },
		"spiffe_same_trust_domain":       func(c *x509.Certificate) { c.URIs[0].Host = "other.org" },
		"spiffe_leaf_is_no_ca":           func(c *x509.Certificate) { c.IsCA = true },
		"spiffe_leaf_key_usage":          func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
		"spiffe_leaf_extended_key_usage": func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] },
		"spiffe_no_other_sans":           func(c *x509.Certificate) { c.IPAddresses = []net.IP{{10, 0, 0, 1}} },
		"dns_names_valid":                func(c *x509.Certificate) { c.DNSNames = []string{"CART"} },
		"subject_empty":                  func(c *x509.Certificate) { c.Subject.CommonName = "cart" },
		"serial_number":                  func(c *x509.Certificate) { c.SerialNumber = big.NewInt(0) },
		"validity_order":                 func(c *x509.Certificate) { c.NotBefore = c.NotAfter },
		"validity_within_issuer":         func(c *x509.Certificate) { c.NotAfter = issuer.NotAfter.Add(time.Second) },
		"subject_public_key":             func(c *x509.Certificate) { c.PublicKey = newKey(t, elliptic.P224()).Public() },
		"subject_key_id":                 func(c *x509.Certificate) { c.SubjectKeyId = issuer.SubjectKeyId },
		"authority_key_id":               func(c *x509.Certificate) { c.AuthorityKeyId = nil },
		"no_extra_extensions":            func(c *x509.Certificate) { c.OCSPServer = []string{"http://x"} },
	}
	l, err := lint.New(lint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range lint.Rules() {
		edit, ok := broken[r.Name]
		if !ok {
			t.Errorf("%s is not tested", r.Name)
			continue
		}
		if r.Citation == "" {
			t.Errorf("%s cites nothing", r.Name)
		}
		c := template(t, issuer)
		if err := r.Check(c, issuer); err != nil {
			t.Errorf("%s: refuses a good template: %v", r.Name, err)
		}
		edit(c)
		if err := r.Check(c, issuer); err == nil {
			t.Errorf("%s: passes what breaks it", r.Name)
		}
		if err := l.Lint(t.Context(), c, issuer, "workload"); err == nil || !strings.HasPrefix(err.Error(), r.Name+" (") {
			t.Errorf("%s: Lint says %v", r.Name, err)
		}
	}
}

func TestMoreBrokenTemplates(t *testing.T) {
	issuer := intermediate(t)
	l, err := lint.New(lint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*x509.Certificate){
		"no URI": func(c *x509.Certificate) { c.URIs = nil },
		"an ID of 2049 bytes": func(c *x509.Certificate) {
			c.URIs[0].Path = "/" + strings.Repeat("a", 2048-len("spiffe://example.org"))
		},
		"an ID with a query":   func(c *x509.Certificate) { c.URIs[0].RawQuery = "a=b" },
		"an ID with dots":      func(c *x509.Certificate) { c.URIs[0].Path = "/a/../b" },
		"no digitalSignature":  func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment },
		"no basic constraints": func(c *x509.Certificate) { c.BasicConstraintsValid = false },
		"the same DNS twice":   func(c *x509.Certificate) { c.DNSNames = []string{"a", "a"} },
		"a DNS label of 64":    func(c *x509.Certificate) { c.DNSNames = []string{strings.Repeat("a", 64)} },
		"a trailing dot":       func(c *x509.Certificate) { c.DNSNames = []string{"a."} },
		"a serial of 160 bits": func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 159) },
		"a negative serial":    func(c *x509.Certificate) { c.SerialNumber = big.NewInt(-1) },
		"no subject key id":    func(c *x509.Certificate) { c.SubjectKeyId = nil },
		"any purpose":          func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage[:2:2], x509.ExtKeyUsageAny) },
	} {
		c := template(t, issuer)
		edit(c)
		if err := l.Lint(t.Context(), c, issuer, "workload"); err == nil {
			t.Errorf("%s passes", name)
		}
	}
}

func TestManyShapesAtOnce(t *testing.T) {
	issuer := intermediate(t)
	l, err := lint.New(lint.Options{MaxShapes: 2})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 24 {
		wg.Go(func() {
			c := template(t, issuer)
			for n := range i % 6 {
				c.DNSNames = append(c.DNSNames, fmt.Sprintf("n%d", n))
			}
			if err := l.Lint(t.Context(), c, issuer, "workload"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func BenchmarkKnownShape(b *testing.B) {
	issuer := intermediate(b)
	l, err := lint.New(lint.Options{})
	if err != nil {
		b.Fatal(err)
	}
	c := template(b, issuer)
	b.ReportAllocs()
	for b.Loop() {
		if err := l.Lint(b.Context(), c, issuer, "workload"); err != nil {
			b.Fatal(err)
		}
	}
}
