package policy

import (
	"context"
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/meshca/meshca/api/refusal"
)

// web is a pod of which all is known.
func web(change func(*Input)) Input {
	in := Input{
		Cluster: "prod", Namespace: "shop", ServiceAccount: "cart", Pod: "cart-1", Node: "node-7",
		PodLabels:       map[string]string{"app": "cart", "app.kubernetes.io/name": "cart", "tier": "gold"},
		PodAnnotations:  map[string]string{"team": "checkout"},
		NamespaceLabels: map[string]string{"env": "live"},
	}
	if change != nil {
		change(&in)
	}
	return in
}

func TestConditions(t *testing.T) {
	for when, want := range map[string]bool{
		`true`: true,
		// An error beside a side that decides alone does not count (CEL, "Logical Operators").
		`pod.labels.none == "x" || true`:                                               true,
		`cluster.name == "prod" && ns.name == "shop" && serviceAccount.name == "cart"`: true,
		`pod.name.startsWith("cart-") && node.name == "node-7"`:                        true,
		`pod.labels.app == "cart"`:                                                     true,
		`pod.labels["app.kubernetes.io/name"] == "cart"`:                               true,
		`has(pod.labels.app) && !has(pod.labels.version)`:                              true,
		`"app.kubernetes.io/name" in pod.labels`:                                       true,
		`"version" in pod.labels`:                                                      false,
		`has(pod.labels.version) && pod.labels.version == "2"`:                         false,
		`pod.labels.tier in ["gold", "silver"]`:                                        true,
		`pod.annotations.team == "checkout"`:                                           true,
		`ns.labels.env == "live"`:                                                      true,
		`ns.labels.env == "test"`:                                                      false,
		`node.name.matches("^node-[0-9]+$")`:                                           true,
		`pod.labels.exists(k, k.startsWith("app."))`:                                   true,
		`pod.labels.all(k, pod.labels[k] != "")`:                                       true,
		`size(pod.annotations) == 1`:                                                   true,
	} {
		p := parse(t, "rules: [{when: "+quote(when)+"}]")
		d, err := p.Decide(t.Context(), web(nil))
		if want && (err != nil || d.ID.Path() != "/ns/shop/sa/cart") || !want && refusal.Of(err) != refusal.PolicyNoRule {
			t.Errorf("%s: %+v, %v; want %t", when, d, err, want)
		}
	}
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

// What errs refuses, and no later rule is asked.
func TestAConditionThatErrsRefuses(t *testing.T) {
	for when, want := range map[string]string{
		`pod.labels.version == "2"`:                               `pod.labels has no "version"; if such a pod is to be passed over, begin with ` + "`has(pod.labels.version) &&`",
		`pod.labels["example.org/x"] == "2"`:                      "begin with `\"example.org/x\" in pod.labels &&`",
		`pod.annotations.owner != "x"`:                            `pod.annotations has no "owner"`,
		`ns.labels.stage == "x"`:                                  `ns.labels has no "stage"`,
		`pod.labels.x == "" && pod.annotations.x == ""`:           `there is no "x" in what it looks at`,
		`pod.labels[pod.name] == ""`:                              `there is no "cart-1" in what it looks at`,
		`size(pod.labels) / size(pod.labels.tier.substr) == 1`:    "",
		`1 / (size(pod.labels) - 3) == 1`:                         "division by zero",
		`dyn(node.name) + 1 == 2`:                                 "no such overload",
		`pod.labels.all(k, int(pod.labels[k]) > 1)`:               "type conversion error",
		`[pod.labels.version].exists(v, v == "2" || v == "cart")`: `pod.labels has no "version"`,
	} {
		doc := "rules: [{name: gold, when: " + quote(when) + "}, {name: rest}]"
		if want == "" {
			if _, err := Parse([]byte(doc), one()); err == nil {
				t.Errorf("%s: was taken", when)
			}
			continue
		}
		d, err := parse(t, doc).Decide(t.Context(), web(nil))
		e, _ := refusal.From(err)
		if refusal.Of(err) != refusal.PolicyError || d.Rule != "gold" || d.Number != 1 || !d.ID.IsZero() {
			t.Errorf("%s: decided %+v, %v; want POLICY_ERROR by rule gold", when, d, err)
			continue
		}
		for _, part := range []string{`rule 1 "gold" could not be evaluated: `, want, "Its condition: " + when} {
			if !strings.Contains(e.Detail, part) {
				t.Errorf("%s: the detail %q lacks %q", when, e.Detail, part)
			}
		}
	}
}

// A condition that errs is not asked where the rule's lists, or an earlier rule, leave it out.
func TestListsAreAskedBeforeConditions(t *testing.T) {
	p := parse(t, `rules: [{namespaces: [bank], when: 'pod.labels.none == ""'}, {serviceAccounts: [cart], id: /first}, {when: 'pod.labels.none == ""'}]`)
	d, err := p.Decide(t.Context(), Input{Cluster: "prod", Namespace: "shop", ServiceAccount: "cart"})
	if err != nil || d.ID.Path() != "/first" || d.Number != 2 {
		t.Errorf("%+v, %v", d, err)
	}
}

// What is not known never reads as "is not so".
func TestUnknownFacts(t *testing.T) {
	for name, c := range map[string]struct {
		when  string
		lacks func(*Input)
		want  refusal.Reason
		says  string
	}{
		"labels":                       {`!("quarantine" in pod.labels)`, func(in *Input) { in.PodLabels = nil }, refusal.PolicyFactsUnknown, "pod.labels"},
		"annotations":                  {`pod.annotations.team == "x"`, func(in *Input) { in.PodAnnotations = nil }, refusal.PolicyFactsUnknown, "pod.annotations"},
		"namespace":                    {`ns.labels.env == "live"`, func(in *Input) { in.NamespaceLabels = nil }, refusal.PolicyFactsUnknown, "ns.labels"},
		"node":                         {`node.name != "bad"`, func(in *Input) { in.Node = "" }, refusal.PolicyFactsUnknown, "node.name"},
		"pod":                          {`pod.name != "bad"`, func(in *Input) { in.Pod = "" }, refusal.PolicyFactsUnknown, "pod.name"},
		"what need not be looked at":   {`ns.name == "other" && pod.labels.app == "x"`, func(in *Input) { in.PodLabels = nil }, refusal.PolicyFactsUnknown, "pod.labels"},
		"too many annotations":         {`!("a" in pod.annotations)`, func(in *Input) { in.PodAnnotations, in.TooLarge = nil, PodAnnotations }, refusal.PolicyError, "more than 256 entries or 16384 bytes"},
		"too many that nobody asks":    {`pod.labels.app == "cart"`, func(in *Input) { in.PodAnnotations, in.TooLarge = nil, PodAnnotations }, "", ""},
		"no labels, and that is known": {`size(pod.labels) == 0`, func(in *Input) { in.PodLabels = map[string]string{} }, "", ""},
	} {
		p := parse(t, "rules: [{name: careful, when: "+quote(c.when)+"}, {}]")
		d, err := p.Decide(t.Context(), web(c.lacks))
		if refusal.Of(err) != c.want || err == nil && d.Rule != "careful" || err != nil && (!strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), `"careful"`)) {
			t.Errorf("%s: %+v, %v; want %q", name, d, err, c.want)
		}
		if refusal.Of(err) == refusal.PolicyFactsUnknown && !refusal.Of(err).Passing() {
			t.Error("what is not known now is refused for good")
		}
	}
}

func TestConditionsThatAreNotTaken(t *testing.T) {
	long := `pod.labels.exists(a, pod.labels.exists(b, pod.labels[a] == pod.labels[b]))`
	for when, want := range map[string]string{
		``:                        "the condition is empty",
		`pod.label.app == "x"`:    `undeclared reference to 'pod.label.app' (did you mean 'pod.labels'?); a condition can ask for cluster.name, ns.name`,
		`pods.labels.app == "x"`:  "undeclared reference",
		`node.labels.zone == "x"`: "undeclared reference",
		`request.time`:            "undeclared reference",
		`pod.labels.app = "x"`:    "Syntax error",
		`pod.labels.app`:          "must be true or false, and this one is of type string",
		`dyn(true)`:               "must be true or false, and this one is of type dyn",
		`1`:                       "of type int",
		`pod.labels.app == 1`:     "no matching overload",
		`pod.labels.app == "x" &&` + "\n" + `nod.name == "y"`:        "line 2, column 4: undeclared reference to 'nod.name'",
		`node.name.matches("(")`:                                     "no regular expression",
		`"prod".matches(pod.annotations.re)`:                         "the pattern of matches must be a text that stands in the condition",
		`matches("prod", pod.labels.re)`:                             "the pattern of matches must be a text",
		`node.name.matches("a" + "b")`:                               "the pattern of matches must be a text",
		`pod.labels.all(k, ["x"].exists(p, k.matches(p)))`:           "the pattern of matches must be a text",
		`node.name.matches("(a{1,100}){1,100}")`:                     "or too large a one",
		`true || ` + strings.Repeat(`"x" == "y" || `, 400) + "true":  "bytes; the most is 4096",
		strings.Repeat("(", 300) + "true" + strings.Repeat(")", 300): "recursion",
		long: "and the most is 10000",
		`pod.annotations.exists(k, pod.annotations[k].matches("^a.*b.*c$"))`: "and the most is 10000",
	} {
		_, err := Parse([]byte("rules: [{}, {name: odd, namespaces: [a], when: "+yamlText(when)+"}]"), one())
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), `policy: rule 2 "odd": when: `) {
			t.Errorf("%.80q: got %v\nwant it to say %q", when, err, want)
		}
		if err != nil && (strings.Contains(err.Error(), "\n") || len(err.Error()) > 600) {
			t.Errorf("%.80q: the error is no line of bounded length: %q", when, err)
		}
	}
	if _, err := Parse([]byte("rules: [{when: true}]"), one()); err == nil || !strings.Contains(err.Error(), "when: must be text") {
		t.Errorf("a condition that is no text: %v", err)
	}
}

func yamlText(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s) + `"`
}

// Each may be cheap enough, and all of them too much for one decision.
func TestConditionsAreBoundedTogether(t *testing.T) {
	one1 := `{when: 'pod.labels.exists(k, pod.labels[k].startsWith("x"))'},`
	var n int
	for n = 1; n < 1000; n++ {
		if _, err := Parse([]byte("rules: ["+strings.Repeat(one1, n)+"]"), one()); err != nil {
			if !strings.Contains(err.Error(), "together, and the most is 100000") {
				t.Fatal(err)
			}
			break
		}
	}
	if n < 3 || n == 1000 {
		t.Errorf("refused from %d rules on", n)
	}
}

// The static bound holds at runtime: an input as large as can be does not run into the limit.
func TestTheLargestInputStaysWithinItsBound(t *testing.T) {
	p := parse(t, "rules: [{when: "+quote(`pod.labels.all(k, pod.labels[k].contains("x"))`)+"}]")
	labels := map[string]string{}
	for i := range MaxEntries {
		labels[strings.Repeat("k", 40)+string(rune('a'+i%26))+strings.Repeat("z", i/26)] = strings.Repeat("y", 62) + "x"
	}
	if d, err := p.Decide(t.Context(), web(func(in *Input) { in.PodLabels = labels })); err != nil {
		t.Errorf("%+v, %v", d, err)
	}
}

func TestAConditionEndsWithTheCall(t *testing.T) {
	p := parse(t, "rules: [{when: "+quote(`pod.labels.all(k, pod.labels[k] != "x")`)+"}]")
	labels := map[string]string{}
	for i := range MaxEntries {
		labels[strings.Repeat("k", i+1)] = "v"
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	d, err := p.Decide(ctx, web(func(in *Input) { in.PodLabels = labels }))
	if !errors.Is(err, context.Canceled) || !d.ID.IsZero() {
		t.Errorf("%+v, %v; want the call's end", d, err)
	}
}

func TestUses(t *testing.T) {
	p, err := Parse([]byte(`
rules:
- {clusters: [eu], when: pod.labels.a == "x"}
- {clusters: [us], when: '"a" in ns.labels && node.name != ""', id: '/us/{namespace}/{serviceAccount}'}
- {clusters: ['*'], when: 'has(pod.annotations.b) || pod.name == "x"', id: '/{cluster}/{namespace}/{serviceAccount}'}
`), PolicyContext{TrustDomain: td, Clusters: []Cluster{{Name: "eu"}, {Name: "us"}}})
	if err != nil {
		t.Fatal(err)
	}
	for cluster, want := range map[string]Facts{
		"eu": PodLabels | PodAnnotations | PodName, "us": NamespaceLabels | NodeName | PodAnnotations | PodName, "asia": PodAnnotations | PodName,
	} {
		if got := p.Uses(cluster); got != want {
			t.Errorf("%s: %s, want %s", cluster, got, want)
		}
	}
	if got := (PodLabels | NamespaceLabels | NodeName).String(); got != "ns.labels, pod.labels, node.name" {
		t.Error(got)
	}
	if got := parse(t, "rules: []").Uses("prod"); got != 0 {
		t.Errorf("the plain policy uses %s", got)
	}
}

// Where nobody can be asked about pods, a rule that would have to is found at once.
func TestClustersWithoutPods(t *testing.T) {
	c := PolicyContext{TrustDomain: td, Clusters: []Cluster{{Name: "edge", NoPods: true}, {Name: "prod", SameNamespaces: true}}}
	for doc, want := range map[string]string{
		`rules: [{id: '/{cluster}/{namespace}', when: 'pod.labels.a == "x"'}]`:                                    "pod.labels, and cluster edge has liveness: none",
		`rules: [{id: '/{cluster}/{namespace}', when: 'has(ns.labels.a) || has(pod.annotations.b)'}]`:             "ns.labels, pod.annotations, and cluster edge",
		`rules: [{id: '/{cluster}/{namespace}', nodeVouched: true}]`:                                              "nodeVouched: cluster edge has liveness: none",
		`rules: [{id: '/{cluster}/{namespace}', clusters: [prod], nodeVouched: true, when: pod.labels.a == "x"}]`: "",
		`rules: [{id: '/{cluster}/{namespace}', when: 'node.name == "n" || pod.name == "p"'}]`:                    "",
		`rules: [{id: '/{cluster}/{namespace}', direct: true}]`:                                                   "",
	} {
		_, err := Parse([]byte(doc), c)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", doc, err, want)
		}
	}
}

func TestReadTellsOfConditions(t *testing.T) {
	p := parse(t, `
rules:
- {name: gold, when: pod.labels.tier == "silver", ttl: 1h}
- {name: rest, when: 'true', direct: true, nodeVouched: true, serverKeys: true, dnsNames: ['{serviceAccount}.{namespace}.svc', fixed.example]}
`)
	read, d, err := p.Read(t.Context(), web(nil))
	if err != nil || len(read) != 2 || d.Rule != "rest" {
		t.Fatalf("%v, %+v, %v", read, d, err)
	}
	for i, want := range []Reading{
		{1, "gold", false, "its condition does not hold", `pod.labels.tier == "silver"`},
		{2, "rest", true, "it matches, its condition holds, and it grants /ns/{namespace}/sa/{serviceAccount} for 6h0m0s, " +
			"DNS names {serviceAccount}.{namespace}.svc fixed.example, direct, node-vouched, server keys", "true"},
	} {
		if read[i] != want {
			t.Errorf("got  %+v\nwant %+v", read[i], want)
		}
	}
	read, _, err = p.Read(t.Context(), web(func(in *Input) { in.PodLabels = nil }))
	if refusal.Of(err) != refusal.PolicyFactsUnknown || len(read) != 1 || read[0].Why != "its condition asks for pod.labels, which is not known" {
		t.Errorf("%v, %v", read, err)
	}
	read, _, err = p.Read(t.Context(), web(func(in *Input) { maps.DeleteFunc(in.PodLabels, func(k, _ string) bool { return k == "tier" }) }))
	if refusal.Of(err) != refusal.PolicyError || len(read) != 1 || read[0].Matched || read[0].Why != "its condition could not be evaluated, so it refuses" {
		t.Errorf("%v, %v", read, err)
	}
}
