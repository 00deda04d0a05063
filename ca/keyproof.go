package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"

	"github.com/meshca/meshca/api/refusal"
)

// MaxProofSize bounds the key, and the signature, of a KeyProof, in bytes.
const MaxProofSize = 10 << 10

// KeyProof is the form in which v1beta1 PodCertificateRequests of Kubernetes 1.35 show a key instead of by a PKCS #10
// request: the key, and a signature over a text that the protocol sets.
type KeyProof struct {
	// PKIX is the SubjectPublicKeyInfo, DER (RFC 5280 §4.1.2.7).
	PKIX []byte
	// Signed is the text. It is hashed with SHA-256, but for Ed25519.
	Signed []byte
	// Signature is ASN.1 of ECDSA (SEC 1 §C.5), RSASSA-PSS with SHA-256 (RFC 8017 §8.1) or Ed25519 (RFC 8032).
	Signature []byte
}

// Key returns the public key if a leaf may have it and the signature proves that the sender holds it. The order of the
// checks is that of their price, as ParseCSR's. Refusals: CSR_TOO_LARGE, CSR_MALFORMED, CSR_KEY, CSR_SIGNATURE.
func (p KeyProof) Key() (crypto.PublicKey, error) {
	if n := max(len(p.PKIX), len(p.Signature)); n > MaxProofSize {
		return nil, refusal.New(refusal.CSRTooLarge, "the key or its proof has %d bytes, and at most %d are read", n, MaxProofSize)
	}
	pub, err := x509.ParsePKIXPublicKey(p.PKIX)
	if err != nil {
		return nil, refusal.New(refusal.CSRMalformed, "the public key is not one DER-encoded SubjectPublicKeyInfo")
	}
	if err := CheckKey(pub); err != nil {
		return nil, err
	}
	digest := sha256.Sum256(p.Signed)
	var held bool
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		held = ecdsa.VerifyASN1(pub, digest[:], p.Signature)
	case *rsa.PublicKey:
		held = rsa.VerifyPSS(pub, crypto.SHA256, digest[:], p.Signature, nil) == nil
	case ed25519.PublicKey:
		held = ed25519.Verify(pub, p.Signed, p.Signature)
	}
	if !held {
		return nil, refusal.New(refusal.CSRSignature, "the proof of possession does not verify under the key")
	}
	return pub, nil
}
