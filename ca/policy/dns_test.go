package policy

import (
	"slices"
	"strings"
	"testing"

	"github.com/meshca/meshca/api/refusal"
)

func TestDNSNames(t *testing.T) {
	p := parse(t, `rules: [{name: r, dnsNames: [
		'{serviceAccount}.{namespace}.svc', '{serviceAccount}.{namespace}.svc.{cluster}.local', 'x-{namespace}-y', fixed, '{serviceAccount}.shop.svc', a-1.b--2.example]}]`)
	d, err := p.Decide(t.Context(), web(nil))
	want := []string{"cart.shop.svc", "cart.shop.svc.prod.local", "x-shop-y", "fixed", "a-1.b--2.example"}
	if err != nil || !slices.Equal(d.DNSNames, want) { // cart.shop.svc is yielded twice, and granted once
		t.Errorf("granted %q, %v; want %q", d.DNSNames, err, want)
	}
	for account, says := range map[string]string{
		"cart.v2":                "has one label for {serviceAccount}, and cart.v2 holds a dot",
		strings.Repeat("c", 64):  "is longer than 63 bytes",
		strings.Repeat("c", 253): "a DNS name 253 at most",
	} {
		d, err := p.Decide(t.Context(), web(func(in *Input) { in.ServiceAccount = account }))
		if refusal.Of(err) != refusal.DNSNameInvalid || !strings.Contains(err.Error(), says) || len(d.DNSNames) > 0 || !d.ID.IsZero() {
			t.Errorf("%.70s: %+v, %v", account, d, err)
		}
	}
	for doc, in := range map[string]Input{
		`rules: [{dnsNames: ['{namespace}']}]`:                                              web(func(in *Input) { in.Namespace = "10" }),
		`rules: [{dnsNames: ['10.0.0.{namespace}']}]`:                                       web(func(in *Input) { in.Namespace = "1" }),
		`rules: [{dnsNames: ['` + strings.Repeat("a123456789.", 20) + `{namespace}.svc']}]`: web(func(in *Input) { in.Namespace = strings.Repeat("n", 60) }),
	} {
		if d, err := parse(t, doc).Decide(t.Context(), in); refusal.Of(err) != refusal.DNSNameInvalid {
			t.Errorf("%.60s for %s: %+v, %v", doc, in.Namespace, d, err)
		}
	}
}

func TestDNSNamesThatAreNotTaken(t *testing.T) {
	for name, want := range map[string]string{
		`''`:                                 "not a DNS name of 1 to 253 bytes",
		`'*.shop.svc'`:                       "has a wildcard",
		`'{namespace}.*'`:                    "has a wildcard",
		`Shop.svc`:                           `it holds 'S'`,
		`a_b.svc`:                            `it holds '_'`,
		`a b`:                                `it holds ' '`,
		`ä.svc`:                              "it holds",
		`.svc`:                               "empty label",
		`shop..svc`:                          "empty label",
		`shop.svc.`:                          "empty label",
		`-a.svc`:                             "begins or ends with a dash",
		`a-.svc`:                             "begins or ends with a dash",
		`'{namespace}-.svc'`:                 "begins or ends with a dash",
		`10.0.0.1`:                           "its last label is a number",
		`'{pod}.svc'`:                        "unknown placeholder {pod}",
		`'{serviceAccount}-{namespace}.svc'`: "two placeholders",
		`'{namespace.svc'`:                   "{ has no }",
		`'namespace}.svc'`:                   `it holds '}'`,
		strings.Repeat("a", 64):              "is longer than 63 bytes",
		"'" + strings.Repeat("a", 63) + "{namespace}'": "is longer than 63 bytes",
		strings.Repeat("a123456789.", 23) + "svc":      "a DNS name 253 at most",
		`null`: "an entry is empty",
	} {
		_, err := Parse([]byte("rules: [{name: r, dnsNames: ["+name+"]}]"), one())
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), `policy: rule 1 "r": dnsNames: `) {
			t.Errorf("%.80s: got %v, want it to say %q", name, err, want)
		}
	}
	for list, want := range map[string]string{
		"[]": "0 names; 1 to 16", "a.b": "must be a list", "[" + strings.Repeat("a.b,", 17) + "]": "17 names; 1 to 16",
	} {
		_, err := Parse([]byte("rules: [{dnsNames: "+list+"}]"), one())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40s: got %v, want it to say %q", list, err, want)
		}
	}
}
