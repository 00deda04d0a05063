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
	for _, c := range []struct{ name, doc string }{
		{"default", "rules: []"},
		{"5rules", rulesDoc + "- {}\n"},
		{"100rules", many.String()},
	} {
		b.Run(c.name, func(b *testing.B) {
			p := parse(b, c.doc)
			in := Input{Cluster: "prod", Namespace: "payments-eu", ServiceAccount: "checkout-api"}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := p.Decide(in); err != nil {
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
	if n := testing.AllocsPerRun(100, func() { _, _ = p.Decide(in) }); n > 1 {
		t.Errorf("%v allocations a decision, want 1", n)
	}
}
