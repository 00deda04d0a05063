package policy

import "fmt"

// Reading is how one rule was read.
type Reading struct {
	// Number counts from 1; 0 is the default policy, where no rules are written.
	Number  int
	Name    string
	Matched bool
	// Why says what matched, or what did not.
	Why string
}

// Read decides as Decide does and tells how: the rules in order, up to the one that decided.
func (p *Policy) Read(in Input) ([]Reading, Decision, error) {
	d, err := p.Decide(in)
	if in.check() != nil {
		return nil, d, err
	}
	if len(p.rules) == 0 {
		return []Reading{{Name: DefaultRule, Matched: true, Why: "no rules are written: the plain ID for all"}}, d, err
	}
	var read []Reading
	for i := range p.rules {
		r := &p.rules[i]
		miss := r.mismatch(in)
		read = append(read, Reading{Number: r.number, Name: r.label, Matched: miss == anything, Why: r.why(in, miss)})
		if miss == anything {
			break
		}
	}
	return read, d, err
}

// miss is the first of a rule's lists that does not match.
type miss uint8

const (
	anything miss = iota // nothing is missed: the rule matches
	missCluster
	missNamespace
	missServiceAccount
)

func (r *rule) mismatch(in Input) miss {
	switch {
	case !r.clusters.match(in.Cluster):
		return missCluster
	case !r.namespaces.match(in.Namespace):
		return missNamespace
	case !r.serviceAccounts.match(in.ServiceAccount):
		return missServiceAccount
	}
	return anything
}

func (r *rule) why(in Input, m miss) string {
	switch m {
	case missCluster:
		return fmt.Sprintf("cluster %s is not among %s", in.Cluster, r.clusters)
	case missNamespace:
		return fmt.Sprintf("namespace %s is not among %s", in.Namespace, r.namespaces)
	case missServiceAccount:
		return fmt.Sprintf("service account %s is not among %s", in.ServiceAccount, r.serviceAccounts)
	}
	if r.denied {
		return "it matches and denies" + because(r.deny)
	}
	return fmt.Sprintf("it matches and grants %s for %s", r.grant.id, r.grant.ttl)
}
