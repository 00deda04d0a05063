package kubernetes

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"

	jose "github.com/go-jose/go-jose/v4"
)

func jwk(t *testing.T, key any, change func(*jose.JSONWebKey)) string {
	t.Helper()
	k := jose.JSONWebKey{Key: key, KeyID: "k", Use: "sig"}
	if change != nil {
		change(&k)
	}
	raw, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestParseKeysSkipsWhatCannotVerify(t *testing.T) {
	good := jwk(t, testKeys()["rsa"].Public(), func(k *jose.JSONWebKey) { k.KeyID = "good" })
	rsaKey := testKeys()["rsa"].Public()
	_, edwards, _ := ed25519.GenerateKey(rand.Reader)
	small := &rsa.PublicKey{N: new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 1023), big.NewInt(1)), E: 65537}
	huge := &rsa.PublicKey{N: new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 16383), big.NewInt(1)), E: 65537}
	even := &rsa.PublicKey{N: rsaKey.(*rsa.PublicKey).N, E: 65536}
	for name, test := range map[string]struct {
		key  string
		used bool
	}{
		"RSA":                      {jwk(t, rsaKey, nil), true},
		"P-256":                    {jwk(t, testKeys()["p256"].Public(), nil), true},
		"P-521 for ES512":          {jwk(t, testKeys()["p521"].Public(), func(k *jose.JSONWebKey) { k.Algorithm = "ES512" }), true},
		"no use":                   {jwk(t, rsaKey, func(k *jose.JSONWebKey) { k.Use = "" }), true},
		"RSA for RS256":            {jwk(t, rsaKey, func(k *jose.JSONWebKey) { k.Algorithm = "RS256" }), true},
		"for encryption":           {jwk(t, rsaKey, func(k *jose.JSONWebKey) { k.Use = "enc" }), false},
		"for PS256":                {jwk(t, rsaKey, func(k *jose.JSONWebKey) { k.Algorithm = "PS256" }), false},
		"RSA for ES256":            {jwk(t, rsaKey, func(k *jose.JSONWebKey) { k.Algorithm = "ES256" }), false},
		"P-256 for ES384":          {jwk(t, testKeys()["p256"].Public(), func(k *jose.JSONWebKey) { k.Algorithm = "ES384" }), false},
		"P-256 for RS256":          {jwk(t, testKeys()["p256"].Public(), func(k *jose.JSONWebKey) { k.Algorithm = "RS256" }), false},
		"no id":                    {jwk(t, rsaKey, func(k *jose.JSONWebKey) { k.KeyID = "" }), false},
		"the id of another":        {jwk(t, testKeys()["other"].Public(), func(k *jose.JSONWebKey) { k.KeyID = "good" }), false},
		"RSA of 1024 bits":         {jwk(t, small, nil), false},
		"RSA of 16384 bits":        {jwk(t, huge, nil), false},
		"RSA with an even e":       {jwk(t, even, nil), false},
		"Ed25519":                  {jwk(t, edwards.Public(), nil), false},
		"a shared secret":          {jwk(t, []byte("secret"), nil), false},
		"a private key":            {jwk(t, testKeys()["rsa"], nil), false},
		"P-224":                    {`{"kty":"EC","kid":"k","crv":"P-224","x":"AA","y":"AA"}`, false},
		"a point off the curve":    {`{"kty":"EC","kid":"k","crv":"P-256","x":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE","y":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE"}`, false},
		"a type of the future":     {`{"kty":"AKP","kid":"k","alg":"ML-DSA-65","pub":"AA"}`, false},
		"something that is no key": {`"k"`, false},
	} {
		set, err := parseKeys([]byte(`{"keys":[` + good + `,` + test.key + `]}`))
		if err != nil {
			t.Errorf("%s: one bad key spoils the others: %v", name, err)
			continue
		}
		if used := slices.Contains(set.ids(), "k"); used != test.used {
			t.Errorf("%s: used %v, want %v (%v)", name, used, test.used, set.skipped)
		}
		if wantSkipped := map[bool]int{true: 0, false: 1}[test.used]; len(set.skipped) != wantSkipped {
			t.Errorf("%s: skipped %v", name, set.skipped)
		}
		if key := set.byID["good"]; key == nil || !testKeys()["rsa"].Public().(*rsa.PublicKey).Equal(key) {
			t.Errorf("%s: the good key is %v", name, key)
		}
	}
}

func TestParseKeysRefusesTheWhole(t *testing.T) {
	one := jwk(t, testKeys()["rsa"].Public(), nil)
	for name, raw := range map[string]string{
		"nothing": "", "no JSON": "-----BEGIN PUBLIC KEY-----", "no keys": `{}`, "an empty set": `{"keys":[]}`, "a list": `[]`,
		"bad keys only": `{"keys":[{"kty":"oct","kid":"k","k":"AA"}]}`,
		"too large":     `{"keys":[` + one + `]}` + strings.Repeat(" ", maxKeySet),
		"too many":      `{"keys":[` + strings.Repeat(one+",", maxKeys) + one + `]}`,
	} {
		if set, err := parseKeys([]byte(raw)); err == nil {
			t.Errorf("%s: keys %v", name, set.ids())
		} else if strings.Contains(err.Error(), "BEGIN") {
			t.Errorf("%s: the error repeats what was read: %v", name, err)
		}
	}
}

func FuzzParseKeys(f *testing.F) {
	f.Add([]byte(`{"keys":[{"kty":"RSA","kid":"k","n":"AQAB","e":"AQAB"}]}`))
	f.Add([]byte(`{"keys":[{"kty":"EC","kid":"k","crv":"P-256","x":"AA","y":"AA"}]}`))
	f.Add([]byte(`{"keys":[{"kty":"RSA","kid":"k","n":"AQAB","e":"AQAB","x5c":["AA"]}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		set, err := parseKeys(raw)
		if err == nil && (len(set.byID) == 0 || len(set.byID) > maxKeys) {
			t.Errorf("%d keys", len(set.byID))
		}
		if err == nil {
			for id, key := range set.byID {
				if id == "" || fmt.Sprintf("%T", key) != "*rsa.PublicKey" && fmt.Sprintf("%T", key) != "*ecdsa.PublicKey" {
					t.Errorf("key %q is a %T", id, key)
				}
			}
		}
	})
}
