package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestJudgeLeaf breaks one rule at a time.
func TestJudgeLeaf(t *testing.T) {
	now := time.Now()
	uri := func(s string) []*url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return []*url.URL{u}
	}
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		damage func(*x509.Certificate)
		want   string
	}{
		"good":           {func(*x509.Certificate) {}, ""},
		"no URI":         {func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"a"} }, "error SPIFFE ID: there is no URI SAN (X509-SVID §2)"},
		"two URIs":       {func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }, "error SPIFFE ID: its URI SAN is no SPIFFE ID: it has 2 URI SANs (X509-SVID §2)"},
		"no SPIFFE ID":   {func(c *x509.Certificate) { c.URIs = uri("https://mesh.example/a") }, "error SPIFFE ID: its URI SAN is no SPIFFE ID: scheme is missing or invalid (X509-SVID §2)"},
		"no path":        {func(c *x509.Certificate) { c.URIs = uri("spiffe://mesh.example") }, "error SPIFFE ID: the ID of a leaf has a path, spiffe://mesh.example has none (X509-SVID §3.1)"},
		"CA":             {func(c *x509.Certificate) { c.IsCA = true }, "error basic constraints: a leaf must not be a CA (X509-SVID §4.1)"},
		"no signatures":  {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }, "error key usage: digitalSignature is not set (X509-SVID §4.3)"},
		"signs certs":    {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }, "error key usage: keyCertSign or cRLSign is set (X509-SVID §4.3)"},
		"server only":    {func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, "error extended key usage: serverAuth and clientAuth are not both there (X509-SVID §4.4)"},
		"no EKU":         {func(c *x509.Certificate) { c.ExtKeyUsage = nil }, "warning extended key usage: there is none (X509-SVID §4.4)"},
		"long life":      {func(c *x509.Certificate) { c.NotAfter = now.Add(72*time.Hour - time.Minute) }, "warning life: it is made to last 3d"},
		"ended":          {func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) }, "error validity: the leaf ended 1s ago"},
		"not yet valid":  {func(c *x509.Certificate) { c.NotBefore = now.Add(time.Hour) }, "error validity: the leaf is valid only in 1h"},
		"lax subject":    {func(c *x509.Certificate) { c.ExtraExtensions = lax(t, 17, []byte{0x30, 0x03, 0x86, 0x01, 'x'}) }, "error subject: the subject is empty and the SAN extension is not critical (X509-SVID §3.1, RFC 5280 §4.1.2.6)"},
		"lax key usage":  {func(c *x509.Certificate) { c.ExtraExtensions = lax(t, 15, []byte{0x03, 0x02, 0x07, 0x80}) }, "error key usage: the extension is not critical (X509-SVID §4.3)"},
		"subject is set": {func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: "x"} }, ""},
		"weak RSA":       {func(c *x509.Certificate) { c.PublicKey = weak.Public() }, "error key: RSA of 1024 bits can be broken"},
	} {
		t.Run(name, func(t *testing.T) {
			f := &facts{start: now}
			template := f.leaf(6 * time.Hour)
			template.NotBefore, template.NotAfter = now.Add(-time.Minute), now.Add(6*time.Hour)
			c.damage(template)
			cert := sign(t, template)
			var got []string
			for _, f := range judgeLeaf(cert, now.Truncate(time.Second)) {
				got = append(got, f.Level+" "+f.Subject+": "+f.Detail)
				if f.Hint == "" {
					t.Errorf("%s has no hint", f.Detail)
				}
			}
			if c.want == "" && len(got) > 0 || c.want != "" && !slices.Contains(got, c.want) {
				t.Errorf("got  %s\nwant %s", strings.Join(got, "\n     "), c.want)
			}
		})
	}
}

// lax is an extension that is not critical though it should be.
func lax(t *testing.T, number int, value []byte) []pkix.Extension {
	t.Helper()
	return []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, number}, Value: value}}
}

func sign(t *testing.T, template *x509.Certificate) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(7)
	pub := template.PublicKey
	if pub == nil {
		pub = key.Public()
	}
	parent := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "issuer"}}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// FuzzInspect feeds what a server or a file may show; whatever it is, it is shown without a fault.
func FuzzInspect(f *testing.F) {
	world, err := newFacts()
	if err != nil {
		f.Fatal(err)
	}
	for _, data := range world.files() {
		f.Add(data)
	}
	c := &cli{now: time.Now}
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := readCertificates(data)
		if err != nil {
			return
		}
		x := c.examine("fuzz", s.chain, world.bundle.X509Authorities())
		if s.key != nil {
			x.add(keyFinding(s.chain[0], s.key))
		}
		if _, err := encode(x); err != nil {
			t.Fatal(err)
		}
		p := &page{now: time.Now()}
		drawInspection(p, x)
		if strings.ContainsAny(string(p.bytes()), "\x00\x1b\u009b") {
			t.Fatalf("control characters in %q", p.bytes())
		}
		if x.OK && x.Chain[0].SPIFFEID == "" {
			t.Fatalf("found nothing wrong with %+v", x.Chain[0])
		}
	})
}
