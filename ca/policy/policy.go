package policy

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
)

// DefaultMaxTTL is the longest life of an SVID where the configuration sets none.
const DefaultMaxTTL = 6 * time.Hour

// DefaultTemplate is the path of the plain ID.
const DefaultTemplate = "/ns/{namespace}/sa/{serviceAccount}"

// DefaultRule is what Decision.Rule says where no rules are written.
const DefaultRule = "default"

// PolicyContext is what a policy is read against.
type PolicyContext struct {
	TrustDomain spiffeid.TrustDomain
	// Clusters are all that the CA knows. Rules may name no others, and templates must keep them apart. Empty switches
	// both checks off: for reading a policy away from its CA, never for issuing under it.
	Clusters []Cluster
	// MaxTTL bounds every rule's ttl, and is the ttl of rules that name none. Zero: DefaultMaxTTL.
	MaxTTL time.Duration
}

// Cluster is one entry of the CA's configuration, as far as policy goes.
type Cluster struct {
	Name string
	// SameNamespaces says aloud that a namespace and service account of this cluster is the same workload as its
	// namesake in every other cluster that says so too.
	SameNamespaces bool
	// NoPods is set where nobody can be asked about the cluster's pods and namespaces (liveness: none). Rules that ask
	// for their labels or annotations, or grant nodeVouched, are refused there.
	NoPods bool
}

// Decision is what is granted. Beside an error, Rule and Number tell which rule refused; the rest is zero.
type Decision struct {
	ID  spiffeid.ID
	TTL time.Duration
	// DNSNames are granted DNS SANs.
	DNSNames []string
	// Rule is the rule's name, "rule 3" where it has none, or DefaultRule.
	Rule string
	// Number counts rules from 1; 0 where no rules are written.
	Number int
	// Direct lets the workload call the CA itself. NodeVouched lets an agent vouch for a pod that carries no token.
	Direct, NodeVouched bool
	// ServerKeys lets the CA's own SDS door hand out keys that the CA made. There is no such door yet, so nothing acts on
	// it: it is read, shown, and otherwise without effect.
	ServerKeys bool
	// Basis stands for all that policy had a say in: see Stands.
	Basis Basis
}

// Policy is an immutable set of rules; all methods are safe for concurrent use.
type Policy struct {
	trustDomain spiffeid.TrustDomain
	rules       []rule
	// plain is what everyone gets where rules is empty.
	plain rule
}

// effective are the rules that decide.
func (p *Policy) effective() []rule {
	if len(p.rules) == 0 {
		return []rule{p.plain}
	}
	return p.rules
}

// Default is the policy without rules. It fails where two clusters would share IDs unsaid.
func Default(c PolicyContext) (*Policy, error) { return build(c, nil) }

// Rules is how many rules are written.
func (p *Policy) Rules() int { return len(p.rules) }

// Uses are the facts beside names that a decision about a workload of the cluster can come to ask for.
func (p *Policy) Uses(cluster string) Facts {
	var f Facts
	for i := range p.rules {
		if r := &p.rules[i]; r.when != nil && r.clusters.match(cluster) {
			f |= r.when.uses
		}
	}
	return f
}

// OpensDirect reports whether any rule lets a workload of the cluster call by itself. Where none does, a stranger's call needs
// no further look.
func (p *Policy) OpensDirect(cluster string) bool {
	for i := range p.rules {
		if r := &p.rules[i]; r.grant.direct && r.clusters.match(cluster) {
			return true
		}
	}
	return false
}

// Decide finds the grant for a workload, or a refusal: POLICY_NO_RULE, POLICY_DENIED, POLICY_ERROR (a condition erred: the
// rule refuses, and no later one is asked), POLICY_FACTS_UNKNOWN (passing), IDENTITY_INVALID, IDENTITY_RESERVED or
// DNS_NAME_INVALID. It returns ctx's error if that ended within a condition.
func (p *Policy) Decide(ctx context.Context, in Input) (Decision, error) {
	return p.decide(ctx, &in, nil)
}

// decide goes through the rules in order, up to the one that decides, and tells seen of each.
func (p *Policy) decide(ctx context.Context, in *Input, seen func(*rule, miss, error)) (Decision, error) {
	if err := in.check(); err != nil {
		return Decision{}, err
	}
	if len(p.rules) == 0 {
		return p.plain.decide(p.trustDomain, in, basisOf(&p.plain))
	}
	var vars *frame // made for the first condition
	var basis Basis
	for i := range p.rules {
		r := &p.rules[i]
		m := r.mismatch(in)
		var err error
		if m == anything {
			basis = basis.and(r)
			if r.when != nil {
				if vars == nil {
					vars = &frame{in: *in}
				}
				m, err = r.ask(ctx, vars)
			}
		}
		if seen != nil {
			seen(r, m, err)
		}
		if err != nil {
			return Decision{Rule: r.label, Number: r.number}, err
		}
		if m == anything {
			return r.decide(p.trustDomain, in, basis)
		}
	}
	return Decision{}, p.noRule(in)
}

func (p *Policy) noRule(in *Input) error {
	return refusal.New(refusal.PolicyNoRule, "none of the %d rules matches service account %s/%s of cluster %s",
		len(p.rules), in.Namespace, in.ServiceAccount, in.Cluster)
}
