package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	cryptobyteasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/meshca/meshca/api/refusal"
)

var (
	csrID    = spiffeid.RequireFromPath(testDomain, "/ns/shop/sa/cart")
	csrGrant = Grant{ID: csrID, DNSNames: []string{"cart.shop.svc", "cart"}}
)

func csrOf(t testing.TB, key crypto.Signer, edit ...func(*x509.CertificateRequest)) []byte {
	t.Helper()
	template := &x509.CertificateRequest{}
	for _, e := range edit {
		e(template)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// rawRequest is PKCS #10 as a stranger may build it by hand.
type rawRequest struct {
	TBS       asn1.RawValue
	Algorithm pkix.AlgorithmIdentifier
	Signature asn1.BitString
}

type rawTBS struct {
	Version    int
	Subject    asn1.RawValue
	Key        asn1.RawValue
	Attributes []asn1.RawValue `asn1:"tag:0"`
}

var (
	oidECDSAWithSHA1   = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1}
	oidECDSAWithSHA256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
	oidRSAWithMD5      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 4}
	oidRSAWithSHA1     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 5}
	oidRSAWithSHA256   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}
)

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	der, err := asn1.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// assemble builds a request around attributes, signed by sign.
func assemble(t testing.TB, pub crypto.PublicKey, attributes [][]byte, alg asn1.ObjectIdentifier, sign func(tbs []byte) []byte) []byte {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	tbs := rawTBS{Subject: asn1.RawValue{FullBytes: []byte{0x30, 0}}, Key: asn1.RawValue{FullBytes: spki}, Attributes: []asn1.RawValue{}}
	for _, a := range attributes {
		tbs.Attributes = append(tbs.Attributes, asn1.RawValue{FullBytes: a})
	}
	der := marshal(t, tbs)
	signature := sign(der)
	return marshal(t, rawRequest{
		TBS: asn1.RawValue{FullBytes: der}, Algorithm: pkix.AlgorithmIdentifier{Algorithm: alg},
		Signature: asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)},
	})
}

func withAttributes(t testing.TB, key crypto.Signer, attributes ...[]byte) []byte {
	t.Helper()
	return assemble(t, key.Public(), attributes, oidECDSAWithSHA256, func(tbs []byte) []byte {
		h := crypto.SHA256.New()
		h.Write(tbs)
		sig, err := key.Sign(rand.Reader, h.Sum(nil), crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		return sig
	})
}

// attributeOf is an attribute with one value.
func attributeOf(t testing.TB, oid asn1.ObjectIdentifier, value []byte) []byte {
	return marshal(t, struct {
		ID     asn1.ObjectIdentifier
		Values []asn1.RawValue `asn1:"set"`
	}{oid, []asn1.RawValue{{FullBytes: value}}})
}

// sanOf is an extension request for one alternative name of any kind.
func sanOf(t testing.TB, names ...asn1.RawValue) []byte {
	value := marshal(t, names)
	return attributeOf(t, oidExtensionRequest, marshal(t, []pkix.Extension{{Id: oidSubjectAltName, Value: value}}))
}

func TestParseCSRAccepts(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"P-256": newKey(t), "P-384": p384, "RSA-2048": rsa2048, "Ed25519": ed} {
		c, err := ParseCSR(csrOf(t, key))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !samePublicKey(c.PublicKey, key.Public()) {
			t.Errorf("%s: another key", name)
		}
		if err := c.WithinGrant(csrGrant); err != nil {
			t.Errorf("%s: an empty request asks for more: %v", name, err)
		}
	}
	pss := csrOf(t, rsa2048, func(r *x509.CertificateRequest) { r.SignatureAlgorithm = x509.SHA256WithRSAPSS })
	if _, err := ParseCSR(pss); err != nil {
		t.Errorf("PSS: %v", err)
	}
}

func TestParseCSRRefuses(t *testing.T) {
	key := newKey(t)
	good := csrOf(t, key)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa1024, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	huge := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 16383, 1), E: 65537}
	even := &rsa.PublicKey{N: new(big.Int).Lsh(rsa2048.N, 1), E: 65537}
	exponent := &rsa.PublicKey{N: rsa2048.N, E: 1<<40 + 1}
	nonsense := func([]byte) []byte { return make([]byte, 256) }
	sha1Signed := func(tbs []byte) []byte {
		sum := sha1.Sum(tbs)
		sig, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return sig
	}
	sha1RSA := func(tbs []byte) []byte {
		sum := sha1.Sum(tbs)
		sig, err := rsa.SignPKCS1v15(rand.Reader, rsa2048, crypto.SHA1, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return sig
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	otherKey := assemble(t, newKey(t).Public(), nil, oidECDSAWithSHA256, func(tbs []byte) []byte {
		h := crypto.SHA256.New()
		h.Write(tbs)
		sig, err := key.Sign(rand.Reader, h.Sum(nil), crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		return sig
	})
	for name, c := range map[string]struct {
		der  []byte
		want refusal.Reason
	}{
		"nothing":                  {nil, refusal.CSRMalformed},
		"PEM":                      {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good}), refusal.CSRMalformed},
		"a trailing byte":          {append(bytes.Clone(good), 0), refusal.CSRMalformed},
		"an element more inside":   {widened(t, good), refusal.CSRMalformed},
		"two requests":             {append(bytes.Clone(good), good...), refusal.CSRMalformed},
		"half a request":           {good[:len(good)/2], refusal.CSRMalformed},
		"deep nesting":             {nested(7000), refusal.CSRMalformed},
		"deep nesting, attributes": {withAttributes(t, key, nested(3000)), refusal.CSRMalformed},
		"over 16 KiB":              {make([]byte, MaxCSRSize+1), refusal.CSRTooLarge},
		"a good one with padding":  {append(bytes.Clone(good), make([]byte, MaxCSRSize)...), refusal.CSRTooLarge},
		"a spoiled signature":      {flipped, refusal.CSRSignature},
		"another's key":            {otherKey, refusal.CSRSignature},
		"ECDSA with SHA-1":         {assemble(t, key.Public(), nil, oidECDSAWithSHA1, sha1Signed), refusal.CSRSignature},
		"RSA with SHA-1":           {assemble(t, rsa2048.Public(), nil, oidRSAWithSHA1, sha1RSA), refusal.CSRSignature},
		"RSA with MD5":             {assemble(t, rsa2048.Public(), nil, oidRSAWithMD5, nonsense), refusal.CSRSignature},
		"unknown algorithm":        {assemble(t, key.Public(), nil, asn1.ObjectIdentifier{1, 2, 3}, nonsense), refusal.CSRSignature},
		"P-224":                    {csrOf(t, p224), refusal.CSRKey},
		"RSA-1024":                 {csrOf(t, rsa1024), refusal.CSRKey},
		"RSA-16k":                  {assemble(t, huge, nil, oidRSAWithSHA256, nonsense), refusal.CSRKey},
		"an even modulus":          {assemble(t, even, nil, oidRSAWithSHA256, nonsense), refusal.CSRKey},
		"a vast exponent":          {assemble(t, exponent, nil, oidRSAWithSHA256, nonsense), refusal.CSRKey},
		"two extension requests in one": {withAttributes(t, key, marshal(t, struct {
			ID     asn1.ObjectIdentifier
			Values []asn1.RawValue `asn1:"set"`
		}{oidExtensionRequest, []asn1.RawValue{{FullBytes: []byte{0x30, 0}}, {FullBytes: []byte{0x30, 0}}}})), refusal.CSRMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			got, err := ParseCSR(c.der)
			if got != nil {
				t.Error("a refused request came back")
			}
			wantReason(t, err, c.want)
			if took := time.Since(start); took > time.Second {
				t.Errorf("it cost %s", took)
			}
		})
	}
}

// nested is n SEQUENCEs in each other, in long form where they need it.
func nested(n int) []byte {
	var der []byte
	for range n {
		size := len(der)
		head := []byte{0x30, 0x83, byte(size >> 16), byte(size >> 8), byte(size)}
		switch {
		case size < 0x80:
			head = []byte{0x30, byte(size)}
		case size < 0x100:
			head = []byte{0x30, 0x81, byte(size)}
		case size < 0x10000:
			head = []byte{0x30, 0x82, byte(size >> 8), byte(size)}
		}
		if der = append(head, der...); len(der) > MaxCSRSize-8 {
			return der[:MaxCSRSize-8]
		}
	}
	return der
}

func TestWithinGrant(t *testing.T) {
	key := newKey(t)
	extra := func(oid asn1.ObjectIdentifier, value []byte) func(*x509.CertificateRequest) {
		return func(r *x509.CertificateRequest) {
			r.ExtraExtensions = append(r.ExtraExtensions, pkix.Extension{Id: oid, Value: value})
		}
	}
	uri := func(s string) func(*x509.CertificateRequest) {
		return func(r *x509.CertificateRequest) {
			u, err := url.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			r.URIs = append(r.URIs, u)
		}
	}
	dns := func(s string) func(*x509.CertificateRequest) {
		return func(r *x509.CertificateRequest) { r.DNSNames = append(r.DNSNames, s) }
	}
	name := func(class, tag int, constructed bool, value string) asn1.RawValue {
		return asn1.RawValue{Class: class, Tag: tag, IsCompound: constructed, Bytes: []byte(value)}
	}
	for what, c := range map[string]struct {
		der    []byte
		within bool
	}{
		"nothing":                 {csrOf(t, key), true},
		"the granted URI":         {csrOf(t, key, uri(csrID.String())), true},
		"granted names":           {csrOf(t, key, uri(csrID.String()), dns("cart"), dns("cart.shop.svc")), true},
		"one granted DNS name":    {csrOf(t, key, dns("cart")), true},
		"another's URI":           {csrOf(t, key, uri("spiffe://example.org/ns/shop/sa/pay")), false},
		"the trust domain's URI":  {csrOf(t, key, uri("spiffe://example.org")), false},
		"a second URI":            {csrOf(t, key, uri(csrID.String()), uri("spiffe://example.org/x")), false},
		"the URI in upper case":   {csrOf(t, key, uri("spiffe://EXAMPLE.org/ns/shop/sa/cart")), false},
		"the URI and a slash":     {csrOf(t, key, uri(csrID.String()+"/")), false},
		"another DNS name":        {csrOf(t, key, dns("pay.shop.svc")), false},
		"a DNS name too many":     {csrOf(t, key, dns("cart"), dns("pay")), false},
		"a wildcard":              {csrOf(t, key, dns("*.shop.svc")), false},
		"the empty DNS name":      {withAttributes(t, key, sanOf(t, name(2, 2, false, ""))), false},
		"an IP":                   {csrOf(t, key, func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{{10, 0, 0, 1}} }), false},
		"an e-mail":               {csrOf(t, key, func(r *x509.CertificateRequest) { r.EmailAddresses = []string{"a@b.c"} }), false},
		"otherName":               {withAttributes(t, key, sanOf(t, name(2, 0, true, "\x06\x03\x2a\x03\x04"))), false},
		"directoryName":           {withAttributes(t, key, sanOf(t, name(2, 4, true, "\x30\x00"))), false},
		"registeredID":            {withAttributes(t, key, sanOf(t, name(2, 8, false, "\x2a\x03\x04"))), false},
		"a CN":                    {csrOf(t, key, func(r *x509.CertificateRequest) { r.Subject.CommonName = "cart" }), false},
		"an organisation":         {csrOf(t, key, func(r *x509.CertificateRequest) { r.Subject.Organization = []string{"x"} }), false},
		"CA:TRUE":                 {csrOf(t, key, extra(asn1.ObjectIdentifier{2, 5, 29, 19}, []byte{0x30, 3, 1, 1, 0xff})), false},
		"keyCertSign":             {csrOf(t, key, extra(asn1.ObjectIdentifier{2, 5, 29, 15}, []byte{3, 2, 2, 4})), false},
		"digitalSignature":        {csrOf(t, key, extra(asn1.ObjectIdentifier{2, 5, 29, 15}, []byte{3, 2, 7, 0x80})), false},
		"an unknown extension":    {csrOf(t, key, extra(asn1.ObjectIdentifier{1, 2, 3, 4}, []byte{5, 0})), false},
		"a challenge password":    {withAttributes(t, key, attributeOf(t, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}, []byte{0x0c, 1, 'x'})), false},
		"granted, then CA:TRUE":   {csrOf(t, key, uri(csrID.String()), extra(asn1.ObjectIdentifier{2, 5, 29, 19}, []byte{0x30, 3, 1, 1, 0xff})), false},
		"a second SAN, in second": {withAttributes(t, key, sanOf(t, name(2, 6, false, csrID.String())), sanOf(t, name(2, 2, false, "pay"))), false},
	} {
		t.Run(what, func(t *testing.T) {
			csr, err := ParseCSR(c.der)
			if err != nil {
				// The parser may refuse outright what could not be granted anyway.
				if c.within || refusal.Of(err) != refusal.CSRMalformed {
					t.Fatal(err)
				}
				return
			}
			err = csr.WithinGrant(csrGrant)
			if c.within {
				if err != nil {
					t.Errorf("refused: %v", err)
				}
				return
			}
			wantReason(t, err, refusal.CSRAsksMore)
			if len(err.Error()) > 1000 {
				t.Errorf("the refusal repeats %d bytes", len(err.Error()))
			}
		})
	}
}

func TestRefusalOfALongNameIsShort(t *testing.T) {
	key := newKey(t)
	csr, err := ParseCSR(withAttributes(t, key, sanOf(t, asn1.RawValue{Class: 2, Tag: 2, Bytes: []byte(strings.Repeat("a", 10000))})))
	if err != nil {
		t.Fatalf("the parser refuses it outright, so nothing is tried here: %v", err)
	}
	if err := csr.WithinGrant(csrGrant); err == nil || len(err.Error()) > 600 {
		t.Errorf("the refusal has %d bytes", len(err.Error()))
	}
}

// widened puts one element more into the outer sequence, which encoding/asn1 passes over.
func widened(t *testing.T, der []byte) []byte {
	t.Helper()
	outer := cryptobyte.String(der)
	var body cryptobyte.String
	if !outer.ReadASN1(&body, cryptobyteasn1.SEQUENCE) {
		t.Fatal("the request is no sequence")
	}
	var b cryptobyte.Builder
	b.AddASN1(cryptobyteasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(body)
		b.AddASN1OctetString([]byte("more"))
	})
	return b.BytesOrPanic()
}
