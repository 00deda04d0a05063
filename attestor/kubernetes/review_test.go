package kubernetes

import (
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// An API server that ignores audiences, authenticates users, or is otherwise not what it should be, proves nothing.
func TestTokenReviewAnswers(t *testing.T) {
	b := newBench(t, Config{})
	for name, test := range map[string]struct {
		change func(*authenticationv1.TokenReviewStatus)
		want   refusal.Reason
	}{
		"as it should be":              {func(*authenticationv1.TokenReviewStatus) {}, ""},
		"audiences ignored":            {func(s *authenticationv1.TokenReviewStatus) { s.Audiences = nil }, refusal.TokenAudience},
		"other audiences":              {func(s *authenticationv1.TokenReviewStatus) { s.Audiences = []string{"https://kubernetes.default.svc"} }, refusal.TokenAudience},
		"more than was asked":          {func(s *authenticationv1.TokenReviewStatus) { s.Audiences = []string{"meshca", "meshca-agent"} }, refusal.TokenAudience},
		"a prefix":                     {func(s *authenticationv1.TokenReviewStatus) { s.Audiences = []string{"meshca-agent", "mesh"} }, refusal.TokenAudience},
		"not authenticated":            {func(s *authenticationv1.TokenReviewStatus) { s.Authenticated = false }, refusal.TokenRejected},
		"a user":                       {func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "alice" }, refusal.TokenNotServiceAccount},
		"extra colons":                 {func(s *authenticationv1.TokenReviewStatus) { s.User.Username += ":x" }, refusal.TokenNotServiceAccount},
		"a node's user":                {func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "system:node:node-1" }, refusal.TokenNotServiceAccount},
		"another account":              {func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "system:serviceaccount:shop:admin" }, refusal.TokenRejected},
		"another account of that name": {func(s *authenticationv1.TokenReviewStatus) { s.User.UID = "u" }, refusal.TokenRejected},
		"another pod":                  {func(s *authenticationv1.TokenReviewStatus) { s.User.Extra[extraPodUID] = []string{"u"} }, refusal.TokenRejected},
		"two pods":                     {func(s *authenticationv1.TokenReviewStatus) { s.User.Extra[extraPodUID] = []string{"pod-uid", "u"} }, refusal.TokenUnbound},
		"no pod":                       {func(s *authenticationv1.TokenReviewStatus) { delete(s.User.Extra, extraPodName) }, refusal.TokenUnbound},
		"no node: the pod tells it": {func(s *authenticationv1.TokenReviewStatus) {
			delete(s.User.Extra, extraNodeName)
			delete(s.User.Extra, extraNodeUID)
		}, ""},
		"another node":       {func(s *authenticationv1.TokenReviewStatus) { s.User.Extra[extraNodeName] = []string{"node-2"} }, refusal.PodNotOnNode},
		"a node of old":      {func(s *authenticationv1.TokenReviewStatus) { s.User.Extra[extraNodeUID] = []string{"u"} }, refusal.NodeGone},
		"no credential id":   {func(s *authenticationv1.TokenReviewStatus) { delete(s.User.Extra, extraCredentialID) }, ""},
		"a node that is odd": {func(s *authenticationv1.TokenReviewStatus) { s.User.Extra[extraNodeName] = []string{"../x"} }, refusal.NodeUnknown},
	} {
		b.server.do(func() { b.server.review = test.change })
		ev, err := b.Attest(t.Context(), usual(b.now()).rs256(t), "meshca")
		if refusal.Of(err) != test.want {
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
		if err == nil && (ev.NodeName != "node-1" || ev.NodeUID != "node-uid" || ev.CredentialID != "token-id") {
			t.Errorf("%s: %+v", name, ev)
		}
	}
}

// What a token says of itself can refuse it before the API server is asked: strangers' nonsense costs it no call.
func TestNonsenseCostsNoCall(t *testing.T) {
	b := newBench(t, Config{Issuer: testIssuer})
	calls := func() int { return b.server.count("tokenreviews") + b.liveReads() }
	tried := 0
	for _, test := range badTokens(t) {
		if test.review == refusal.TokenRejected || strings.HasPrefix(string(test.jwks), "POD_") || strings.HasSuffix(string(test.jwks), "_GONE") {
			continue // the API server alone knows
		}
		before := calls()
		_, err := b.Attest(t.Context(), attestor.NewToken(test.token(b.now())), "meshca")
		if refusal.Of(err) != test.jwks || calls() != before {
			t.Errorf("%s: got %v after %d calls, want %s without one", test.name, err, calls()-before, test.jwks)
		}
		tried++
	}
	if tried < 40 {
		t.Errorf("only %d tokens were tried", tried)
	}
	before := calls()
	if _, err := b.Attest(t.Context(), usual(b.now()).with(body{"iss": "https://elsewhere"}).rs256(t), "meshca"); refusal.Of(err) != refusal.TokenIssuer || calls() != before {
		t.Errorf("another's issuer: got %v after %d calls", err, calls()-before)
	}
	if _, err := b.Attest(t.Context(), usual(b.now()).rs256(t), "meshca"); err != nil || calls() == before {
		t.Errorf("a good token: got %v after %d calls", err, calls()-before)
	}
}
