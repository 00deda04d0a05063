package lint

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"time"
)

// shape is what decides how a certificate is encoded and which of zlint's lints apply to it: two certificates of one
// shape differ in values alone. It is comparable.
type shape struct {
	issuer  string // subject key id
	profile string
	key     keyType

	// What crypto/x509 makes extensions of.
	keyUsage               x509.KeyUsage
	extKeyUsages           int
	constraints, isCA      bool
	subjectKeyID           int
	uris, dns, ips, emails int
	// Dates from 2050 on are encoded as GeneralizedTime (RFC 5280 §4.1.2.5).
	lateStart, lateEnd bool
	signature          x509.SignatureAlgorithm
}

// keyType is a key's algorithm and size.
type keyType struct {
	algorithm x509.PublicKeyAlgorithm
	bits      int
}

func shapeOf(t, issuer *x509.Certificate, profile string) shape {
	return shape{
		issuer:       string(issuer.SubjectKeyId),
		profile:      profile,
		key:          keyTypeOf(t.PublicKey),
		keyUsage:     t.KeyUsage,
		extKeyUsages: len(t.ExtKeyUsage),
		constraints:  t.BasicConstraintsValid,
		isCA:         t.IsCA,
		subjectKeyID: len(t.SubjectKeyId),
		uris:         len(t.URIs),
		dns:          len(t.DNSNames),
		ips:          len(t.IPAddresses),
		emails:       len(t.EmailAddresses),
		lateStart:    isLate(t.NotBefore),
		lateEnd:      isLate(t.NotAfter),
		signature:    t.SignatureAlgorithm,
	}
}

func isLate(t time.Time) bool { return t.UTC().Year() >= 2050 }

func keyTypeOf(pub any) keyType {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		return keyType{x509.ECDSA, pub.Curve.Params().BitSize}
	case *rsa.PublicKey:
		return keyType{x509.RSA, pub.N.BitLen()}
	case ed25519.PublicKey:
		return keyType{x509.Ed25519, 8 * len(pub)}
	}
	return keyType{}
}
