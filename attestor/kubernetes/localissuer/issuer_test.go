package localissuer_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
)

const url = "https://tokens.test"

var web = localissuer.Subject{
	Namespace: "shop", ServiceAccount: "web", ServiceAccountUID: "sa-uid", Pod: "web-1", PodUID: "pod-uid", Node: "node-1", NodeUID: "node-uid",
}

func open(t *testing.T, dir string) *localissuer.Issuer {
	t.Helper()
	i, err := localissuer.Open(dir, url)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func token(t *testing.T, i *localissuer.Issuer, s localissuer.Subject) string {
	t.Helper()
	signed, err := i.Token(s, "meshca", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

func part(t *testing.T, token string, n int) map[string]any {
	t.Helper()
	raw, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[n])
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

// What kube-apiserver 1.36 wrote into the token of a pod that runs on a node, with what differs from token to token in <>
// (see also k8s.io/kubernetes/pkg/serviceaccount/claims.go).
const (
	boundHeader  = `{"alg":"RS256","kid":"<key id>"}`
	boundPayload = `{"aud":["meshca"],"exp":"<exp>","iat":"<iat>","iss":"https://tokens.test","jti":"<uuid>","kubernetes.io":{"namespace":"shop",` +
		`"node":{"name":"node-1","uid":"node-uid"},"pod":{"name":"web-1","uid":"pod-uid"},"serviceaccount":{"name":"web","uid":"sa-uid"}},` +
		`"nbf":"<iat>","sub":"system:serviceaccount:shop:web"}`
)

func TestFormIsAnAPIServers(t *testing.T) {
	i := open(t, t.TempDir())
	before := time.Now().Unix()
	signed := token(t, i, web)
	header, payload := part(t, signed, 0), part(t, signed, 1)

	if kid, _ := header["kid"].(string); len(kid) != 43 { // SHA-256 in base64url
		t.Errorf("the key id is %q", kid)
	}
	header["kid"] = "<key id>"
	if jti, _ := payload["jti"].(string); !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(jti) {
		t.Errorf("jti is %q, want a random UUID", jti)
	}
	if again := part(t, token(t, i, web), 1)["jti"]; again == payload["jti"] {
		t.Errorf("two tokens have one jti: %v", again)
	}
	payload["jti"] = "<uuid>"
	iat, _ := payload["iat"].(float64)
	exp, _ := payload["exp"].(float64)
	if at := int64(iat); at < before || at > time.Now().Unix() || payload["nbf"] != payload["iat"] || exp != iat+3600 {
		t.Errorf("iat %v, nbf %v, exp %v", payload["iat"], payload["nbf"], payload["exp"])
	}
	payload["iat"], payload["nbf"], payload["exp"] = "<iat>", "<iat>", "<exp>"
	for want, got := range map[string]map[string]any{boundHeader: header, boundPayload: payload} {
		if raw, err := json.Marshal(got); err != nil || strings.NewReplacer(`\u003c`, "<", `\u003e`, ">").Replace(string(raw)) != want {
			t.Errorf("got  %s\nwant %s", raw, want)
		}
	}

	loose := part(t, token(t, i, localissuer.Subject{Namespace: "shop", ServiceAccount: "web", ServiceAccountUID: "sa-uid"}), 1)["kubernetes.io"].(map[string]any)
	if _, ok := loose["pod"]; ok || loose["node"] != nil {
		t.Errorf("a token that is bound to nothing: %v", loose)
	}
}

// The published keys verify the tokens, in the code that verifies a cluster's; another issuer's do not.
func TestKeysVerifyTokens(t *testing.T) {
	dir := t.TempDir()
	mine, other := open(t, dir), open(t, t.TempDir())
	keys, err := mine.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(keys), `"d"`) || strings.Contains(string(keys), `"p"`) {
		t.Fatal("the key set holds the private key")
	}
	file := filepath.Join(dir, "keys.json")
	if err := os.WriteFile(file, keys, 0o600); err != nil {
		t.Fatal(err)
	}
	cluster, err := kubernetes.New(kubernetes.Config{
		Name: "dev", Mode: kubernetes.JWKS, Issuer: url, Keys: kubernetes.KeysConfig{File: file}, Liveness: kubernetes.LivenessNone,
	}, kubernetes.Deps{})
	if err != nil {
		t.Fatal(err)
	}
	attest := func(i *localissuer.Issuer, audience string) (attestor.Evidence, error) {
		return cluster.Attest(t.Context(), attestor.NewToken(token(t, i, web)), audience)
	}
	ev, err := attest(mine, "meshca")
	if err != nil {
		t.Fatal(err)
	}
	if ev.Identity.String() != "dev/shop/web" || ev.PodName != "web-1" || ev.PodUID != "pod-uid" || ev.NodeName != "node-1" || ev.NodeUID != "node-uid" ||
		ev.ServiceAccountUID != "sa-uid" || ev.CredentialID == "" || !ev.Proven {
		t.Errorf("the evidence is %+v", ev)
	}
	if _, err := attest(mine, "meshca-agent"); refusal.Of(err) != refusal.TokenAudience {
		t.Errorf("another audience: got %v", err)
	}
	if _, err := attest(open(t, dir), "meshca"); err != nil {
		t.Errorf("the issuer opened again: %v", err)
	}
	if _, err := attest(other, "meshca"); err == nil {
		t.Error("another issuer's token passes")
	}
}

func TestKeyIsKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	first, err := open(t, dir).JWKS()
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "token-key.pem"): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v, want %v", path, info.Mode().Perm(), err, want)
		}
	}
	second, err := open(t, dir).JWKS()
	if err != nil || string(first) != string(second) {
		t.Errorf("the second time it publishes other keys (%v):\n%s\n%s", err, first, second)
	}
}

func TestDamagedKeyFiles(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		content []byte
		mode    os.FileMode
		want    []string
	}{
		"empty":            {nil, 0o600, []string{"no PEM block", "remove it"}},
		"no PEM":           {[]byte("secret nonsense"), 0o600, []string{"no PEM block", "remove it"}},
		"no key in it":     {pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("secret nonsense")}), 0o600, []string{"PKCS #8", "remove it"}},
		"half a key":       {pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der[:len(der)/2]}), 0o600, []string{"PKCS #8", "remove it"}},
		"an EC key":        {pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600, []string{"ecdsa", "RSA", "remove it"}},
		"readable for all": {[]byte("secret nonsense"), 0o644, []string{"0644", "chmod 600"}},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "token-key.pem")
		if err := errors.Join(os.WriteFile(path, test.content, 0o600), os.Chmod(path, test.mode)); err != nil {
			t.Fatal(err)
		}
		_, err := localissuer.Open(dir, url)
		if err == nil {
			t.Errorf("%s: it opens", name)
			continue
		}
		for _, want := range append(test.want, path) {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: the error does not say %q: %v", name, want, err)
			}
		}
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the error holds a part of the file: %v", name, err)
		}
		if kept, err := os.ReadFile(path); err != nil || string(kept) != string(test.content) {
			t.Errorf("%s: the file was changed (%v)", name, err)
		}
	}
}
