package kubernetes

import (
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

// An end is exact. A beginning has a leeway, for an API server whose clock is ahead of ours.
func TestEdgesOfTime(t *testing.T) {
	const issuedAt = 1_800_000_000
	at := func(offset time.Duration) time.Time { return time.Unix(issuedAt, 0).Add(offset) }
	moment := time.Nanosecond
	for name, test := range map[string]struct {
		nbf, iat, exp seconds
		now           time.Time
		want          refusal.Reason
		claim         string
	}{
		"at its issue":               {issuedAt, issuedAt, issuedAt + 600, at(0), "", ""},
		"just before its end":        {issuedAt, issuedAt, issuedAt + 600, at(600*time.Second - moment), "", ""},
		"at its end":                 {issuedAt, issuedAt, issuedAt + 600, at(600 * time.Second), refusal.TokenExpired, "exp"},
		"just after its end":         {issuedAt, issuedAt, issuedAt + 600, at(600*time.Second + moment), refusal.TokenExpired, "exp"},
		"29 s after its end":         {issuedAt, issuedAt, issuedAt + 600, at(629 * time.Second), refusal.TokenExpired, "exp"},
		"30 s before nbf":            {issuedAt + 60, issuedAt, issuedAt + 600, at(30 * time.Second), "", ""},
		"more than 30 s before nbf":  {issuedAt + 60, issuedAt, issuedAt + 600, at(30*time.Second - moment), refusal.TokenNotYetValid, "nbf"},
		"30 s before iat":            {0, issuedAt, issuedAt + 600, at(-30 * time.Second), "", ""},
		"more than 30 s before iat":  {0, issuedAt, issuedAt + 600, at(-30*time.Second - moment), refusal.TokenNotYetValid, "iat"},
		"as old as it may be":        {issuedAt, issuedAt, issuedAt + 9000, at(time.Hour), "", ""},
		"a moment older":             {issuedAt, issuedAt, issuedAt + 9000, at(time.Hour + moment), refusal.TokenTooOld, "iat"},
		"its end within the leeway":  {issuedAt, issuedAt, issuedAt - 10, at(-20 * time.Second), "", ""},
		"its end before its issue":   {issuedAt, issuedAt, issuedAt - 10, at(0), refusal.TokenExpired, "exp"},
		"no end, and long past":      {issuedAt, issuedAt, 0, at(0), refusal.TokenNoExpiry, "exp"},
		"an end, but no time before": {0, 0, issuedAt + 600, at(0), refusal.TokenTooOld, "iat"},
	} {
		c := claims{Subject: "system:serviceaccount:shop:web", Audience: audiences{"meshca"}, Not: test.nbf, Issued: test.iat, Expiry: test.exp}
		c.Kubernetes.Namespace = "shop"
		c.Kubernetes.ServiceAccount = reference{"web", "sa-uid"}
		c.Kubernetes.Pod = reference{"web-1", "pod-uid"}
		refused := c.check("", "meshca", time.Hour, test.now)
		switch {
		case refused == nil && test.want != "", refused != nil && (refused.Reason != test.want || refused.Claim != test.claim):
			t.Errorf("%s: got %v, want %q on %q", name, refused, test.want, test.claim)
		}
	}
}

// A token for us and for others is nobody's proof: it is good in neither of our two roles. The refusal says what it has,
// and what to write where.
func TestAudienceIsExact(t *testing.T) {
	for _, mode := range []Mode{TokenReview, JWKS} {
		b := newBench(t, Config{Mode: mode})
		token := usual(b.now()).with(body{"aud": []string{testIssuer, "meshca", "meshca-agent"}}).rs256(t)
		for _, role := range []string{"meshca", "meshca-agent"} {
			_, err := b.Attest(t.Context(), token, role)
			if refusal.Of(err) != refusal.TokenAudience {
				t.Errorf("%s, as %s: got %v, want TOKEN_AUDIENCE", mode, role, err)
				continue
			}
			for _, part := range []string{`"` + testIssuer + `", "meshca", "meshca-agent"`, "`audience: " + role + "`", "`audiences: [" + role + "]`", "serviceAccountToken", "TokenRequest"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%s, as %s: the refusal does not say %s: %v", mode, role, part, err)
				}
			}
			if _, err := b.Attest(t.Context(), usual(b.now()).with(body{"aud": []string{role}}).rs256(t), role); err != nil {
				t.Errorf("%s, %s alone: %v", mode, role, err)
			}
		}
	}
}
