package kubernetes

import (
	"errors"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4/json"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// leeway is by how much the API server's clock may be ahead of ours before nbf and iat refuse a token that it made just
// now. An end has no leeway: a token that has expired at our clock is expired, and whoever holds it had time to replace it.
const leeway = 30 * time.Second

const subjectPrefix = "system:serviceaccount:"

// claims are those of a service-account token (k8s.io/kubernetes/pkg/serviceaccount/claims.go).
type claims struct {
	Issuer   string    `json:"iss"`
	Subject  string    `json:"sub"`
	Audience audiences `json:"aud"`
	Expiry   seconds   `json:"exp"`
	Not      seconds   `json:"nbf"`
	Issued   seconds   `json:"iat"`
	ID       string    `json:"jti"`

	Kubernetes struct {
		Namespace      string    `json:"namespace"`
		ServiceAccount reference `json:"serviceaccount"`
		Pod            reference `json:"pod"`
		Node           reference `json:"node"`
	} `json:"kubernetes.io"`
}

type reference struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// audiences are one string or several (RFC 7519 §4.1.3).
type audiences []string

func (a *audiences) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		*a = make(audiences, 1)
		return json.Unmarshal(b, &(*a)[0])
	}
	return json.Unmarshal(b, (*[]string)(a))
}

// only tells whether this one audience is named, and no other: a token that is good elsewhere too can be brought here by
// whoever it is shown to there.
func (a audiences) only(one string) bool { return one != "" && len(a) == 1 && a[0] == one }

// String is for the detail of a refusal: a stranger's text, so a few of them, and short.
func (a audiences) String() string {
	const most = 4
	if len(a) == 0 {
		return "nobody in particular"
	}
	var shown []string
	for _, s := range a[:min(len(a), most)] {
		shown = append(shown, quoted(s))
	}
	if len(a) > most {
		shown = append(shown, "…")
	}
	return strings.Join(shown, ", ")
}

// seconds is a NumericDate (RFC 7519 §2); zero is one that is not there.
type seconds int64

func (s *seconds) UnmarshalJSON(b []byte) error {
	var f float64
	if err := json.Unmarshal(b, &f); err != nil {
		return err
	}
	if f < 0 || f > 253402300799 { // the year 9999
		return errors.New("a time out of all range")
	}
	*s = seconds(f)
	return nil
}

func (s seconds) time() time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(int64(s), 0)
}

// parseClaims reads a token's payload. Names are matched exactly, and one that is repeated is an error.
func parseClaims(payload []byte) (claims, *refusal.Error) {
	c, ok := plainClaims(payload)
	if ok {
		return c, nil
	}
	c = claims{}
	if err := json.Unmarshal(payload, &c); err != nil {
		return claims{}, refusal.New(refusal.TokenMalformed, "the token's payload is not a JSON object with the claims of a service-account token")
	}
	return c, nil
}

// check holds the claims against the rules that need nobody else: issuer (empty: any), audience, times, and whose token
// it is. It returns what they say.
func (c *claims) check(issuer, audience string, maxAge time.Duration, now time.Time) *refusal.Error {
	if issuer != "" && c.Issuer != issuer {
		return refusal.New(refusal.TokenIssuer, "the token's issuer is %s, the cluster's is %q", quoted(c.Issuer), issuer).On("iss")
	}
	if !c.Audience.only(audience) {
		return refusal.New(refusal.TokenAudience, "the token is for %s; it must be for %q alone: write `audience: %s` into its serviceAccountToken "+
			"projection, or `audiences: [%s]` into the TokenRequest", c.Audience, audience, audience, audience).On("aud")
	}
	switch expiry, notBefore, issued := c.Expiry.time(), c.Not.time(), c.Issued.time(); {
	case expiry.IsZero():
		return refusal.New(refusal.TokenNoExpiry, "the token does not expire").On("exp")
	case !now.Before(expiry): // RFC 7519 §4.1.4: on or after it
		return refusal.New(refusal.TokenExpired, "the token expired %v ago", now.Sub(expiry).Round(time.Second)).On("exp")
	case now.Before(notBefore.Add(-leeway)):
		return refusal.New(refusal.TokenNotYetValid, "the token is valid in %v", notBefore.Sub(now).Round(time.Second)).On("nbf")
	case now.Before(issued.Add(-leeway)):
		return refusal.New(refusal.TokenNotYetValid, "the token was issued %v from now", issued.Sub(now).Round(time.Second)).On("iat")
	case issued.IsZero():
		return refusal.New(refusal.TokenTooOld, "the token does not say when it was issued").On("iat")
	case now.After(issued.Add(maxAge)):
		return refusal.New(refusal.TokenTooOld, "the token was issued %v ago, at most %v are allowed", now.Sub(issued).Round(time.Second), maxAge).On("iat")
	}
	return c.checkSubject()
}

// checkSubject holds the claims about objects against each other, and their names against Kubernetes' rules.
func (c *claims) checkSubject() *refusal.Error {
	k := &c.Kubernetes
	namespace, name, ok := splitSubject(c.Subject)
	switch {
	case !ok:
		return refusal.New(refusal.TokenNotServiceAccount, "the token's subject is %s", quoted(c.Subject)).On("sub")
	case k.Pod.Name == "" || bounded(k.Pod.UID) == "":
		return refusal.New(refusal.TokenUnbound, "the token of %s/%s names no pod", namespace, name).On("kubernetes.io.pod")
	case k.Namespace != namespace:
		return refusal.New(refusal.TokenNotServiceAccount, "the token's subject is %q, but its namespace claim is %s", c.Subject, quoted(k.Namespace)).On("kubernetes.io.namespace")
	case k.ServiceAccount.Name != name:
		return refusal.New(refusal.TokenNotServiceAccount, "the token's subject is %q, but its service account claim is %s", c.Subject, quoted(k.ServiceAccount.Name)).On("kubernetes.io.serviceaccount.name")
	case bounded(k.ServiceAccount.UID) == "":
		return refusal.New(refusal.TokenNotServiceAccount, "the token does not say which %s/%s it is for", namespace, name).On("kubernetes.io.serviceaccount.uid")
	case !validName(k.Pod.Name):
		return refusal.New(refusal.TokenMalformed, "no pod can be called %s", quoted(k.Pod.Name)).On("kubernetes.io.pod.name")
	case k.Node.Name != "" && !validName(k.Node.Name):
		return refusal.New(refusal.TokenMalformed, "no node can be called %s", quoted(k.Node.Name)).On("kubernetes.io.node.name")
	}
	return nil
}

// validName tells whether s can be a pod's or a node's name: an RFC 1123 subdomain, as a service account's is.
func validName(s string) bool {
	_, err := attestor.NewIdentity("c", "n", s)
	return err == nil
}

// splitSubject takes `system:serviceaccount:<namespace>:<name>` apart. Names with a colon are no names.
func splitSubject(subject string) (namespace, name string, ok bool) {
	rest, ok := strings.CutPrefix(subject, subjectPrefix)
	if !ok {
		return "", "", false
	}
	namespace, name, ok = strings.Cut(rest, ":")
	if !ok {
		return "", "", false
	}
	if _, err := attestor.NewIdentity("c", namespace, name); err != nil {
		return "", "", false
	}
	return namespace, name, true
}

// evidence is what the claims say. What has no valid identity is left without one.
func (c *claims) evidence(cluster, method string) attestor.Evidence {
	k := &c.Kubernetes
	e := attestor.Evidence{
		Method:            method,
		ServiceAccountUID: kept(k.ServiceAccount.UID),
		PodName:           kept(k.Pod.Name), PodUID: kept(k.Pod.UID),
		NodeName: kept(k.Node.Name), NodeUID: kept(k.Node.UID),
		CredentialID: kept(c.ID),
		IssuedAt:     c.Issued.time(), ExpiresAt: c.Expiry.time(),
	}
	if namespace, name, ok := splitSubject(c.Subject); ok {
		e.Identity, _ = attestor.NewIdentity(cluster, strings.Clone(namespace), strings.Clone(name))
	}
	return e
}

// kept is bounded, as a copy: the claims are parts of the token's payload, all of which they would hold in memory for as
// long as evidence is remembered.
func kept(s string) string { return strings.Clone(bounded(s)) }

// bounded drops what no object's name or UID can be, so that a stranger's text ends here.
func bounded(s string) string {
	if len(s) > 253 {
		return ""
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return ""
		}
	}
	return s
}
