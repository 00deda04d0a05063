package policy

import (
	"context"
	"fmt"
	"strings"

	"github.com/meshca/meshca/api/refusal"
)

// Reading is how one rule was read.
type Reading struct {
	// Number counts from 1; 0 is the default policy, where no rules are written.
	Number  int
	Name    string
	Matched bool
	// Why says what matched, or what did not.
	Why string
	// When is the rule's condition; empty where it has none.
	When string
}

// Read decides as Decide does and tells how: the rules in order, up to the one that decided.
func (p *Policy) Read(ctx context.Context, in Input) ([]Reading, Decision, error) {
	var read []Reading
	d, err := p.decide(ctx, &in, func(r *rule, m miss, err error) {
		read = append(read, Reading{Number: r.number, Name: r.label, Matched: m == anything, Why: r.why(&in, m, err), When: r.whenText()})
	})
	if len(p.rules) == 0 && in.check() == nil {
		read = []Reading{{Name: DefaultRule, Matched: true, Why: "no rules are written: the plain ID for all"}}
	}
	return read, d, err
}

// Describe says of each rule in a line whom it is for and what it decides.
func (p *Policy) Describe() []string {
	lines := make([]string, len(p.rules))
	for i := range p.rules {
		r := &p.rules[i]
		var who []string
		for _, list := range [...]struct {
			what string
			of   patterns
		}{{"clusters", r.clusters}, {"namespaces", r.namespaces}, {"service accounts", r.serviceAccounts}} {
			if list.of != nil {
				who = append(who, list.what+" "+list.of.String())
			}
		}
		if len(who) == 0 {
			who = []string{"everyone"}
		}
		line := r.quoted() + ": " + strings.Join(who, "; ")
		if r.when != nil {
			line += "; when " + clipTo(r.when.text, 300)
		}
		if r.denied {
			lines[i] = line + ": denies" + because(r.deny)
		} else {
			lines[i] = line + ": grants " + r.grant.String()
		}
	}
	return lines
}

func (r *rule) whenText() string {
	if r.when == nil {
		return ""
	}
	return r.when.text
}

func (r *rule) why(in *Input, m miss, err error) string {
	switch {
	case refusal.Of(err) == refusal.PolicyFactsUnknown:
		return fmt.Sprintf("its condition asks for %s, which is not known", r.when.uses&in.unknown())
	case err != nil:
		return "its condition could not be evaluated, so it refuses"
	}
	switch m {
	case missCluster:
		return fmt.Sprintf("cluster %s is not among %s", in.Cluster, r.clusters)
	case missNamespace:
		return fmt.Sprintf("namespace %s is not among %s", in.Namespace, r.namespaces)
	case missServiceAccount:
		return fmt.Sprintf("service account %s is not among %s", in.ServiceAccount, r.serviceAccounts)
	case missCondition:
		return "its condition does not hold"
	}
	and := "it matches and "
	if r.when != nil {
		and = "it matches, its condition holds, and it "
	}
	if r.denied {
		return and + "denies" + because(r.deny)
	}
	return and + "grants " + r.grant.String()
}

// String tells a grant in a sentence.
func (g *grant) String() string {
	s := fmt.Sprintf("%s for %s", g.id, g.ttl)
	if len(g.dnsNames) > 0 {
		names := make([]string, len(g.dnsNames))
		for i, n := range g.dnsNames {
			names[i] = n.String()
		}
		s += ", DNS names " + strings.Join(names, " ")
	}
	for _, way := range [...]struct {
		set  bool
		name string
	}{{g.direct, "direct"}, {g.nodeVouched, "node-vouched"}, {g.serverKeys, "server keys"}} {
		if way.set {
			s += ", " + way.name
		}
	}
	return s
}
