package ca

import (
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"slices"

	"golang.org/x/crypto/cryptobyte"
	cryptobyteasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/meshca/meshca/api/refusal"
)

// MaxCSRSize bounds a certificate signing request, in bytes.
const MaxCSRSize = 16 << 10

// CSR is a request that was checked: its key is one that a leaf may have, and who made it holds the private key. What
// it asks for is known and not yet allowed: see WithinGrant.
type CSR struct {
	PublicKey crypto.PublicKey

	subject    bool     // it has a subject that is not empty
	uris, dns  []string // SANs, as they came
	otherNames bool     // SANs of other kinds
	asksMore   string   // what it holds besides SANs; empty: nothing
}

// ParseCSR reads what a stranger sent: one PKCS #10 request (RFC 2986) in DER, of at most MaxCSRSize, nothing behind
// it. The order of the checks is that of their price: the size before any parsing, the kind and size of the key before
// any arithmetic with it. Refusals: CSR_TOO_LARGE, CSR_MALFORMED, CSR_KEY, CSR_SIGNATURE.
func ParseCSR(der []byte) (*CSR, error) {
	// 1. Its size.
	if len(der) > MaxCSRSize {
		return nil, refusal.New(refusal.CSRTooLarge, "the request has %d bytes, and at most %d are read", len(der), MaxCSRSize)
	}
	// 2. Its form. The parser's own words are left out: they may repeat what was sent.
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, refusal.New(refusal.CSRMalformed, "the request is not one DER-encoded PKCS #10 request")
	}
	if !exactly(der, req) {
		return nil, refusal.New(refusal.CSRMalformed, "the request holds more than a PKCS #10 request has")
	}
	// 3. Its key, before it is used.
	if err := CheckKey(req.PublicKey); err != nil {
		return nil, err
	}
	// 4. Its signature: the proof that the sender holds the key.
	if !acceptedSignature(req.SignatureAlgorithm) {
		return nil, refusal.New(refusal.CSRSignature, "the request is signed with %s, which is not accepted", req.SignatureAlgorithm)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, refusal.New(refusal.CSRSignature, "the request's signature does not verify under the key that it holds")
	}
	// 5. What it asks for.
	c := &CSR{PublicKey: req.PublicKey, subject: !isEmptySequence(req.RawSubject)}
	if err := c.readAttributes(req.RawTBSCertificateRequest); err != nil {
		return nil, err
	}
	return c, nil
}

// exactly reports whether the outer sequence holds the three elements of RFC 2986 §4.2 and nothing behind them, which
// encoding/asn1 passes over.
func exactly(der []byte, req *x509.CertificateRequest) bool {
	outer := cryptobyte.String(der)
	var body, algorithm cryptobyte.String
	var info cryptobyte.String
	var signature asn1.BitString
	return outer.ReadASN1(&body, cryptobyteasn1.SEQUENCE) && outer.Empty() &&
		body.ReadASN1Element(&info, cryptobyteasn1.SEQUENCE) && len(info) == len(req.RawTBSCertificateRequest) &&
		body.ReadASN1(&algorithm, cryptobyteasn1.SEQUENCE) && body.ReadASN1BitString(&signature) && body.Empty()
}

// acceptedSignature is a closed list; crypto/x509 itself would still take SHA-1 from a request.
func acceptedSignature(a x509.SignatureAlgorithm) bool {
	switch a {
	case x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
		x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
		x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
		x509.PureEd25519:
		return true
	}
	return false
}

// WithinGrant says whether the request asks for nothing beyond the grant. It may repeat granted URIs and DNS names, in
// whole or in part; any other name, a subject, and any other extension or attribute are refused with CSR_ASKS_MORE.
// The names refused are not repeated in full in the refusal: a stranger chose them.
func (c *CSR) WithinGrant(g Grant) error {
	switch {
	case c.subject:
		return refusal.New(refusal.CSRAsksMore, "the request has a subject, and none is granted").On("subject")
	case c.otherNames:
		return refusal.New(refusal.CSRAsksMore, "the request asks for an alternative name that is neither a URI nor a DNS name").On("subjectAltName")
	case c.asksMore != "":
		return refusal.New(refusal.CSRAsksMore, "the request asks for %s, which is not granted", c.asksMore).On("attributes")
	}
	for _, u := range c.uris {
		if u != g.ID.String() {
			return refusal.New(refusal.CSRAsksMore, "the request asks for the URI %.200q, and %s is granted", u, g.ID).On("subjectAltName")
		}
	}
	for _, n := range c.dns {
		if !slices.Contains(g.DNSNames, n) {
			return refusal.New(refusal.CSRAsksMore, "the request asks for the DNS name %.200q, which is not granted", n).On("subjectAltName")
		}
	}
	return nil
}

var (
	oidExtensionRequest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14} // RFC 2985 §5.4.2
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// certificationRequestInfo is RFC 2986 §4.1. crypto/x509 drops the attributes that it does not know, so they are read
// here.
type certificationRequestInfo struct {
	Version    int
	Subject    asn1.RawValue
	PublicKey  asn1.RawValue
	Attributes []asn1.RawValue `asn1:"tag:0"`
}

type attribute struct {
	ID     asn1.ObjectIdentifier
	Values []asn1.RawValue `asn1:"set"`
}

type extension struct {
	ID       asn1.ObjectIdentifier
	Critical bool `asn1:"optional"`
	Value    []byte
}

// readAttributes notes every attribute and extension that the request holds. Nothing here recurses: nested values stay
// unread.
func (c *CSR) readAttributes(tbs []byte) error {
	var info certificationRequestInfo
	if rest, err := asn1.Unmarshal(tbs, &info); err != nil || len(rest) > 0 {
		return malformedAttributes()
	}
	for _, raw := range info.Attributes {
		var a attribute
		if rest, err := asn1.Unmarshal(raw.FullBytes, &a); err != nil || len(rest) > 0 {
			return malformedAttributes()
		}
		if !a.ID.Equal(oidExtensionRequest) {
			c.asksMore = "the attribute " + a.ID.String()
			continue
		}
		// RFC 2985 §5.4.2: a single value, a sequence of extensions.
		if len(a.Values) != 1 {
			return malformedAttributes()
		}
		var extensions []extension
		if rest, err := asn1.Unmarshal(a.Values[0].FullBytes, &extensions); err != nil || len(rest) > 0 {
			return malformedAttributes()
		}
		for _, e := range extensions {
			if !e.ID.Equal(oidSubjectAltName) {
				c.asksMore = "the extension " + e.ID.String()
				continue
			}
			if err := c.readNames(e.Value); err != nil {
				return err
			}
		}
	}
	return nil
}

// Tags of GeneralName (RFC 5280 §4.2.1.6).
const (
	tagDNSName = 2
	tagURI     = 6
)

func (c *CSR) readNames(value []byte) error {
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(value, &names); err != nil || len(rest) > 0 {
		return malformedAttributes()
	}
	for _, n := range names {
		switch {
		case n.Class != asn1.ClassContextSpecific || n.IsCompound:
			c.otherNames = true
		case n.Tag == tagURI:
			c.uris = append(c.uris, string(n.Bytes))
		case n.Tag == tagDNSName:
			c.dns = append(c.dns, string(n.Bytes))
		default:
			c.otherNames = true
		}
	}
	return nil
}

func malformedAttributes() error {
	return refusal.New(refusal.CSRMalformed, "the request's attributes cannot be read")
}
