package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"net/url"
	"testing"

	"github.com/meshca/meshca/api/refusal"
)

// FuzzParseCSR: whatever a stranger sends, there is no panic, and what is within a grant holds nothing else.
func FuzzParseCSR(f *testing.F) {
	key := newKey(f)
	f.Add(csrOf(f, key))
	f.Add(csrOf(f, key, func(r *x509.CertificateRequest) { r.URIs = []*url.URL{csrID.URL()} }))
	f.Add(csrOf(f, key, func(r *x509.CertificateRequest) { r.DNSNames = []string{"cart"}; r.Subject.CommonName = "x" }))
	f.Add(withAttributes(f, key, attributeOf(f, asn1.ObjectIdentifier{1, 2, 3}, []byte{5, 0})))
	f.Add(withAttributes(f, key, sanOf(f, asn1.RawValue{Class: 2, Tag: 8, Bytes: []byte{0x2a, 3}})))
	f.Add(nested(100))
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, der []byte) {
		csr, err := ParseCSR(der)
		if err != nil {
			if csr != nil || !refusal.Of(err).Known() || refusal.Of(err) == refusal.Internal {
				t.Fatalf("%v, %v", csr, err)
			}
			return
		}
		if CheckKey(csr.PublicKey) != nil {
			t.Fatal("a key that no leaf may have")
		}
		if csr.WithinGrant(csrGrant) != nil {
			return
		}
		// An independent reading of what passed.
		req, err := x509.ParseCertificateRequest(der)
		if err != nil || req.CheckSignature() != nil {
			t.Fatal("accepted what crypto/x509 does not")
		}
		for _, u := range req.URIs {
			if u.String() != csrID.String() {
				t.Fatalf("URI %s", u)
			}
		}
		if req.Subject.String() != "" || len(req.IPAddresses)+len(req.EmailAddresses) > 0 {
			t.Fatal("other names")
		}
		for _, e := range req.Extensions {
			if !e.Id.Equal(oidSubjectAltName) {
				t.Fatalf("extension %s", e.Id)
			}
		}
	})
}

// FuzzCSRAttributes fuzzes what lies behind the signature check.
func FuzzCSRAttributes(f *testing.F) {
	f.Add(sanOf(f, asn1.RawValue{Class: 2, Tag: 6, Bytes: []byte(csrID.String())}))
	f.Add(attributeOf(f, oidExtensionRequest, []byte{0x30, 0}))
	f.Add(nested(50))
	spki, err := x509.MarshalPKIXPublicKey(newKey(f).Public())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, attribute []byte) {
		tbs, err := asn1.Marshal(rawTBS{
			Subject: asn1.RawValue{FullBytes: []byte{0x30, 0}}, Key: asn1.RawValue{FullBytes: spki},
			Attributes: []asn1.RawValue{{FullBytes: attribute}},
		})
		if err != nil {
			return
		}
		var c CSR
		if err := c.readAttributes(tbs); err == nil && len(attribute) > 0 && c.WithinGrant(csrGrant) == nil {
			// Then it is an extension request that holds granted names or nothing.
			if !bytes.Contains(attribute, marshal(t, oidExtensionRequest)) {
				t.Fatalf("passed: %x", attribute)
			}
		}
	})
}
