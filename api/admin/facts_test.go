package admin

import (
	"testing"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// Conditions see what a request tells of a pod, or the pod of its token; what nobody told is not known.
func TestTestPolicyWithConditions(t *testing.T) {
	f := start(t, `rules: [{name: gold, when: 'pod.labels.tier == "gold" && ns.labels.env == "live"', direct: true, nodeVouched: true, serverKeys: true, dnsNames: ['{serviceAccount}.svc']}, {name: rest}]`)
	labels := func(m map[string]string) *meshcav1.Labels { return &meshcav1.Labels{Entries: m} }
	live := labels(map[string]string{"env": "live"})
	for name, c := range map[string]struct {
		facts  *meshcav1.PolicyFacts
		rule   string
		reason refusal.Reason
	}{
		"gold":       {&meshcav1.PolicyFacts{PodLabels: labels(map[string]string{"tier": "gold"}), NamespaceLabels: live}, "gold", ""},
		"tin":        {&meshcav1.PolicyFacts{PodLabels: labels(map[string]string{"tier": "tin"}), NamespaceLabels: live}, "rest", ""},
		"no labels":  {&meshcav1.PolicyFacts{PodLabels: labels(nil), NamespaceLabels: live}, "", refusal.PolicyError},
		"half known": {&meshcav1.PolicyFacts{NamespaceLabels: live}, "", refusal.PolicyFactsUnknown},
		"not known":  {nil, "", refusal.PolicyFactsUnknown},
	} {
		got, err := f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Namespace: "shop", ServiceAccount: "cart", Facts: c.facts})
		if err != nil || got.GetGrant().GetRule() != c.rule || got.GetRefusal().GetReason() != string(c.reason) || got.GetRules()[0].GetWhen() == "" {
			t.Errorf("%s: %v, %v", name, got, err)
		}
		if (got.GetFacts() == nil) != (c.facts == nil) || len(got.GetFacts().GetPodLabels().GetEntries()) != len(c.facts.GetPodLabels().GetEntries()) {
			t.Errorf("%s: conditions were told %v", name, got.GetFacts())
		}
		if g := got.GetGrant(); c.rule == "gold" && (!g.GetDirect() || !g.GetNodeVouched() || !g.GetServerKeys() || len(g.GetDnsNames()) != 1 || g.GetDnsNames()[0] != "cart.svc") {
			t.Errorf("the grant: %v", g)
		}
	}
	_, err := f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Token: "good", Facts: &meshcav1.PolicyFacts{Pod: "x"}})
	wantReason(t, err, refusal.RequestMalformed)

	who, err := attestor.NewIdentity("prod", "shop", "cart")
	if err != nil {
		t.Fatal(err)
	}
	f.config.Clusters = map[string]Attestor{"prod": oneToken{attestor.Evidence{Proven: true, Identity: who, PodName: "cart-1", NodeName: "n1", Facts: &attestor.Facts{
		PodLabels: map[string]string{"tier": "gold"}, NamespaceLabels: map[string]string{"env": "live"},
	}}}}
	f.serve(t)
	got, err := f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Token: "good"})
	if err != nil || got.GetGrant().GetRule() != "gold" || got.GetFacts().GetPodLabels().GetEntries()["tier"] != "gold" || got.GetFacts().GetNode() != "n1" || got.GetFacts().GetPod() != "cart-1" {
		t.Errorf("the token's pod: %v, %v", got, err)
	}
}
