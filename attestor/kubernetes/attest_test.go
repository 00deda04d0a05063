package kubernetes

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	corev1 "k8s.io/api/core/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// clock is the wall clock, and what a test adds to it.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) forward(d time.Duration) { c.ahead.Add(int64(d)) }

// bench is a cluster with its usual objects, and an attestor that runs.
type bench struct {
	*Cluster
	clock  *clock
	server *fakeServer
}

func newBench(t *testing.T, cfg Config) *bench {
	t.Helper()
	b := &bench{clock: &clock{}, server: newFakeServer(t)}
	b.server.keys["rsa"] = testKeys()["rsa"].Public()
	b.server.keys["p256"] = testKeys()["p256"].Public()
	b.server.keys["p384"] = testKeys()["p384"].Public()
	b.server.keys["p521"] = testKeys()["p521"].Public()
	b.server.putUsual()
	cfg.Name, cfg.Kubeconfig = "prod", b.server.kubeconfig
	var err error
	if b.Cluster, err = New(cfg, Deps{Now: b.clock.now}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("Run ended with %v, want the context's error", err)
		}
	})
	await(t, b.Ready)
	for k := range b.mirrors {
		await(t, func() error {
			if b.server.count("watch "+kind(k).String()) == 0 {
				return fmt.Errorf("no watch on %s", kind(k))
			}
			return nil
		})
	}
	return b
}

func await(t testing.TB, check func() error) {
	t.Helper()
	end := time.Now().Add(10 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("still: %v", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestAttestGoodTokens(t *testing.T) {
	for _, mode := range []Mode{TokenReview, JWKS} {
		b := newBench(t, Config{Mode: mode})
		now := b.now()
		id, _ := attestor.NewIdentity("prod", "shop", "web")
		want := attestor.Evidence{
			Proven: true, Identity: id, Method: "kubernetes/" + string(mode), ServiceAccountUID: "sa-uid", PodName: "web-1", PodUID: "pod-uid",
			NodeName: "node-1", NodeUID: "node-uid", CredentialID: "token-id", IssuedAt: time.Unix(now.Unix(), 0), ExpiresAt: time.Unix(now.Add(time.Hour).Unix(), 0),
		}
		for name, token := range map[string]string{
			"RS256":                     usual(now).sign(t, jose.RS256, "rsa", "rsa"),
			"RS384":                     usual(now).sign(t, jose.RS384, "rsa", "rsa"),
			"RS512":                     usual(now).sign(t, jose.RS512, "rsa", "rsa"),
			"ES256":                     usual(now).sign(t, jose.ES256, "p256", "p256"),
			"ES384":                     usual(now).sign(t, jose.ES384, "p384", "p384"),
			"ES512":                     usual(now).sign(t, jose.ES512, "p521", "p521"),
			"an audience that is text":  usual(now).with(body{"aud": "meshca"}).sign(t, jose.RS256, "rsa", "rsa"),
			"no nbf":                    usual(now).with(body{"nbf": nil}).sign(t, jose.RS256, "rsa", "rsa"),
			"no node: the pod tells it": usual(now).with(body{"k8s.node": nil}).sign(t, jose.RS256, "rsa", "rsa"),
			"a node without UID":        usual(now).with(body{"k8s.node": body{"name": "node-1"}}).sign(t, jose.RS256, "rsa", "rsa"),
			"a clock a little behind":   usual(now).with(body{"nbf": now.Add(20 * time.Second).Unix()}).sign(t, jose.RS256, "rsa", "rsa"),
		} {
			got, err := b.Attest(t.Context(), attestor.NewToken(token), "meshca")
			if err != nil {
				t.Errorf("%s, %s: %v", mode, name, err)
			} else if got != want {
				t.Errorf("%s, %s:\ngot  %+v\nwant %+v", mode, name, got, want)
			}
		}
	}
}

// A token that must be refused, why, and which claim that is about. tokenReview and jwks give their own reasons where one of
// them has the API server's word only.
type badToken struct {
	name   string
	token  func(now time.Time) string
	jwks   refusal.Reason
	review refusal.Reason // empty: the same
	claim  string
}

func badTokens(t *testing.T) []badToken {
	sign := func(changes body) func(time.Time) string {
		return func(now time.Time) string { return usual(now).with(changes).sign(t, jose.RS256, "rsa", "rsa") }
	}
	at := func(claim string, d time.Duration) func(time.Time) string {
		return func(now time.Time) string {
			return usual(now).with(body{claim: now.Add(d).Unix()}).sign(t, jose.RS256, "rsa", "rsa")
		}
	}
	text := func(s string) func(time.Time) string { return func(time.Time) string { return s } }
	edit := func(f func(string) string) func(time.Time) string {
		return func(now time.Time) string { return f(usual(now).sign(t, jose.RS256, "rsa", "rsa")) }
	}
	return []badToken{
		{name: "nothing", token: text(""), jwks: refusal.TokenMissing},
		{name: "over 16 KiB", token: text(strings.Repeat("a", 16<<10+1)), jwks: refusal.TokenTooLarge},
		{name: "no JWT", token: text("hello"), jwks: refusal.TokenMalformed},
		{name: "two parts", token: text("e30.e30"), jwks: refusal.TokenMalformed},
		{name: "JWE", token: text("eyJhbGciOiJSU0EtT0FFUCIsImVuYyI6IkEyNTZHQ00ifQ.a.b.c.d"), jwks: refusal.TokenEncrypted},
		{name: "line break", token: edit(func(s string) string { return s + "\n" }), jwks: refusal.TokenMalformed},
		{name: "padding", token: edit(func(s string) string { return s + "=" }), jwks: refusal.TokenMalformed},
		{name: "header is no JSON", token: text("aGVsbG8.e30.AAAA"), jwks: refusal.TokenMalformed},
		{name: "alg twice", token: func(now time.Time) string {
			return usual(now).unsigned(`{"alg":"none","alg":"RS256","kid":"rsa"}`, []byte("x"))
		}, jwks: refusal.TokenMalformed},
		{name: "crit", token: func(now time.Time) string {
			return usual(now).unsigned(`{"alg":"RS256","kid":"rsa","crit":["b64"],"b64":false}`, []byte("x"))
		}, jwks: refusal.TokenMalformed, claim: "crit"},
		{name: "alg none", token: func(now time.Time) string { return usual(now).unsigned(`{"alg":"none","kid":"rsa"}`, nil) }, jwks: refusal.TokenAlgorithm, claim: "alg"},
		{name: "alg nOnE", token: func(now time.Time) string { return usual(now).unsigned(`{"alg":"nOnE","kid":"rsa"}`, nil) }, jwks: refusal.TokenAlgorithm, claim: "alg"},
		{name: "no alg", token: func(now time.Time) string { return usual(now).unsigned(`{"kid":"rsa"}`, nil) }, jwks: refusal.TokenAlgorithm, claim: "alg"},
		{name: "HS256 keyed with the public key", token: hs256, jwks: refusal.TokenAlgorithm, claim: "alg"},
		{name: "PS256", token: func(now time.Time) string { return usual(now).sign(t, jose.PS256, "rsa", "rsa") }, jwks: refusal.TokenAlgorithm, claim: "alg"},
		{name: "unknown kid", token: func(now time.Time) string { return usual(now).sign(t, jose.RS256, "other", "nobody") }, jwks: refusal.TokenKeyUnknown, review: refusal.TokenRejected, claim: "kid"},
		{name: "no kid", token: func(now time.Time) string { return usual(now).sign(t, jose.RS256, "rsa", "") }, jwks: refusal.TokenKeyUnknown, review: refusal.TokenRejected, claim: "kid"},
		{name: "another key under a known kid", token: func(now time.Time) string { return usual(now).sign(t, jose.RS256, "other", "rsa") }, jwks: refusal.TokenSignature, review: refusal.TokenRejected},
		{name: "RS256 by an EC key's id", token: func(now time.Time) string { return usual(now).sign(t, jose.RS256, "rsa", "p256") }, jwks: refusal.TokenSignature, review: refusal.TokenRejected},
		{name: "ES256 by an RSA key's id", token: func(now time.Time) string { return usual(now).sign(t, jose.ES256, "p256", "rsa") }, jwks: refusal.TokenSignature, review: refusal.TokenRejected},
		{name: "ES256 by a P-384 key's id", token: func(now time.Time) string { return usual(now).sign(t, jose.ES256, "p256", "p384") }, jwks: refusal.TokenSignature, review: refusal.TokenRejected},
		{name: "changed claims", token: edit(swapPayload), jwks: refusal.TokenSignature, review: refusal.TokenRejected},
		{name: "no signature", token: edit(func(s string) string { return s[:strings.LastIndex(s, ".")+1] }), jwks: refusal.TokenSignature, review: refusal.TokenRejected},
		{name: "claims are a list", token: text(assemble(`{"alg":"RS256","kid":"rsa"}`, `[]`, []byte("x"))), jwks: refusal.TokenMalformed},
		{name: "a claim twice", token: text(assemble(`{"alg":"RS256","kid":"rsa"}`, `{"exp":1,"exp":2}`, []byte("x"))), jwks: refusal.TokenMalformed},

		{name: "wrong audience", token: sign(body{"aud": []string{"vault"}}), jwks: refusal.TokenAudience, claim: "aud"},
		{name: "an agent's audience", token: sign(body{"aud": []string{"meshca-agent"}}), jwks: refusal.TokenAudience, claim: "aud"},
		{name: "empty audience", token: sign(body{"aud": []string{""}}), jwks: refusal.TokenAudience, claim: "aud"},
		{name: "no audiences", token: sign(body{"aud": []string{}}), jwks: refusal.TokenAudience, claim: "aud"},
		{name: "no audience claim", token: sign(body{"aud": nil}), jwks: refusal.TokenAudience, claim: "aud"},
		{name: "a prefix of the audience", token: sign(body{"aud": []string{"mesh"}}), jwks: refusal.TokenAudience, claim: "aud"},
		{name: "several audiences", token: sign(body{"aud": []string{testIssuer, "meshca", "meshca-agent"}}), jwks: refusal.TokenAudience, claim: "aud"},
		{name: "an agent's audience too", token: sign(body{"aud": []string{"meshca", "meshca-agent"}}), jwks: refusal.TokenAudience, claim: "aud"},
		{name: "the API server's audience too", token: sign(body{"aud": []string{"meshca", testIssuer}}), jwks: refusal.TokenAudience, claim: "aud"},
		{name: "the audience twice", token: sign(body{"aud": []string{"meshca", "meshca"}}), jwks: refusal.TokenAudience, claim: "aud"},
		{name: "audience in capitals", token: sign(body{"aud": []string{"MESHCA"}}), jwks: refusal.TokenAudience, claim: "aud"},

		{name: "expired", token: at("exp", -time.Second), jwks: refusal.TokenExpired, claim: "exp"},
		{name: "no exp", token: sign(body{"exp": nil}), jwks: refusal.TokenNoExpiry, claim: "exp"},
		{name: "exp out of range", token: sign(body{"exp": 1e300}), jwks: refusal.TokenMalformed},
		{name: "negative exp", token: sign(body{"exp": -1}), jwks: refusal.TokenMalformed},
		{name: "not yet valid", token: at("nbf", 40*time.Second), jwks: refusal.TokenNotYetValid, claim: "nbf"},
		{name: "issued in the future", token: at("iat", 40*time.Second), jwks: refusal.TokenNotYetValid, claim: "iat"},
		{name: "no iat", token: sign(body{"iat": nil}), jwks: refusal.TokenTooOld, claim: "iat"},
		{name: "too old", token: at("iat", -25*time.Hour-time.Second), jwks: refusal.TokenTooOld, claim: "iat"},

		{name: "a user", token: sign(body{"sub": "alice"}), jwks: refusal.TokenNotServiceAccount, claim: "sub"},
		{name: "no subject", token: sign(body{"sub": nil}), jwks: refusal.TokenNotServiceAccount, claim: "sub"},
		{name: "extra colons", token: sign(body{"sub": "system:serviceaccount:shop:web:admin"}), jwks: refusal.TokenNotServiceAccount, claim: "sub"},
		{name: "an empty name", token: sign(body{"sub": "system:serviceaccount:shop:"}), jwks: refusal.TokenNotServiceAccount, claim: "sub"},
		{name: "a slash", token: sign(body{"sub": "system:serviceaccount:shop:web/../admin"}), jwks: refusal.TokenNotServiceAccount, claim: "sub"},
		{name: "another account than the claims", token: sign(body{"sub": "system:serviceaccount:shop:admin"}), jwks: refusal.TokenNotServiceAccount, claim: "kubernetes.io.serviceaccount.name"},
		{name: "another namespace than the claims", token: sign(body{"sub": "system:serviceaccount:bank:web"}), jwks: refusal.TokenNotServiceAccount, claim: "kubernetes.io.namespace"},
		{name: "no account UID", token: sign(body{"k8s.serviceaccount": body{"name": "web"}}), jwks: refusal.TokenNotServiceAccount, claim: "kubernetes.io.serviceaccount.uid"},
		{name: "unbound", token: sign(body{"k8s.pod": nil, "k8s.node": nil}), jwks: refusal.TokenUnbound, claim: "kubernetes.io.pod"},
		{name: "bound to a pod without UID", token: sign(body{"k8s.pod": body{"name": "web-1"}}), jwks: refusal.TokenUnbound, claim: "kubernetes.io.pod"},
		{name: "no claims of Kubernetes", token: sign(body{"kubernetes.io": nil}), jwks: refusal.TokenUnbound, claim: "kubernetes.io.pod"},
		{name: "a pod that is a path", token: sign(body{"k8s.pod": body{"name": "../../nodes/node-1", "uid": "u"}}), jwks: refusal.TokenMalformed, claim: "kubernetes.io.pod.name"},
		{name: "a node that is a path", token: sign(body{"k8s.node": body{"name": "a/b", "uid": "u"}}), jwks: refusal.TokenMalformed, claim: "kubernetes.io.node.name"},

		{name: "other pod UID", token: sign(body{"k8s.pod": body{"name": "web-1", "uid": "old-uid"}}), jwks: refusal.PodRecreated, claim: "kubernetes.io.pod.uid"},
		{name: "a pod that is not there", token: sign(body{"k8s.pod": body{"name": "web-9", "uid": "u"}}), jwks: refusal.PodGone, claim: "kubernetes.io.pod.name"},
		{name: "another node", token: sign(body{"k8s.node": body{"name": "node-2", "uid": "u"}}), jwks: refusal.PodNotOnNode, claim: "kubernetes.io.node.name"},
		{name: "the node was made anew", token: sign(body{"k8s.node": body{"name": "node-1", "uid": "old-uid"}}), jwks: refusal.NodeGone, claim: "kubernetes.io.node.uid"},
		{name: "the account was made anew", token: sign(body{"k8s.serviceaccount": body{"name": "web", "uid": "old-uid"}}), jwks: refusal.ServiceAccountGone, claim: "kubernetes.io.serviceaccount.uid"},
		{name: "a namespace that is not there", token: sign(body{"sub": "system:serviceaccount:bank:web", "k8s.namespace": "bank"}), jwks: refusal.NamespaceGone, claim: "kubernetes.io.namespace"},
	}
}

func TestAttestBadTokens(t *testing.T) {
	for _, mode := range []Mode{TokenReview, JWKS} {
		b := newBench(t, Config{Mode: mode})
		for _, test := range badTokens(t) {
			t.Run(string(mode)+"/"+test.name, func(t *testing.T) {
				if b.keys != nil {
					b.clock.forward(rereadPause) // so that an unknown key id may cause a reading
				}
				want := test.jwks
				if mode == TokenReview && test.review != "" {
					want = test.review
				}
				token := test.token(b.now())
				_, err := b.Attest(t.Context(), attestor.NewToken(token), "meshca")
				var refused *refusal.Error
				if !errors.As(err, &refused) || refused.Reason != want {
					t.Fatalf("got %v, want %s", err, want)
				}
				if test.claim != "" && test.review == "" && refused.Claim != test.claim {
					t.Errorf("the refusal is on %q, want %q", refused.Claim, test.claim)
				}
				for _, part := range strings.Split(token, ".") {
					if len(part) > 20 && strings.Contains(err.Error(), part) {
						t.Errorf("the refusal holds a part of the token: %v", err)
					}
				}
				if len(err.Error()) > 600 {
					t.Errorf("the refusal has %d bytes", len(err.Error()))
				}
			})
		}
		if _, err := b.Attest(t.Context(), usual(b.now()).rs256(t), "meshca-agent"); refusal.Of(err) != refusal.TokenAudience {
			t.Errorf("%s: a workload's token as an agent's: got %v", mode, err)
		}
		if _, err := b.Attest(t.Context(), usual(b.now()).with(body{"aud": []string{""}}).rs256(t), ""); refusal.Of(err) != refusal.TokenAudience {
			t.Errorf("%s: no audience asked for: got %v", mode, err)
		}
	}
}

// What is refused before it is proven must not look proven, and what is refused after must.
func TestEvidenceOfRefusals(t *testing.T) {
	b := newBench(t, Config{Mode: JWKS})
	forged, _ := b.Attest(t.Context(), attestor.NewToken(usual(b.now()).sign(t, jose.RS256, "other", "rsa")), "meshca")
	if forged.Proven || forged.PodName != "web-1" || forged.Identity.ServiceAccount() != "web" {
		t.Errorf("a forged token's own words are kept, unproven: %+v", forged)
	}
	expired, _ := b.Attest(t.Context(), usual(b.now()).with(body{"exp": b.now().Add(-time.Hour).Unix()}).rs256(t), "meshca")
	if !expired.Proven || expired.CredentialID != "token-id" {
		t.Errorf("an expired token's signature is good: %+v", expired)
	}
	odd, err := b.Attest(t.Context(), usual(b.now()).with(body{"sub": "x\ny", "jti": "a\nb", "k8s.pod": body{"name": strings.Repeat("p", 300), "uid": "u"}}).rs256(t), "meshca")
	if err == nil || !odd.Identity.IsZero() || odd.CredentialID != "" || odd.PodName != "" {
		t.Errorf("what can be no name is kept: %+v", odd)
	}
}

func TestMaxTokenAgeIsASetting(t *testing.T) {
	cfg := Config{Mode: JWKS}
	cfg.MaxTokenAge.Duration = 10 * time.Minute
	b := newBench(t, cfg)
	for age, want := range map[time.Duration]refusal.Reason{9 * time.Minute: "", 11 * time.Minute: refusal.TokenTooOld} {
		token := usual(b.now()).with(body{"iat": b.now().Add(-age).Unix()}).rs256(t)
		if _, err := b.Attest(t.Context(), token, "meshca"); refusal.Of(err) != want {
			t.Errorf("%v old: got %v, want %q", age, err, want)
		}
	}
}

func TestIssuer(t *testing.T) {
	for _, mode := range []Mode{TokenReview, JWKS} {
		b := newBench(t, Config{Mode: mode, Issuer: "https://issuer.example"})
		for issuer, want := range map[string]refusal.Reason{"https://issuer.example": "", testIssuer: refusal.TokenIssuer, "https://issuer.example/": refusal.TokenIssuer} {
			if _, err := b.Attest(t.Context(), usual(b.now()).with(body{"iss": issuer}).rs256(t), "meshca"); refusal.Of(err) != want {
				t.Errorf("%s, issuer %s: got %v, want %q", mode, issuer, err, want)
			}
		}
	}
	b := newBench(t, Config{Mode: JWKS}) // the issuer is what the API server says
	if _, err := b.Attest(t.Context(), usual(b.now()).with(body{"iss": "https://issuer.example"}).rs256(t), "meshca"); refusal.Of(err) != refusal.TokenIssuer {
		t.Errorf("a foreign issuer: got %v", err)
	}
}

func TestWithoutLiveness(t *testing.T) {
	cfg := Config{Mode: JWKS, Liveness: LivenessNone}
	b := newBench(t, cfg)
	gone := usual(b.now()).with(body{"k8s.pod": body{"name": "gone", "uid": "u"}})
	ev, err := b.Attest(t.Context(), gone.rs256(t), "meshca")
	if err != nil || ev.NodeUID != "node-uid" {
		t.Errorf("nobody is asked about the pod: got %+v, %v", ev, err)
	}
	for name, node := range map[string]any{"no node": nil, "no name": body{"uid": "u"}, "no UID": body{"name": "node-1"}} {
		if _, err := b.Attest(t.Context(), gone.with(body{"k8s.node": node}).rs256(t), "meshca"); refusal.Of(err) != refusal.NodeUnknown {
			t.Errorf("%s: got %v, want NODE_UNKNOWN", name, err)
		}
	}
	if err := b.Alive(t.Context(), ev); err != nil {
		t.Errorf("nobody is asked: %v", err)
	}
	if n := b.server.count("get pods") + b.server.count("list pods"); n != 0 {
		t.Errorf("the API server was asked about pods %d times", n)
	}
}

func TestPodPhases(t *testing.T) {
	for _, mode := range []Mode{TokenReview, JWKS} {
		b := newBench(t, Config{Mode: mode})
		for name, test := range map[string]struct {
			change func(*corev1.Pod)
			want   refusal.Reason
		}{
			"pending":        {func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }, ""},
			"unknown":        {func(p *corev1.Pod) { p.Status.Phase = corev1.PodUnknown }, ""},
			"succeeded":      {func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, refusal.PodFinished},
			"failed":         {func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, refusal.PodFinished},
			"terminating":    {func(p *corev1.Pod) { p.DeletionTimestamp = deletedAt(time.Now().Add(time.Minute)) }, ""},
			"its time is up": {func(p *corev1.Pod) { p.DeletionTimestamp = deletedAt(time.Now().Add(-time.Second)) }, refusal.PodFinished},
			"on no node":     {func(p *corev1.Pod) { p.Spec.NodeName = "" }, refusal.NodeUnknown},
			"on another":     {func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }, refusal.PodNotOnNode},
			"another pod":    {func(p *corev1.Pod) { p.UID = "u" }, refusal.PodRecreated},
		} {
			b.server.put(pods, aPod(test.change))
			await(t, func() error {
				if _, err := b.Attest(t.Context(), usual(b.now()).rs256(t), "meshca"); refusal.Of(err) != test.want {
					return fmt.Errorf("%s, %s: got %v, want %q", mode, name, err, test.want)
				}
				return nil
			})
		}
		b.server.put(pods, aPod(nil))
		terminating := &corev1.Namespace{ObjectMeta: meta("", "shop", "ns-uid")}
		terminating.DeletionTimestamp = deletedAt(time.Now().Add(time.Hour))
		b.server.put(namespaces, terminating)
		await(t, func() error {
			if _, err := b.Attest(t.Context(), usual(b.now()).rs256(t), "meshca"); refusal.Of(err) != refusal.NamespaceGone {
				return fmt.Errorf("%s: a namespace that terminates: got %v", mode, err)
			}
			return nil
		})
	}
}

func hs256(now time.Time) string {
	der, _ := x509.MarshalPKIXPublicKey(testKeys()["rsa"].Public())
	unsigned := usual(now).unsigned(`{"alg":"HS256","kid":"rsa"}`, nil)
	mac := hmac.New(sha256.New, der)
	mac.Write([]byte(strings.TrimSuffix(unsigned, ".")))
	return usual(now).unsigned(`{"alg":"HS256","kid":"rsa"}`, mac.Sum(nil))
}

// swapPayload puts another pod's claims under the signature.
func swapPayload(token string) string {
	parts := strings.Split(token, ".")
	raw, _ := decodeSegment(parts[1])
	var b body
	_ = json.Unmarshal(raw, &b)
	b["jti"] = "another"
	other := strings.Split(b.unsigned("", nil), ".")
	return parts[0] + "." + other[1] + "." + parts[2]
}
