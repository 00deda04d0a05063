package kubernetes

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"maps"
	"math/big"
	"sync"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/meshca/meshca/attestor"
)

const testIssuer = "https://kubernetes.default.svc"

// testKeys are made once: an RSA key takes a while.
var testKeys = sync.OnceValue(func() map[string]crypto.Signer {
	rs, _ := rsa.GenerateKey(rand.Reader, 2048)
	other, _ := rsa.GenerateKey(rand.Reader, 2048)
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	p521, _ := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	return map[string]crypto.Signer{"rsa": rs, "other": other, "p256": p256, "p384": p384, "p521": p521}
})

// body is a token's payload; tests change it as they need.
type body map[string]any

// usual is what kube-apiserver 1.36 puts into the token of pod shop/web-1 on node-1.
func usual(now time.Time) body {
	return body{
		"iss": testIssuer, "sub": "system:serviceaccount:shop:web", "aud": []string{"meshca"}, "jti": "token-id",
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"kubernetes.io": body{
			"namespace": "shop", "serviceaccount": body{"name": "web", "uid": "sa-uid"},
			"pod": body{"name": "web-1", "uid": "pod-uid"}, "node": body{"name": "node-1", "uid": "node-uid"}, "warnafter": now.Add(time.Hour).Unix(),
		},
	}
}

// with returns a copy with some claims changed; a nil value removes one. The claims under kubernetes.io are named with a dot.
func (b body) with(changes body) body {
	b = maps.Clone(b)
	k := maps.Clone(b["kubernetes.io"].(body))
	for key, value := range changes {
		where := b
		if len(key) > 4 && key[:4] == "k8s." {
			where, key = k, key[4:]
		}
		if value == nil {
			delete(where, key)
		} else {
			where[key] = value
		}
	}
	if _, replaced := changes["kubernetes.io"]; !replaced {
		b["kubernetes.io"] = k
	}
	return b
}

// sign signs with go-jose, which the code under test does not use for this.
func (b body) sign(t testing.TB, alg jose.SignatureAlgorithm, key, kid string) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: testKeys()[key], KeyID: kid}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(raw)
	if err != nil {
		t.Fatal(err)
	}
	compact, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return compact
}

func (b body) rs256(t testing.TB) attestor.Token {
	t.Helper()
	return attestor.NewToken(b.sign(t, jose.RS256, "rsa", "rsa"))
}

// unsigned puts a header of one's own before the claims, and a signature of one's own behind.
func (b body) unsigned(header string, signature []byte) string {
	raw, _ := json.Marshal(b)
	return assemble(header, string(raw), signature)
}

func assemble(header, payload string, signature []byte) string {
	enc := base64.RawURLEncoding.EncodeToString
	return enc([]byte(header)) + "." + enc([]byte(payload)) + "." + enc(signature)
}

// otherCA is a certificate, in PEM, that signed nothing.
func otherCA(t testing.TB) []byte {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	key := testKeys()["p256"]
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
