package ca

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"slices"
)

// compare says whether got is what want asked for, and nothing more, issued by s, over the digest that was recorded.
// The error names the field and never its content. crypto/x509 has verified the signature when it was made
// (x509.CreateCertificate does), so that is not done twice.
func compare(got, want *x509.Certificate, s *Signer, recorded [sha256.Size]byte) error {
	issuer := s.Certificate()
	switch {
	case got == nil:
		return errors.New("no certificate")
	case sha256.Sum256(got.RawTBSCertificate) != recorded:
		return differs("TBSCertificate's digest")
	case got.Version != 3:
		return differs("version")
	case got.SerialNumber == nil || got.SerialNumber.Cmp(want.SerialNumber) != 0:
		return differs("serial number")
	case got.SignatureAlgorithm != want.SignatureAlgorithm:
		return differs("signature algorithm")
	case !bytes.Equal(got.RawIssuer, issuer.RawSubject):
		return differs("issuer")
	case !got.NotBefore.Equal(want.NotBefore):
		return differs("notBefore")
	case !got.NotAfter.Equal(want.NotAfter):
		return differs("notAfter")
	case !isEmptySequence(got.RawSubject):
		return differs("subject")
	case !samePublicKey(got.PublicKey, want.PublicKey):
		return differs("public key")
	case got.KeyUsage != want.KeyUsage:
		return differs("key usage")
	case !slices.Equal(got.ExtKeyUsage, want.ExtKeyUsage) || len(got.UnknownExtKeyUsage) > 0:
		return differs("extended key usage")
	case !got.BasicConstraintsValid || got.IsCA || got.MaxPathLen != -1:
		return differs("basic constraints")
	case !bytes.Equal(got.SubjectKeyId, want.SubjectKeyId):
		return differs("subject key id")
	case !bytes.Equal(got.AuthorityKeyId, issuer.SubjectKeyId):
		return differs("authority key id")
	case !slices.EqualFunc(got.URIs, want.URIs, sameURI):
		return differs("URI SAN")
	case !slices.Equal(got.DNSNames, want.DNSNames):
		return differs("DNS SANs")
	case len(got.IPAddresses) > 0 || len(got.EmailAddresses) > 0:
		return differs("SANs")
	case len(got.UnhandledCriticalExtensions) > 0:
		return differs("critical extensions")
	}
	return compareExtensions(got)
}

// Numbers under id-ce, 2.5.29 (RFC 5280 §4.2.1).
const (
	ceSubjectKeyID     = 14
	ceKeyUsage         = 15
	ceSubjectAltName   = 17
	ceBasicConstraints = 19
	ceAuthorityKeyID   = 35
	ceExtKeyUsage      = 37
)

// leafExtensions is how many extensions a leaf has: each of the six above, once.
const leafExtensions = 6

// compareExtensions checks that the six extensions of a leaf are there, each once and with its criticality, and no
// other. So nothing that crypto/x509 parses without a field above (policies, name constraints, AIA) goes unseen.
func compareExtensions(got *x509.Certificate) error {
	var seen [64]bool
	for _, e := range got.Extensions {
		if len(e.Id) != 4 || e.Id[0] != 2 || e.Id[1] != 5 || e.Id[2] != 29 {
			return differs("set of extensions")
		}
		var critical bool
		switch e.Id[3] {
		case ceKeyUsage, ceBasicConstraints, ceSubjectAltName:
			critical = true
		case ceSubjectKeyID, ceAuthorityKeyID, ceExtKeyUsage:
		default:
			return differs("set of extensions")
		}
		if e.Critical != critical || seen[e.Id[3]] {
			return differs("extensions' criticality")
		}
		seen[e.Id[3]] = true
	}
	if len(got.Extensions) != leafExtensions {
		return differs("set of extensions")
	}
	return nil
}

func differs(field string) error { return fmt.Errorf("the %s differs", field) }

func isEmptySequence(der []byte) bool { return len(der) == 2 && der[0] == 0x30 && der[1] == 0 }

func sameURI(a, b *url.URL) bool { return a.String() == b.String() }

// samePublicKey compares keys of the types that crypto/x509 knows; each has an Equal method.
func samePublicKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
