package ca

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"
)

// TestCompareCatchesEachField signs what differs from the template in one field, as a wrong signer would, over a digest
// that was recorded: the fields alone have to tell.
func TestCompareCatchesEachField(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	s := h.line.current.Load()
	r := workloadRequest(t, "cart.shop.svc")
	p := h.issuer.profiles[ProfileWorkload]
	want, err := p.template(r, s, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	other := newKey(t)
	otherIssuer := *s.Certificate()
	otherIssuer.RawSubject = nil
	otherIssuer.Subject = pkix.Name{CommonName: "someone"}
	otherKeyID := *s.Certificate()
	otherKeyID.SubjectKeyId = make([]byte, 20)

	policy, err := x509.OIDFromInts([]uint64{1, 2, 3})
	if err != nil {
		t.Fatal(err)
	}

	type made struct {
		template x509.Certificate
		parent   *x509.Certificate
		pub      any
	}
	cases := map[string]struct {
		edit func(*made)
		says string
	}{
		"nothing":          {func(*made) {}, ""},
		"serial":           {func(m *made) { m.template.SerialNumber = big.NewInt(7) }, "serial"},
		"issuer":           {func(m *made) { m.parent = &otherIssuer }, "issuer"},
		"authority key id": {func(m *made) { m.parent = &otherKeyID }, "authority key id"},
		"notBefore":        {func(m *made) { m.template.NotBefore = m.template.NotBefore.Add(-time.Second) }, "notBefore"},
		"notAfter":         {func(m *made) { m.template.NotAfter = m.template.NotAfter.Add(time.Second) }, "notAfter"},
		"subject":          {func(m *made) { m.template.Subject.CommonName = "cart" }, "subject"},
		"public key":       {func(m *made) { m.pub = other.Public() }, "public key"},
		"keyCertSign":      {func(m *made) { m.template.KeyUsage |= x509.KeyUsageCertSign }, "key usage"},
		"no key usage":     {func(m *made) { m.template.KeyUsage = 0 }, "key usage"},
		"code signing": {func(m *made) {
			m.template.ExtKeyUsage = append([]x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}, m.template.ExtKeyUsage...)
		}, "extended key usage"},
		"no serverAuth":        {func(m *made) { m.template.ExtKeyUsage = m.template.ExtKeyUsage[1:] }, "extended key usage"},
		"unknown usage":        {func(m *made) { m.template.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 2, 3}} }, "extended key usage"},
		"CA":                   {func(m *made) { m.template.IsCA = true }, "basic constraints"},
		"no basic constraints": {func(m *made) { m.template.BasicConstraintsValid = false }, "basic constraints"},
		"subject key id":       {func(m *made) { m.template.SubjectKeyId = make([]byte, 20) }, "subject key id"},
		"no subject key id":    {func(m *made) { m.template.SubjectKeyId = nil }, "subject key id"},
		"other URI": {func(m *made) {
			m.template.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/ns/shop/sa/pay"}}
		}, "URI"},
		"second URI": {func(m *made) { m.template.URIs = append(m.template.URIs[:1:1], &url.URL{Scheme: "spiffe", Host: "x"}) }, "URI"},
		"no URI":     {func(m *made) { m.template.URIs = nil }, "URI"},
		"other DNS":  {func(m *made) { m.template.DNSNames = []string{"pay.shop.svc"} }, "DNS"},
		"second DNS": {func(m *made) { m.template.DNSNames = append(m.template.DNSNames[:1:1], "pay.shop.svc") }, "DNS"},
		"no DNS":     {func(m *made) { m.template.DNSNames = nil }, "DNS"},
		"IP":         {func(m *made) { m.template.IPAddresses = []net.IP{{10, 0, 0, 1}} }, "SANs"},
		"e-mail":     {func(m *made) { m.template.EmailAddresses = []string{"a@example.org"} }, "SANs"},
		"policy":     {func(m *made) { m.template.Policies = []x509.OID{policy} }, "extensions"},
		"AIA":        {func(m *made) { m.template.OCSPServer = []string{"http://x"} }, "extensions"},
		"CRL":        {func(m *made) { m.template.CRLDistributionPoints = []string{"http://x"} }, "extensions"},
		"own extension": {func(m *made) {
			m.template.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: []byte{5, 0}}}
		}, "extensions"},
		"critical extension": {func(m *made) {
			m.template.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}, "critical"},
		"key usage uncritical": {func(m *made) {
			m.template.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Value: []byte{3, 2, 7, 0x80}}}
		}, "criticality"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			m := made{*want, s.Certificate(), want.PublicKey}
			c.edit(&m)
			parent := *m.parent
			der, err := x509.CreateCertificate(rand.Reader, &m.template, &parent, m.pub, s.key)
			if err != nil {
				t.Fatal(err)
			}
			got, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			err = compare(got, want, s, sha256.Sum256(got.RawTBSCertificate))
			switch {
			case c.says == "" && err != nil:
				t.Errorf("what was asked for differs: %v", err)
			case c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)):
				t.Errorf("got %v, want a word on %q", err, c.says)
			}
			if err := compare(got, want, s, sha256.Sum256([]byte("another"))); err == nil || !strings.Contains(err.Error(), "digest") {
				t.Errorf("another digest was recorded: %v", err)
			}
		})
	}
	if compare(nil, want, s, [32]byte{}) == nil {
		t.Error("no certificate at all passes")
	}
}
