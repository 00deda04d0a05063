package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"testing"

	"github.com/meshca/meshca/api/refusal"
)

// proofOf signs as a kubelet does.
func proofOf(t testing.TB, key crypto.Signer, text string) KeyProof {
	t.Helper()
	pkix, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte(text))
	signed, opts := digest[:], crypto.SignerOpts(crypto.SHA256)
	switch key.(type) {
	case *rsa.PrivateKey:
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto, Hash: crypto.SHA256}
	case ed25519.PrivateKey:
		signed, opts = []byte(text), crypto.Hash(0)
	}
	signature, err := key.Sign(rand.Reader, signed, opts)
	if err != nil {
		t.Fatal(err)
	}
	return KeyProof{PKIX: pkix, Signed: []byte(text), Signature: signature}
}

func TestKeyProof(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"ECDSA": newKey(t), "RSA": rsaKey, "Ed25519": edKey} {
		proof := proofOf(t, key, "pod-uid")
		pub, err := proof.Key()
		if err != nil || keyName(pub) != keyName(key.Public()) {
			t.Errorf("%s: %v", name, err)
		}
		of := proof
		of.Signed = []byte("another-uid")
		if _, err := of.Key(); refusal.Of(err) != refusal.CSRSignature {
			t.Errorf("%s, a proof for another pod: %v", name, err)
		}
		of = proof
		of.Signature = nil
		if _, err := of.Key(); refusal.Of(err) != refusal.CSRSignature {
			t.Errorf("%s, no proof: %v", name, err)
		}
	}
	good := proofOf(t, newKey(t), "pod-uid")
	for name, c := range map[string]struct {
		proof KeyProof
		want  refusal.Reason
	}{
		"a curve that no leaf may have": {proofOf(t, p521, "pod-uid"), refusal.CSRKey},
		"no key":                        {KeyProof{Signed: good.Signed, Signature: good.Signature}, refusal.CSRMalformed},
		"bytes behind the key":          {KeyProof{PKIX: append(good.PKIX, 0), Signed: good.Signed, Signature: good.Signature}, refusal.CSRMalformed},
		"a key too large":               {KeyProof{PKIX: make([]byte, MaxProofSize+1)}, refusal.CSRTooLarge},
		"a proof too large":             {KeyProof{PKIX: good.PKIX, Signature: make([]byte, MaxProofSize+1)}, refusal.CSRTooLarge},
	} {
		if _, err := c.proof.Key(); refusal.Of(err) != c.want {
			t.Errorf("%s: got %v, want %s", name, err, c.want)
		}
	}
}

// FuzzKeyProof: whatever a stranger sends, there is no panic, and what is accepted is a key that a leaf may have.
func FuzzKeyProof(f *testing.F) {
	good := proofOf(f, newKey(f), "pod-uid")
	f.Add(good.PKIX, good.Signed, good.Signature)
	f.Add([]byte{0x30, 0x80}, []byte{}, []byte{})
	f.Fuzz(func(t *testing.T, pkix, signed, signature []byte) {
		pub, err := KeyProof{pkix, signed, signature}.Key()
		if err != nil {
			if r := refusal.Of(err); pub != nil || !r.Known() || r == refusal.Internal {
				t.Fatalf("%v, %v", pub, err)
			}
			return
		}
		if CheckKey(pub) != nil {
			t.Fatal("a key that no leaf may have")
		}
	})
}
