package policy

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func one() PolicyContext {
	return PolicyContext{TrustDomain: td, Clusters: []Cluster{{Name: "prod"}}}
}

func parse(t testing.TB, doc string) *Policy {
	t.Helper()
	p, err := Parse([]byte(doc), one())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const rulesDoc = `
rules:
- name: no-system
  namespaces: [kube-*]
  deny: system pods have no business in the mesh
- name: payments
  clusters: [prod]
  namespaces: [payments]
  serviceAccounts: [api, worker-*]
  id: /pay/{serviceAccount}
  ttl: 1h
- namespaces: [batch]
  deny: true
- name: whole-id
  namespaces: [edge]
  id: spiffe://example.org/edge.{cluster}-1/x_{serviceAccount}
- name: first-is-namespace
  namespaces: [meshca, team-*]
  id: /{namespace}/{serviceAccount}
`

func TestDecide(t *testing.T) {
	p := parse(t, rulesDoc)
	if p.Rules() != 5 {
		t.Errorf("Rules() = %d, want 5", p.Rules())
	}
	for _, c := range []struct {
		ns, sa string
		id     string // or the reason
		ttl    time.Duration
		rule   string
		number int
		detail string
	}{
		{ns: "payments", sa: "api", id: "spiffe://example.org/pay/api", ttl: time.Hour, rule: "payments", number: 2},
		{ns: "payments", sa: "worker-7", id: "spiffe://example.org/pay/worker-7", ttl: time.Hour, rule: "payments", number: 2},
		{ns: "edge", sa: "gw.eu", id: "spiffe://example.org/edge.prod-1/x_gw.eu", ttl: DefaultMaxTTL, rule: "whole-id", number: 4},
		{ns: "team-a", sa: "b", id: "spiffe://example.org/team-a/b", ttl: DefaultMaxTTL, rule: "first-is-namespace", number: 5},
		{ns: "kube-system", sa: "coredns", id: "POLICY_DENIED", rule: "no-system", number: 1, detail: `rule 1 "no-system" denies service account kube-system/coredns of cluster prod: system pods have no business in the mesh`},
		{ns: "batch", sa: "x", id: "POLICY_DENIED", rule: "rule 3", number: 3, detail: "rule 3 denies service account batch/x of cluster prod"},
		{ns: "payments", sa: "other", id: "POLICY_NO_RULE", detail: "none of the 5 rules matches service account payments/other of cluster prod"},
		{ns: "meshca", sa: "agent", id: "IDENTITY_RESERVED", rule: "first-is-namespace", number: 5, detail: `rule 5 "first-is-namespace": the ID's path would begin with /meshca, which is reserved for meshca's own parts`},
	} {
		t.Run(c.ns+"/"+c.sa, func(t *testing.T) {
			d, err := p.Decide(t.Context(), Input{Cluster: "prod", Namespace: c.ns, ServiceAccount: c.sa})
			if d.Rule != c.rule || d.Number != c.number {
				t.Errorf("decided by %q (%d), want %q (%d)", d.Rule, d.Number, c.rule, c.number)
			}
			if strings.HasPrefix(c.id, "spiffe://") {
				if err != nil || d.ID.String() != c.id || d.TTL != c.ttl {
					t.Errorf("got %s, %s, %v; want %s, %s", d.ID, d.TTL, err, c.id, c.ttl)
				}
				return
			}
			if got := refusal.Of(err); string(got) != c.id || !d.ID.IsZero() || d.TTL != 0 {
				t.Fatalf("got %s with ID %q and ttl %s, want %s and nothing granted", got, d.ID, d.TTL, c.id)
			}
			if e, _ := refusal.From(err); e.Detail != c.detail {
				t.Errorf("detail\n got %s\nwant %s", e.Detail, c.detail)
			}
		})
	}
}

func TestDefault(t *testing.T) {
	p, err := Default(one())
	if err != nil {
		t.Fatal(err)
	}
	d, err := p.Decide(t.Context(), Input{Cluster: "prod", Namespace: "shop", ServiceAccount: "cart"})
	if err != nil || d.ID.String() != "spiffe://example.org/ns/shop/sa/cart" || d.TTL != 6*time.Hour || d.Rule != DefaultRule || d.Number != 0 {
		t.Errorf("got %+v, %v", d, err)
	}
	written := parse(t, "rules: []")
	if e, err := written.Decide(t.Context(), Input{Cluster: "prod", Namespace: "shop", ServiceAccount: "cart"}); err != nil || e.ID != d.ID {
		t.Errorf("`rules: []` decides %+v, %v; want the default", e, err)
	}
	c := one()
	c.MaxTTL = 20 * time.Second
	short, err := Default(c)
	if err != nil {
		t.Fatal(err)
	}
	if d, _ := short.Decide(t.Context(), Input{Cluster: "prod", Namespace: "shop", ServiceAccount: "cart"}); d.TTL != 20*time.Second {
		t.Errorf("ttl %s, want the configured maximum", d.TTL)
	}
}

// Names that are none never reach an ID, whoever let them through.
func TestDecideBadNames(t *testing.T) {
	p := parse(t, "rules: []")
	good := Input{Cluster: "prod", Namespace: "shop", ServiceAccount: "cart"}
	for _, bad := range []string{
		"", ".", "..", "a/b", "a/../b", "../meshca", "%2e%2e", "a%2fb", "A", "ns\x00", "a b", "ä", "-a", "a-", "a..b", ".a", "a.", "a.-b", "a-.b", "a_b",
		strings.Repeat("a", 254), "{namespace}",
	} {
		for i, in := range []Input{
			{Cluster: bad, Namespace: good.Namespace, ServiceAccount: good.ServiceAccount},
			{Cluster: good.Cluster, Namespace: bad, ServiceAccount: good.ServiceAccount},
			{Cluster: good.Cluster, Namespace: good.Namespace, ServiceAccount: bad},
		} {
			d, err := p.Decide(t.Context(), in)
			if refusal.Of(err) != refusal.IdentityInvalid || !d.ID.IsZero() {
				t.Errorf("%q at %d: got %s, %v; want IDENTITY_INVALID", bad, i, d.ID, err)
			}
			if read, _, err := p.Read(t.Context(), in); read != nil || refusal.Of(err) != refusal.IdentityInvalid {
				t.Errorf("%q at %d: Read gave %v, %v", bad, i, read, err)
			}
		}
	}
}

func TestDecideTooLong(t *testing.T) {
	seg := strings.Repeat("x", 199)
	p := parse(t, "rules: [{id: '"+strings.Repeat("/"+seg, 10)+"/{serviceAccount}'}]")
	fits := 2048 - len("spiffe://example.org") - 10*200 - 1
	if d, err := p.Decide(t.Context(), Input{Cluster: "prod", Namespace: "a", ServiceAccount: strings.Repeat("s", fits)}); err != nil || len(d.ID.String()) != 2048 {
		t.Errorf("2048 bytes: %d, %v", len(d.ID.String()), err)
	}
	if _, err := p.Decide(t.Context(), Input{Cluster: "prod", Namespace: "a", ServiceAccount: strings.Repeat("s", fits+1)}); refusal.Of(err) != refusal.IdentityInvalid {
		t.Errorf("2049 bytes: %v, want IDENTITY_INVALID", err)
	}
}

func TestRead(t *testing.T) {
	p := parse(t, rulesDoc)
	read, d, err := p.Read(t.Context(), Input{Cluster: "prod", Namespace: "payments", ServiceAccount: "api"})
	if err != nil || d.Rule != "payments" {
		t.Fatalf("%+v, %v", d, err)
	}
	want := []Reading{
		{1, "no-system", false, "namespace payments is not among kube-*", ""},
		{2, "payments", true, "it matches and grants /pay/{serviceAccount} for 1h0m0s", ""},
	}
	if fmt.Sprint(read) != fmt.Sprint(want) {
		t.Errorf("got %v\nwant %v", read, want)
	}
	read, _, err = p.Read(t.Context(), Input{Cluster: "prod", Namespace: "payments", ServiceAccount: "x"})
	if refusal.Of(err) != refusal.PolicyNoRule || len(read) != 5 || read[1].Why != "service account x is not among api, worker-*" {
		t.Errorf("got %v, %v", read, err)
	}
	read, _, err = p.Read(t.Context(), Input{Cluster: "prod", Namespace: "batch", ServiceAccount: "x"})
	if refusal.Of(err) != refusal.PolicyDenied || len(read) != 3 || !read[2].Matched || read[2].Why != "it matches and denies" {
		t.Errorf("got %v, %v", read, err)
	}
	plain := parse(t, "rules: []")
	if read, d, err := plain.Read(t.Context(), Input{Cluster: "prod", Namespace: "a", ServiceAccount: "b"}); err != nil || len(read) != 1 || !read[0].Matched || d.ID.Path() != "/ns/a/sa/b" {
		t.Errorf("got %v, %+v, %v", read, d, err)
	}
}

func TestPatternMatch(t *testing.T) {
	for _, c := range []struct {
		glob, name string
		want       bool
	}{
		{"a", "a", true}, {"a", "ab", false}, {"*", "", true}, {"*", "x", true}, {"a*", "a", true}, {"a*", "ba", false},
		{"*-db", "x-db", true}, {"*-db", "x-dbs", false}, {"a*c*e", "abcde", true}, {"a*c*e", "ace", true}, {"a*c*e", "acd", false},
		{"a*ab", "aab", true}, {"a*ab", "aaab", true}, {"*a*", "bab", true}, {"**", "x", true}, {"a**b", "ab", true}, {"a**b", "a", false},
		{"*abc*abd", "abcabcabd", true},
	} {
		p, err := parsePattern(c.glob)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.match(c.name); got != c.want {
			t.Errorf("%q matches %q: %t, want %t", c.glob, c.name, got, c.want)
		}
	}
}
