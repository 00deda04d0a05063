package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"

	"github.com/meshca/meshca/api/refusal"
)

// maxRSAExponent is crypto/rsa's own bound.
const maxRSAExponent = 1<<31 - 1

// isRSASize knows the sizes of RSA moduli that leaf keys may have, in bits. Above the greatest a verification costs a
// stranger nothing and the CA much. There are no sizes between: each would be a shape of its own to ca/lint, and one
// caller who tries them all would push everyone else's shapes out of its memory, again and again.
func isRSASize(bits int) bool { return bits == 2048 || bits == 3072 || bits == 4096 }

// CheckKey says whether a leaf may have this key: ECDSA P-256 or P-384, RSA of 2048, 3072 or 4096 bits, Ed25519
// (RFC 5480, RFC 8813, RFC 8410). It does no arithmetic that grows with the key. It refuses with CSR_KEY.
func CheckKey(pub crypto.PublicKey) error {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if pub == nil || pub.Curve != elliptic.P256() && pub.Curve != elliptic.P384() {
			return refusal.New(refusal.CSRKey, "an ECDSA key on another curve than P-256 and P-384")
		}
	case *rsa.PublicKey:
		if pub == nil || pub.N == nil {
			return refusal.New(refusal.CSRKey, "an RSA key without a modulus")
		}
		if bits := pub.N.BitLen(); !isRSASize(bits) {
			return refusal.New(refusal.CSRKey, "an RSA key of %d bits; 2048, 3072 and 4096 are accepted", bits)
		}
		if pub.N.Bit(0) == 0 || pub.E < 3 || pub.E&1 == 0 || pub.E > maxRSAExponent {
			return refusal.New(refusal.CSRKey, "an RSA key whose modulus or exponent cannot be")
		}
	case ed25519.PublicKey:
		if len(pub) != ed25519.PublicKeySize {
			return refusal.New(refusal.CSRKey, "an Ed25519 key of %d bytes", len(pub))
		}
	default:
		return refusal.New(refusal.CSRKey, "a key of a type that is not accepted")
	}
	return nil
}

// ErrWeakKey is wrapped by CheckIssuerKey's errors, which say whose key an authority has: "an RSA key of 1024 bits, …".
var ErrWeakKey = errors.New("too weak for an authority: RSA from 2048 bits on, ECDSA from P-256 on and Ed25519 are accepted")

// CheckIssuerKey says whether a root, or an intermediate, may have this key. Whoever breaks it is whoever he wants to be,
// so it must be as strong as what a leaf may have; it may be stronger. The error wraps ErrWeakKey.
func CheckIssuerKey(pub crypto.PublicKey) error {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if pub.Curve.Params().BitSize < 256 {
			return fmt.Errorf("an ECDSA key on the curve %s, %w", pub.Curve.Params().Name, ErrWeakKey)
		}
	case *rsa.PublicKey:
		bits := 0
		if pub.N != nil {
			bits = pub.N.BitLen()
		}
		if bits < 2048 {
			return fmt.Errorf("an RSA key of %d bits, %w", bits, ErrWeakKey)
		}
	case ed25519.PublicKey:
	default:
		return fmt.Errorf("a key of another kind, %w", ErrWeakKey)
	}
	return nil
}

// keyName tells public keys apart; it is empty for a key of a type that no leaf may have.
func keyName(pub crypto.PublicKey) string {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		if pub == nil {
			return ""
		}
		if b, err := pub.Bytes(); err == nil {
			return "EC " + string(b) // the length tells P-256 from P-384
		}
	case *rsa.PublicKey:
		if pub != nil && pub.N != nil {
			return "RSA " + string(pub.N.Bytes()) // whoever has the modulus' factors has the key for any exponent
		}
	case ed25519.PublicKey:
		return "Ed25519 " + string(pub)
	}
	return ""
}
