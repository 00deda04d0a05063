package kubernetes

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"slices"
	"strings"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/meshca/meshca/attestor"
)

var joseAlgorithms = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512}

// FuzzToken gives the parser what a stranger may send. What it makes of a token must be what go-jose makes of it, and
// whatever verifies here must verify there.
func FuzzToken(f *testing.F) {
	now := time.Now()
	keys := testKeys()
	for _, alg := range []struct {
		alg jose.SignatureAlgorithm
		key string
	}{{jose.RS256, "rsa"}, {jose.ES256, "p256"}, {jose.ES512, "p521"}, {jose.PS256, "rsa"}} {
		f.Add(usual(now).sign(f, alg.alg, alg.key, alg.key))
	}
	f.Add(hs256(now))
	f.Add(usual(now).unsigned(`{"alg":"none"}`, nil))
	f.Add(assemble(`{"alg":"RS256","kid":"rsa","jwk":{"kty":"RSA"}}`, `{"aud":["meshca"],"exp":1e9}`, []byte("x")))
	f.Add("a.b.c.d.e")
	f.Fuzz(func(t *testing.T, token string) {
		signed, refused := parseJWS(token)
		if refused != nil {
			if !refused.Reason.Known() || len(refused.Detail) > 600 {
				t.Fatalf("refused as %s", refused)
			}
			return
		}
		if len(token) > maxToken {
			t.Fatal("it is too large, and was parsed")
		}
		said, claimsRefused := parseClaims(signed.payload)
		if claimsRefused == nil {
			ev := said.evidence("c", "m")
			for _, s := range []string{ev.PodName, ev.PodUID, ev.NodeName, ev.NodeUID, ev.ServiceAccountUID, ev.CredentialID} {
				if len(s) > 253 || strings.ContainsAny(s, "\n\x00\x1b ") {
					t.Errorf("evidence holds %q", s)
				}
			}
			if ev.Proven {
				t.Error("nothing is proven yet")
			}
			if refused := said.check("", "meshca", 25*time.Hour, now); refused != nil && len(refused.Detail) > 1200 {
				t.Errorf("a detail of %d bytes", len(refused.Detail))
			}
		}
		theirs, err := jose.ParseSignedCompact(token, joseAlgorithms)
		for name, key := range keys {
			ours := signed.verify(key.Public())
			if !ours {
				continue
			}
			if err != nil {
				t.Fatalf("it verifies under %s, and go-jose cannot parse it: %v", name, err)
			}
			payload, err := theirs.Verify(key.Public())
			if err != nil || string(payload) != string(signed.payload) {
				t.Fatalf("it verifies under %s here, go-jose says %v", name, err)
			}
			if theirs.Signatures[0].Header.KeyID != signed.kid || theirs.Signatures[0].Header.Algorithm != signed.alg {
				t.Fatalf("header %s %s, go-jose reads %+v", signed.alg, signed.kid, theirs.Signatures[0].Header)
			}
		}
	})
}

// A key verifies its own kind of algorithm and no other, whatever the header says.
func TestEachKeyHasItsAlgorithms(t *testing.T) {
	good := map[string][]string{"rsa": {"RS256", "RS384", "RS512"}, "p256": {"ES256"}, "p384": {"ES384"}, "p521": {"ES512"}}
	by := map[string]string{"RS256": "rsa", "RS384": "rsa", "RS512": "rsa", "ES256": "p256", "ES384": "p384", "ES512": "p521"}
	for alg, signer := range by {
		signed, refused := parseJWS(usual(time.Now()).sign(t, jose.SignatureAlgorithm(alg), signer, "k"))
		if refused != nil {
			t.Fatal(refused)
		}
		for name := range good {
			for _, claimed := range append(joseAlgorithms, "PS256", "HS256", "none", "EdDSA", "") {
				forged := signed
				forged.alg = string(claimed)
				want := name == signer && string(claimed) == alg
				if got := forged.verify(testKeys()[name].Public()); got != want {
					t.Errorf("signed with %s, said to be %s, under key %s: verifies %v", alg, claimed, name, got)
				}
			}
		}
		half := len(signed.signature) / 2
		for name, altered := range map[string][]byte{
			"a byte more":         append(slices.Clone(signed.signature), 0),
			"a byte less":         signed.signature[:len(signed.signature)-1],
			"a zero in the midst": slices.Insert(slices.Clone(signed.signature), half, 0),
			"a zero before":       slices.Insert(slices.Clone(signed.signature), 0, 0),
		} {
			forged := signed
			forged.signature = altered
			if forged.verify(testKeys()[signer].Public()) {
				t.Errorf("%s: a signature with %s verifies", alg, name)
			}
		}
	}
	for name, key := range map[string]crypto.PublicKey{"none": nil, "a secret": []byte("secret"), "RSA by value": *testKeys()["rsa"].Public().(*rsa.PublicKey), "EC by value": *testKeys()["p256"].Public().(*ecdsa.PublicKey)} {
		signed, _ := parseJWS(usual(time.Now()).sign(t, jose.RS256, "rsa", "k"))
		if signed.verify(key) {
			t.Errorf("it verifies under %s", name)
		}
	}
}

// A P-256 key could sign what ES384 hashes, and its numbers fit into ES384's lengths: it is refused for its curve.
func TestCurveOfAnotherAlgorithm(t *testing.T) {
	key := testKeys()["p256"].(*ecdsa.PrivateKey)
	signed, refused := parseJWS(usual(time.Now()).unsigned(`{"alg":"ES384","kid":"k"}`, nil))
	if refused != nil {
		t.Fatal(refused)
	}
	digest := sha512.Sum384([]byte(signed.signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	signed.signature = append(r.FillBytes(make([]byte, 48)), s.FillBytes(make([]byte, 48))...)
	if signed.verify(key.Public()) {
		t.Error("it verifies")
	}
}

func TestQuoted(t *testing.T) {
	for in, want := range map[string]string{
		"RS256": `"RS256"`, "": `""`, "a\nb\"c\\d\x00é": `"a?b?c?d??"`, strings.Repeat("x", 65): `"` + strings.Repeat("x", 64) + `…"`,
	} {
		if got := quoted(in); got != want {
			t.Errorf("%q: got %s, want %s", in, got, want)
		}
	}
}

// benchTokens are as many tokens as there may be iterations, no two the same.
func benchTokens(b *testing.B, n int) []attestor.Token {
	b.Helper()
	tokens := make([]attestor.Token, n)
	for i := range tokens {
		tokens[i] = usual(time.Now()).with(body{"jti": string(rune('a'+i%26)) + time.Now().String()}).rs256(b)
	}
	return tokens
}

// BenchmarkVerifyRS256 is the floor: what no attestation can do without.
func BenchmarkVerifyRS256(b *testing.B) {
	const n = 512
	key := testKeys()["rsa"].Public().(*rsa.PublicKey)
	var signed []jws
	for _, token := range benchTokens(b, n) {
		one, refused := parseJWS(token.Secret())
		if refused != nil {
			b.Fatal(refused)
		}
		signed = append(signed, one)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		one := signed[i%n]
		digest := sha256.Sum256([]byte(one.signed))
		if err := rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], one.signature); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkAttest is all that mode jwks does with a token of a pod that its watches know.
func BenchmarkAttest(b *testing.B) {
	const n = 512
	server := newFakeServer(b)
	server.keys["rsa"] = testKeys()["rsa"].Public()
	server.putUsual()
	c, err := New(Config{Name: "prod", Mode: JWKS, Kubeconfig: server.kubeconfig}, Deps{})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = c.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	await(b, c.Ready)
	tokens := benchTokens(b, n)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, err := c.Attest(ctx, tokens[i%n], "meshca"); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	if live := server.count("get pods"); live != 0 {
		b.Errorf("%d live reads", live)
	}
}
