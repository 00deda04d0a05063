package policy

import (
	"fmt"
	"strings"
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
}

// Input is who asks. The names are checked again here: an ID is only as sound as what is put into it.
type Input struct{ Cluster, Namespace, ServiceAccount string }

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
	// ServerKeys lets the CA's own SDS door hand out keys that the CA made.
	Direct, NodeVouched, ServerKeys bool
}

// Policy is an immutable set of rules; all methods are safe for concurrent use.
type Policy struct {
	trustDomain spiffeid.TrustDomain
	rules       []rule
	// plain is what everyone gets where rules is empty.
	plain rule
}

// Default is the policy without rules. It fails where two clusters would share IDs unsaid.
func Default(c PolicyContext) (*Policy, error) { return build(c, nil) }

// Rules is how many rules are written.
func (p *Policy) Rules() int { return len(p.rules) }

// Decide finds the grant for a service account, or a refusal: POLICY_NO_RULE, POLICY_DENIED, IDENTITY_INVALID or
// IDENTITY_RESERVED. (POLICY_ERROR is for conditions, which can err.)
func (p *Policy) Decide(in Input) (Decision, error) {
	if err := in.check(); err != nil {
		return Decision{}, err
	}
	if len(p.rules) == 0 {
		return p.plain.decide(p.trustDomain, in)
	}
	for i := range p.rules {
		if p.rules[i].mismatch(in) == anything {
			return p.rules[i].decide(p.trustDomain, in)
		}
	}
	return Decision{}, p.noRule(in)
}

func (p *Policy) noRule(in Input) error {
	return refusal.New(refusal.PolicyNoRule, "none of the %d rules matches service account %s/%s of cluster %s",
		len(p.rules), in.Namespace, in.ServiceAccount, in.Cluster)
}

// rule is one rule, checked.
type rule struct {
	label                                 string
	number                                int
	clusters, namespaces, serviceAccounts patterns
	grant                                 grant
	// deny is why nothing is granted; denied is set with it.
	deny   string
	denied bool
}

// grant is what a rule gives where it does not deny. DNS names, direct, nodeVouched and serverKeys belong here, beside
// the condition in rule, as soon as the document has keys for them.
type grant struct {
	id  template
	ttl time.Duration
}

func (r *rule) decide(td spiffeid.TrustDomain, in Input) (Decision, error) {
	d := Decision{Rule: r.label, Number: r.number}
	if r.denied {
		return d, refusal.New(refusal.PolicyDenied, "%s denies service account %s/%s of cluster %s%s",
			r.quoted(), in.Namespace, in.ServiceAccount, in.Cluster, because(r.deny))
	}
	id, err := r.grant.id.execute(td, in)
	if err != nil {
		return d, refusal.New(err.Reason, "%s: %s", r.quoted(), err.Detail)
	}
	d.ID, d.TTL = id, r.grant.ttl
	return d, nil
}

// quoted names the rule in a sentence.
func (r *rule) quoted() string {
	switch {
	case r.number == 0:
		return "the default policy"
	case strings.HasPrefix(r.label, "rule "):
		return r.label
	}
	return fmt.Sprintf("rule %d %q", r.number, r.label)
}

func because(why string) string {
	if why == "" {
		return ""
	}
	return ": " + why
}

// check refuses what is no Kubernetes name: a slash or a dot segment in it would change the shape of the ID.
func (in Input) check() error {
	switch {
	case !isName(in.Cluster, 63):
		return refusal.New(refusal.IdentityInvalid, "cluster %q is not a name of 1 to 63 lower-case letters, digits, - and .", clip(in.Cluster))
	case !isName(in.Namespace, 63):
		return refusal.New(refusal.IdentityInvalid, "namespace %q is not a name of 1 to 63 lower-case letters, digits, - and .", clip(in.Namespace))
	case !isName(in.ServiceAccount, 253):
		return refusal.New(refusal.IdentityInvalid, "service account %q is not a name of 1 to 253 lower-case letters, digits, - and .", clip(in.ServiceAccount))
	}
	return nil
}

// isName is RFC 1123's subdomain as Kubernetes has it, with the bound given; it holds no empty or dot-only part.
func isName(s string, most int) bool {
	if len(s) == 0 || len(s) > most {
		return false
	}
	border := true // at the beginning of a label, where neither - nor . may stand
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
			border = false
		case c == '-':
			if border || i == len(s)-1 || s[i+1] == '.' {
				return false
			}
		case c == '.':
			if border {
				return false
			}
			border = true
		default:
			return false
		}
	}
	return !border
}

// clip bounds what a message repeats of a stranger's input.
func clip(s string) string {
	if len(s) > 80 {
		return s[:77] + "..."
	}
	return s
}
