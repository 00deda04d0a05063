package policy

import (
	"strings"
	"testing"

	"github.com/meshca/meshca/api/refusal"
)

// What was decided under one policy stands under another exactly where the rules up to the one that decided are the same.
func TestStands(t *testing.T) {
	const before = `
rules:
- {name: gold, namespaces: [shop], when: pod.labels.tier == "gold", ttl: 1h}
- {name: shop, namespaces: [shop], dnsNames: ['{serviceAccount}.svc']}
- {name: rest, namespaces: [bank]}
`
	gold := web(nil)
	plain := web(func(in *Input) { in.PodLabels["tier"] = "tin" })
	for name, c := range map[string]struct {
		change      [2]string
		gold, plain bool
	}{
		"nothing":                             {[2]string{"", ""}, true, true},
		"a name":                              {[2]string{"name: gold", "name: golden"}, true, true},
		"a rule for others":                   {[2]string{"rules:", "rules:\n- {namespaces: [kube-*], deny: true}"}, true, true},
		"a rule for others behind it":         {[2]string{"namespaces: [bank]", "namespaces: [bench]"}, true, true},
		"an ID further on":                    {[2]string{"name: shop,", "name: shop, id: '/x',"}, true, false},
		"a condition":                         {[2]string{`"gold"`, `"golden"`}, false, false},
		"a life":                              {[2]string{"ttl: 1h", "ttl: 2h"}, false, false},
		"a DNS name":                          {[2]string{".svc", ".svc.example"}, true, false},
		"a deny":                              {[2]string{"ttl: 1h", "deny: true"}, false, false},
		"a deny further on":                   {[2]string{"dnsNames: ['{serviceAccount}.svc']", "deny: true"}, true, false},
		"direct":                              {[2]string{"ttl: 1h", "ttl: 1h, direct: true"}, false, false},
		"nodeVouched":                         {[2]string{"ttl: 1h", "ttl: 1h, nodeVouched: true"}, false, false},
		"no condition any more":               {[2]string{`when: pod.labels.tier == "gold", `, ""}, false, false},
		"a rule before":                       {[2]string{"rules:", "rules:\n- {when: node.name == \"n\", deny: true}"}, false, false},
		"the rule for the namespace, widened": {[2]string{"namespaces: [shop], when", "namespaces: [shop, bank], when"}, true, true},
		"not for the namespace any more":      {[2]string{"namespaces: [shop], when", "namespaces: [bank], when"}, false, false},
	} {
		was, is := parse(t, before), parse(t, strings.Replace(before, c.change[0], c.change[1], 1))
		for who, x := range map[string]struct {
			in   Input
			want bool
		}{"gold": {gold, c.gold}, "plain": {plain, c.plain}} {
			d, err := was.Decide(t.Context(), x.in)
			if err != nil || d.Basis == 0 || ParseBasis(d.Basis.String()) != d.Basis {
				t.Fatalf("%+v, %v", d, err)
			}
			names := Input{Cluster: x.in.Cluster, Namespace: x.in.Namespace, ServiceAccount: x.in.ServiceAccount}
			if got := is.Stands(names, d.Basis); got != x.want {
				t.Errorf("%s changed: what %s was granted stands: %t, want %t", name, who, got, x.want)
			}
			if x.want { // and then the decision is the same
				if e, err := is.Decide(t.Context(), x.in); err != nil || e.ID != d.ID || e.TTL != d.TTL || e.Basis != d.Basis {
					t.Errorf("%s changed: it stands for %s, and the decision is another: %+v, %v", name, who, e, err)
				}
			}
		}
	}
	plainPolicy := parse(t, "rules: []")
	d, err := plainPolicy.Decide(t.Context(), gold)
	if err != nil || !plainPolicy.Stands(gold, d.Basis) || plainPolicy.Stands(gold, 0) || plainPolicy.Stands(gold, d.Basis+1) {
		t.Errorf("%+v, %v", d, err)
	}
	for _, s := range []string{"", "x", "0123456789abcdeg", "123", "-123456789abcdef"} {
		if b := ParseBasis(s); b != 0 {
			t.Errorf("%q is read as %s", s, b)
		}
	}
}

func TestForesee(t *testing.T) {
	p := parse(t, `
rules:
- {namespaces: [shop], serviceAccounts: [cart], id: /cart}
- {namespaces: [shop], when: pod.labels.tier == "gold", deny: true}
- {namespaces: [shop]}
- {namespaces: [kube-*], deny: true}
`)
	for account, c := range map[string]struct {
		id      string
		certain bool
		want    refusal.Reason
	}{
		"shop/cart": {"/cart", true, ""}, "shop/api": {"", false, ""}, "kube-system/dns": {"", true, refusal.PolicyDenied}, "bank/api": {"", true, refusal.PolicyNoRule},
	} {
		ns, sa, _ := strings.Cut(account, "/")
		d, certain, err := p.Foresee(Input{Cluster: "prod", Namespace: ns, ServiceAccount: sa})
		if certain != c.certain || refusal.Of(err) != c.want || d.ID.Path() != c.id {
			t.Errorf("%s: %+v, %t, %v", account, d, certain, err)
		}
	}
	if d, certain, err := parse(t, "rules: []").Foresee(Input{Cluster: "prod", Namespace: "a", ServiceAccount: "b"}); !certain || err != nil || d.ID.Path() != "/ns/a/sa/b" {
		t.Errorf("the plain policy: %+v, %t, %v", d, certain, err)
	}
}
