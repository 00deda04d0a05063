package policy

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
)

// rule is one rule, checked.
type rule struct {
	label                                 string
	number                                int
	clusters, namespaces, serviceAccounts patterns
	when                                  *condition // nil: none
	grant                                 grant
	// deny is why nothing is granted; denied is set with it.
	deny   string
	denied bool
	// sum stands for what the rule decides and on what condition; not for its name, nor for whom it is.
	sum uint64
}

// grant is what a rule gives where it does not deny.
type grant struct {
	id                              template
	ttl                             time.Duration
	dnsNames                        []dnsTemplate
	direct, nodeVouched, serverKeys bool
}

func (r *rule) decide(td spiffeid.TrustDomain, in *Input, basis Basis) (Decision, error) {
	d := Decision{Rule: r.label, Number: r.number}
	if r.denied {
		return d, refusal.New(refusal.PolicyDenied, "%s denies service account %s/%s of cluster %s%s",
			r.quoted(), in.Namespace, in.ServiceAccount, in.Cluster, because(r.deny))
	}
	id, err := r.grant.id.execute(td, in)
	if err != nil {
		return d, refusal.New(err.Reason, "%s: %s", r.quoted(), err.Detail)
	}
	names, err := dnsNames(r.grant.dnsNames, in)
	if err != nil {
		return d, refusal.New(err.Reason, "%s: %s", r.quoted(), err.Detail)
	}
	d.ID, d.TTL, d.DNSNames, d.Basis = id, r.grant.ttl, names, basis
	d.Direct, d.NodeVouched, d.ServerKeys = r.grant.direct, r.grant.nodeVouched, r.grant.serverKeys
	return d, nil
}

// miss is the first of a rule's lists that does not match, or its condition.
type miss uint8

const (
	anything miss = iota // nothing is missed: the rule matches
	missCluster
	missNamespace
	missServiceAccount
	missCondition
)

// mismatch looks at the lists alone.
func (r *rule) mismatch(in *Input) miss {
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

// ask looks at the condition, which is asked where the lists match.
func (r *rule) ask(ctx context.Context, f *frame) (miss, error) {
	if holds, err := r.when.holds(ctx, r, f); err != nil || !holds {
		return missCondition, err
	}
	return anything, nil
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
