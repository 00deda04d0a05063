package policy

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
)

func TestParseRefuses(t *testing.T) {
	rule := func(body string) string { return "rules: [{name: r, " + body + "}]" }
	for name, c := range map[string]struct{ doc, want string }{
		"empty file":        {"", "for the plain ID for all write `rules: []`"},
		"no mapping":        {"[]", "must be a mapping"},
		"no rules key":      {"{}", "for the plain ID for all write `rules: []`"},
		"null rules":        {"rules:", "for the plain ID for all write `rules: []`"},
		"rules no list":     {"rules: {}", "rules must be a list"},
		"rule no mapping":   {"rules: [a]", "rules must be a list of rules"},
		"not YAML":          {"rules: [", "not YAML"},
		"duplicate key":     {"rules: []\nrules: []", `key "rules" already set`},
		"duplicate in rule": {"rules: [{ttl: 1h, ttl: 2h}]", `key "ttl" already set`},
		"two documents":     {"rules: []\n---\nrules: [{name: r, deny: true}]\n", "several YAML documents"},
		"unknown top key":   {"rules: []\nrule: []", `unknown key "rule" at the top`},
		"unknown key":       {rule("labels: {}"), `rule 1 "r": unknown key "labels"`},
		"case of a key":     {rule("TTL: 1h"), `unknown key "TTL"`},
		"condition":         {rule("condition: 'true'"), `unknown key "condition"`},
		"direct as text":    {rule("direct: 'yes'"), `direct: must be true or false`},
		"nodeVouched null":  {rule("nodeVouched: "), `nodeVouched: must be true or false`},
		"serverKeys number": {rule("serverKeys: 1"), `serverKeys: must be true or false`},
		"deny and direct":   {rule("deny: true, direct: true"), `it has deny and a grant (direct)`},
		"deny and DNS":      {rule("deny: true, dnsNames: [a.b]"), `it has deny and a grant (dnsNames)`},
		"names twice":       {"rules: [{name: a, namespaces: [x]}, {name: a}]", `rules 1 and 2 are both called "a"`},
		"name of default":   {"rules: [{name: default}]", `rule 1: name: "default"`},
		"name like ours":    {"rules: [{name: rule 7}]", `name: "rule 7"`},
		"name empty":        {"rules: [{name: ''}]", "name: "},
		"name null":         {"rules: [{name: }]", "name: must be text"},
		"name escapes":      {"rules: [{name: \"a\\e[31m\"}]", "does not print"},
		"name bidi":         {"rules: [{name: \"a\\u202eb\"}]", "does not print"},
		"name too long":     {"rules: [{name: " + strings.Repeat("n", 64) + "}]", "1 to 63 bytes"},

		"namespaces null":      {rule("namespaces: "), "namespaces: the list is empty"},
		"namespaces empty":     {rule("namespaces: []"), "leave the key out to match all"},
		"namespaces text":      {rule("namespaces: a"), "must be a list of names or globs"},
		"namespaces number":    {rule("namespaces: [1]"), "must be a list of names or globs"},
		"namespaces null item": {rule("namespaces: [null]"), "an entry is empty"},
		"namespaces no item":   {rule("namespaces: ['']"), "1 to 253"},
		"upper case":           {rule("namespaces: [Kube]"), `holds 'K'`},
		"class glob":           {rule("namespaces: ['[ab]*']"), `holds '['`},
		"question mark":        {rule("serviceAccounts: ['a?']"), `holds '?'`},
		"slash":                {rule("serviceAccounts: [ns/sa]"), `holds '/'`},
		"too many stars":       {rule("serviceAccounts: ['" + strings.Repeat("*a", 9) + "']"), "9 wildcards"},
		"pattern too long":     {rule("serviceAccounts: [" + strings.Repeat("a", 254) + "]"), "1 to 253"},
		"too many patterns":    {rule("serviceAccounts: [" + strings.Repeat("a,", 201) + "]"), "201 entries; the most is 200"},
		"unknown cluster":      {rule("clusters: [prd]"), `clusters: "prd" matches no cluster`},

		"ttl number":      {rule("ttl: 3600"), "ttl: must be text"},
		"ttl bad":         {rule("ttl: 1 hour"), "is not a duration"},
		"ttl zero":        {rule("ttl: 0s"), "too short"},
		"ttl negative":    {rule("ttl: -1h"), "too short"},
		"ttl too short":   {rule("ttl: 4s"), "at least 5s"},
		"ttl over":        {rule("ttl: 6h1s"), "over the CA's maximum of 6h0m0s"},
		"ttl overflow":    {rule("ttl: 99999999999h"), "is not a duration"},
		"deny number":     {rule("deny: 1"), "deny: must be true, or the reason"},
		"deny empty":      {rule("deny: ''"), "deny: must be true, or the reason"},
		"deny null":       {rule("deny: "), "deny: must be true, or the reason"},
		"deny long":       {rule("deny: " + strings.Repeat("x", 201)), "1 to 200 bytes"},
		"deny newline":    {rule(`deny: "a\nb"`), "does not print"},
		"deny with id":    {rule("deny: true, id: /a"), "it has deny and a grant"},
		"deny with ttl":   {rule("deny: why, ttl: 1h"), "it has deny and a grant"},
		"too many rules":  {"rules: [" + strings.Repeat("{},", 1001) + "]", "1001 rules; the most is 1000"},
		"too large":       {"#" + strings.Repeat("x", MaxBytes) + "\nrules: []", "the most is 262144"},
		"id null":         {rule("id: "), "id: must be text"},
		"id empty":        {rule("id: ''"), "must be a path that begins with /"},
		"id root":         {rule("id: /"), "must be a path that begins with /"},
		"id relative":     {rule("id: a/b"), "must be a path that begins with /"},
		"id trust domain": {rule("id: 'spiffe://example.org'"), "must be a path that begins with /"},
		"id foreign":      {rule("id: 'spiffe://other.org/a'"), `is for trust domain "other.org"`},
		"id upper td":     {rule("id: 'spiffe://Example.org/a'"), `is for trust domain "Example.org"`},
		"id other scheme": {rule("id: 'https://example.org/a'"), "must be a path that begins with /"},
		"id dots":         {rule("id: /a/../b"), "dot segments"},
		"id dot":          {rule("id: /a/."), "dot segments"},
		"id empty seg":    {rule("id: /a//b"), "empty segment"},
		"id end slash":    {rule("id: /a/"), "empty segment"},
		"id percent":      {rule("id: /a%2fb"), "percent sign"},
		"id NUL":          {rule(`id: "/a\0b"`), "NUL byte"},
		"id space":        {rule("id: /a b"), `the byte ' '`},
		"id query":        {rule("id: '/a?b'"), `the byte '?'`},
		"id fragment":     {rule("id: '/a#b'"), `the byte '#'`},
		"id unicode":      {rule("id: /ä"), "the byte"},
		"id reserved":     {rule("id: /meshca/server"), "reserved"},
		"id reserved td":  {rule("id: 'spiffe://example.org/meshca'"), "reserved"},
		"id unknown hole": {rule("id: '/{pod}'"), "unknown placeholder {pod}"},
		"id empty hole":   {rule("id: '/{}'"), "unknown placeholder {}"},
		"id hole case":    {rule("id: '/{Namespace}'"), "unknown placeholder {Namespace}"},
		"id hole spaces":  {rule("id: '/{ namespace }'"), "unknown placeholder"},
		"id open":         {rule("id: '/{namespace'"), "{ has no }"},
		"id close":        {rule("id: '/namespace}'"), "a } without a {"},
		"id close after":  {rule("id: '/{namespace}}'"), "a } without a {"},
		"id nested":       {rule("id: '/{{namespace}}'"), "unknown placeholder"},
		"id split hole":   {rule("id: '/{name/space}'"), "{ has no }"},
		"id two holes":    {rule("id: '/{namespace}-{serviceAccount}'"), "two placeholders"},
		"id too long":     {rule("id: /" + strings.Repeat("a", 2048)), "a SPIFFE ID has 2048 at most"},
		"id too long td":  {rule("id: /" + strings.Repeat("a", 2040)), "its literal text and the trust domain alone"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := Parse([]byte(c.doc), one())
			if err == nil || p != nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "policy: ") {
				t.Errorf("got %v\nwant it to say %q", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("the error has several lines: %q", err)
			}
			if err != nil && len(err.Error()) > 400 {
				t.Errorf("the error has %d bytes: it repeats too much of the input", len(err.Error()))
			}
		})
	}
}

func TestParseContext(t *testing.T) {
	if _, err := Parse([]byte("rules: []"), PolicyContext{}); err == nil || !strings.Contains(err.Error(), "no trust domain") {
		t.Errorf("no trust domain: %v", err)
	}
	if _, err := Default(PolicyContext{TrustDomain: td, MaxTTL: -1}); err == nil || !strings.Contains(err.Error(), "too short") {
		t.Errorf("negative maximum: %v", err)
	}
	// Away from its CA a policy is read without its clusters.
	p, err := Parse([]byte("rules: [{clusters: [elsewhere], namespaces: [a], deny: false, ttl: 6h}]"), PolicyContext{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	if d, err := p.Decide(t.Context(), Input{Cluster: "elsewhere", Namespace: "a", ServiceAccount: "b"}); err != nil || d.TTL != 6*time.Hour {
		t.Errorf("got %+v, %v", d, err)
	}
}

func TestClustersApart(t *testing.T) {
	pair := []Cluster{{Name: "eu"}, {Name: "us"}}
	same := []Cluster{{Name: "eu", SameNamespaces: true}, {Name: "us", SameNamespaces: true}}
	half := []Cluster{{Name: "eu", SameNamespaces: true}, {Name: "us"}}
	third := []Cluster{{Name: "eu", SameNamespaces: true}, {Name: "us", SameNamespaces: true}, {Name: "asia"}}
	for name, c := range map[string]struct {
		doc      string
		clusters []Cluster
		collide  string // part of the error; empty: fine
	}{
		"default":                      {"rules: []", pair, "clusters eu and us could be given the same ID by the default policy"},
		"default, same said":           {"rules: []", same, ""},
		"default, one says it":         {"rules: []", half, "clusters eu and us"},
		"default, a third is silent":   {"rules: []", third, "clusters eu and asia"},
		"default template in a rule":   {"rules: [{namespaces: [a]}]", pair, "by rule 1 (/ns/{namespace}/sa/{serviceAccount}"},
		"cluster in it":                {"rules: [{id: '/{cluster}/{namespace}/{serviceAccount}'}]", pair, ""},
		"cluster in a mix":             {"rules: [{id: '/k8s-{cluster}/{namespace}/{serviceAccount}'}]", pair, ""},
		"default in one only":          {"rules: [{clusters: [eu]}]", pair, ""},
		"default and prefixed":         {"rules: [{clusters: [eu]}, {id: '/{cluster}/{namespace}/sa/{serviceAccount}'}]", pair, ""},
		"prefixed by a name it fakes":  {"rules: [{clusters: [eu], id: '/{namespace}/{serviceAccount}'}, {clusters: [us], id: '/{cluster}/{serviceAccount}'}]", pair, "rule 1 and rule 2"},
		"hole against affixes":         {"rules: [{clusters: [eu], id: '/{namespace}'}, {clusters: [us], id: '/x-{serviceAccount}'}]", pair, "rule 1 and rule 2"},
		"affixes that differ":          {"rules: [{clusters: [eu], id: '/a-{namespace}'}, {clusters: [us], id: '/b-{namespace}'}]", pair, ""},
		"suffixes that differ":         {"rules: [{clusters: [eu], id: '/{namespace}.a'}, {clusters: [us], id: '/{namespace}.b'}]", pair, ""},
		"prefix inside a prefix":       {"rules: [{clusters: [eu], id: '/a{namespace}'}, {clusters: [us], id: '/ab{namespace}'}]", pair, "rule 1 and rule 2"},
		"other lengths":                {"rules: [{clusters: [eu], id: '/{namespace}/{serviceAccount}'}, {clusters: [us], id: '/{namespace}'}]", pair, ""},
		"literal":                      {"rules: [{clusters: [eu], id: /x}, {clusters: [us], id: /x}]", pair, "rule 1 and rule 2"},
		"one literal for both":         {"rules: [{id: /x}]", pair, "rule 1 (/x and /x)"},
		"literal in a hole":            {"rules: [{clusters: [eu], id: '/x/{namespace}'}, {clusters: [us], id: /x/y}]", pair, "rule 1 and rule 2"},
		"literal too short for a hole": {"rules: [{clusters: [eu], id: '/x-{namespace}'}, {clusters: [us], id: /x-}]", pair, ""},
		"a deny grants nothing":        {"rules: [{clusters: [eu], deny: true}, {clusters: [us]}]", pair, ""},
		"second rule collides":         {"rules: [{clusters: [eu], id: /a}, {clusters: [eu], namespaces: [b], id: /b}, {clusters: ['u*'], id: /b}]", pair, "rule 2 and rule 3"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]byte(c.doc), PolicyContext{TrustDomain: td, Clusters: c.clusters})
			switch {
			case c.collide == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.collide != "" && (err == nil || !strings.Contains(err.Error(), c.collide) || !strings.Contains(err.Error(), "sameNamespaces")):
				t.Errorf("got %v, want it to say %q", err, c.collide)
			}
		})
	}
	if _, err := Default(PolicyContext{TrustDomain: td, Clusters: pair}); err == nil {
		t.Error("Default lets two clusters share IDs")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(rulesDoc), "payments", "api")
	f.Add([]byte("rules: []"), "a", "b")
	f.Add([]byte("rules: [{id: '/{namespace}'}]"), "meshca", "b")
	f.Add([]byte("rules: [{id: '/x-{serviceAccount}.y', serviceAccounts: ['*a*']}]"), "a/..", "ba")
	f.Add([]byte("a: &a [*a]"), "", "")
	f.Add([]byte(`rules: [{when: 'pod.labels.app == "web" && has(pod.annotations.a)', direct: true}, {when: '"x" in ns.labels', deny: true}, {}]`), "shop", "web")
	f.Add([]byte(`rules: [{when: 'pod.labels.all(k, pod.labels[k].matches("^[a-z]+$")) || 1/size(node.name) == 0'}]`), "shop", "web")
	f.Add([]byte(`rules: [{when: 'pod.labels[pod.name] == cluster.name ? true : ns.name in [serviceAccount.name]', nodeVouched: true}]`), "shop", "web")
	f.Add([]byte(`rules: [{dnsNames: ['{serviceAccount}.{namespace}.svc', '{namespace}', x-{cluster}], serverKeys: true, ttl: 1h}]`), "10", "web.x")
	c := PolicyContext{TrustDomain: td, Clusters: []Cluster{{Name: "prod"}, {Name: "eu"}}}
	f.Fuzz(func(t *testing.T, doc []byte, ns, sa string) {
		p, err := Parse(doc, c)
		if err != nil {
			if p != nil {
				t.Fatal("a policy beside an error")
			}
			return
		}
		prod := decideSound(t, p, Input{Cluster: "prod", Namespace: ns, ServiceAccount: sa})
		eu := decideSound(t, p, Input{Cluster: "eu", Namespace: ns, ServiceAccount: sa})
		if !prod.ID.IsZero() && prod.ID == eu.ID {
			t.Fatalf("both clusters get %s", prod.ID)
		}
	})
}

// decideSound checks what holds for every policy and every input.
func decideSound(t *testing.T, p *Policy, in Input) Decision {
	t.Helper()
	in.Pod, in.Node = "web-1", "n1"
	in.PodLabels, in.PodAnnotations, in.NamespaceLabels = map[string]string{"app": "web"}, map[string]string{}, map[string]string{"x": ""}
	d, err := p.Decide(t.Context(), in)
	if read, again, rerr := p.Read(t.Context(), in); refusal.Of(rerr) != refusal.Of(err) || again.ID != d.ID || len(read) > max(p.Rules(), 1) {
		t.Fatalf("Read says %v, %+v, %v; decided %+v, %v", read, again, rerr, d, err)
	}
	if (err == nil) == d.ID.IsZero() {
		t.Fatalf("decided %+v beside %v", d, err)
	}
	if err != nil {
		return d
	}
	if id, perr := spiffeid.FromString(d.ID.String()); perr != nil || id != d.ID || !id.MemberOf(td) || len(id.String()) > 2048 {
		t.Fatalf("granted %q, which is no ID of the trust domain: %v", d.ID, perr)
	}
	if path := d.ID.Path() + "/"; strings.HasPrefix(path, "/meshca/") || path == "/" {
		t.Fatalf("granted the reserved %s", d.ID)
	}
	if !p.Stands(in, d.Basis) {
		t.Fatal("a decision does not stand under its own policy")
	}
	if foreseen, certain, _ := p.Foresee(in); certain && foreseen.ID != d.ID {
		t.Fatalf("foresaw %+v for certain, decided %+v", foreseen, d)
	}
	if d.Direct && !p.OpensDirect(in.Cluster) {
		t.Fatalf("granted %+v, and the policy opens no such way", d)
	}
	for _, n := range d.DNSNames {
		if len(n) > 253 || strings.ContainsAny(n, "*_ {}") || strings.Contains("."+n+".", "..") || strings.ToLower(n) != n {
			t.Fatalf("granted the DNS name %q", n)
		}
	}
	if d.TTL < MinTTL || d.TTL > DefaultMaxTTL {
		t.Fatalf("granted a life of %s", d.TTL)
	}
	return d
}
