package policy

import (
	"fmt"
	"strings"
	"testing"
)

func BenchmarkDecide(b *testing.B) {
	var many strings.Builder
	many.WriteString("rules:\n")
	for i := range 99 {
		fmt.Fprintf(&many, "- namespaces: [team-%d, team-%d-*]\n  serviceAccounts: [api, worker-*]\n", i, i)
	}
	many.WriteString("- {}\n")
	var conditions strings.Builder
	conditions.WriteString("rules:\n")
	for i := range 20 {
		fmt.Fprintf(&conditions, "- when: has(pod.labels.tier) && pod.labels.tier == \"tier-%d\"\n", i)
	}
	conditions.WriteString("- {}\n")
	for _, c := range []struct{ name, doc string }{
		{"default", "rules: []"},
		{"5rules", rulesDoc + "- {}\n"},
		{"100rules", many.String()},
		{"1condition", "rules:\n- when: pod.labels.app == \"api\" && node.name.startsWith(\"n\")\n"},
		{"20conditions", conditions.String()},
	} {
		b.Run(c.name, func(b *testing.B) {
			p := parse(b, c.doc)
			in := Input{
				Cluster: "prod", Namespace: "payments-eu", ServiceAccount: "checkout-api", Node: "n1",
				PodLabels: map[string]string{"app": "api", "tier": "gold", "pod-template-hash": "5c9f", "app.kubernetes.io/name": "api", "version": "v3"},
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := p.Decide(b.Context(), in); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// The issuance path pays for one string, the ID's.
func TestDecideAllocations(t *testing.T) {
	p := parse(t, rulesDoc)
	in := Input{Cluster: "prod", Namespace: "payments", ServiceAccount: "api"}
	ctx := t.Context()
	if n := testing.AllocsPerRun(100, func() { _, _ = p.Decide(ctx, in) }); n > 1 {
		t.Errorf("%v allocations a decision, want 1", n)
	}
}
