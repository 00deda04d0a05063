package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca/policy"
)

// surroundings are what the reading of a policy depends on beside its rules.
type surroundings struct {
	policy.PolicyContext
	fromCA bool
	// denied are the CA's denials by SPIFFE ID; empty without a CA.
	denied map[string]*meshcav1.Denial
}

// testPolicyFile answers as the CA would whose policy the file is.
func (c *cli) testPolicyFile(ctx context.Context, q policyQuestion, r *meshcav1.TestPolicyRequest) (*meshcav1.TestPolicyResponse, error) {
	data, err := c.read(ctx, "the policy", q.file, maxPolicyFile)
	if err != nil {
		return nil, err
	}
	in, err := c.surroundings(ctx, q)
	if err != nil {
		return nil, err
	}
	cluster, err := in.cluster(q.cluster)
	if err != nil {
		return nil, err
	}
	rules, err := policy.Parse(data, in.PolicyContext)
	if err != nil {
		return nil, no(q.file+" would not be put in force", err, "")
	}
	answer := &meshcav1.TestPolicyResponse{
		Cluster: cluster, Namespace: r.GetNamespace(), ServiceAccount: r.GetServiceAccount(), Assumptions: in.told(), Facts: r.GetFacts(),
	}
	readings, d, err := rules.Read(ctx, known(policy.Input{Cluster: cluster, Namespace: r.GetNamespace(), ServiceAccount: r.GetServiceAccount()}, r.GetFacts()))
	for _, rd := range readings {
		answer.Rules = append(answer.Rules, &meshcav1.RuleReading{Number: uint32(rd.Number), Name: rd.Name, Matched: rd.Matched, Why: rd.Why, When: rd.When})
	}
	if denial := in.denied[d.ID.String()]; err == nil && denial != nil {
		err = refusal.New(refusal.IdentityDenied, "the policy grants %s, and %s denied it: %s", d.ID, denial.GetBy(), denial.GetWhy())
	}
	if e, ok := refusal.From(err); ok {
		answer.Refusal = &meshcav1.Refusal{Code: uint32(e.Reason.Code()), Reason: string(e.Reason), Message: e.Detail}
		return answer, nil
	}
	if err != nil {
		return nil, no("the policy could not be read for it", err, "")
	}
	answer.Grant = &meshcav1.Grant{SpiffeId: d.ID.String(), Ttl: durationpb.New(d.TTL), DnsNames: d.DNSNames, Rule: d.Rule,
		Direct: d.Direct, NodeVouched: d.NodeVouched, ServerKeys: d.ServerKeys}
	return answer, nil
}

// surroundings are those that flags name, or else the CA's.
func (c *cli) surroundings(ctx context.Context, q policyQuestion) (surroundings, error) {
	if q.trustDomain == "" {
		return c.caSurroundings(ctx)
	}
	td, err := spiffeid.TrustDomainFromString(q.trustDomain)
	if err != nil || td.Name() != q.trustDomain {
		return surroundings{}, usage("--trust-domain %.64q is not a trust domain's name", q.trustDomain)
	}
	if q.maxTTL < policy.MinTTL || q.maxTTL > policy.DefaultMaxTTL {
		return surroundings{}, usage("--max-ttl %s does not lie between %s and %s", q.maxTTL, policy.MinTTL, policy.DefaultMaxTTL)
	}
	if slices.Contains(q.others, q.cluster) {
		return surroundings{}, usage("--other-cluster %.64q is the one that --cluster names", q.cluster)
	}
	in := surroundings{PolicyContext: policy.PolicyContext{TrustDomain: td, MaxTTL: q.maxTTL}}
	for _, name := range append([]string{q.cluster}, q.others...) {
		in.Clusters = append(in.Clusters, policy.Cluster{Name: name, SameNamespaces: q.same})
	}
	if len(q.others) == 0 {
		in.Clusters = nil // rules may name clusters that nobody told of here
	}
	return in, nil
}

func (c *cli) caSurroundings(ctx context.Context) (surroundings, error) {
	in := surroundings{fromCA: true, denied: map[string]*meshcav1.Denial{}}
	conn, err := c.openCA(ctx)
	if err != nil {
		return in, withoutCA(err)
	}
	defer conn.Close()
	s, err := conn.CA.GetStatus(ctx, &meshcav1.GetStatusRequest{})
	if err != nil {
		return in, theCA.failed(err)
	}
	if in.TrustDomain, err = spiffeid.TrustDomainFromString(s.GetTrustDomain()); err != nil {
		return in, no("the CA's trust domain cannot be read", err, "")
	}
	if s.GetMaxSvidTtl() == nil {
		return in, no("the CA does not say how long SVIDs may live: it is of another version", nil, "Say it with --trust-domain, --cluster and --max-ttl")
	}
	in.MaxTTL = s.GetMaxSvidTtl().AsDuration()
	for _, k := range s.GetClusters() {
		in.Clusters = append(in.Clusters, policy.Cluster{Name: k.GetName(), SameNamespaces: k.GetSameNamespaces(), NoPods: k.GetLiveness() == "none"})
	}
	denials, err := conn.CA.ListDenials(ctx, &meshcav1.ListDenialsRequest{})
	if err != nil {
		return in, theCA.failed(err)
	}
	for _, d := range denials.GetDenials() {
		in.denied[d.GetSpiffeId()] = d
	}
	return in, nil
}

// withoutCA adds to the failure of a connection that this verb does not need one.
func withoutCA(err error) error {
	var f *failure
	if !errors.As(err, &f) {
		return err
	}
	told := *f
	told.next = "To read the file without a CA, say --trust-domain and --cluster. " + f.next
	return &told
}

// cluster is the one that is asked about; no name means the only one.
func (in surroundings) cluster(name string) (string, error) {
	if !in.fromCA {
		return name, nil
	}
	if name == "" && len(in.Clusters) == 1 {
		return in.Clusters[0].Name, nil
	}
	if slices.ContainsFunc(in.Clusters, func(k policy.Cluster) bool { return k.Name == name }) {
		return name, nil
	}
	if name == "" {
		return "", usage("the CA has several clusters: name one of %s with --cluster", strings.Join(in.names(), ", "))
	}
	return "", no(fmt.Sprintf("the CA has no cluster %.64q, it has %s", name, strings.Join(in.names(), ", ")), nil, "")
}

func (in surroundings) names() []string {
	var names []string
	for _, k := range in.Clusters {
		names = append(names, k.Name)
	}
	return names
}

func (in surroundings) told() *meshcav1.PolicyAssumptions {
	return &meshcav1.PolicyAssumptions{TrustDomain: in.TrustDomain.Name(), MaxTtl: durationpb.New(in.MaxTTL), Clusters: in.names(), FromCa: in.fromCA}
}

// drawAssumptions says what an answer rests on that no CA gave.
func drawAssumptions(p *page, a *meshcav1.PolicyAssumptions) {
	if a == nil {
		return
	}
	clusters := "clusters " + strings.Join(a.GetClusters(), ", ") + ", whose IDs do not collide"
	if len(a.GetClusters()) == 0 {
		clusters = "no other cluster, so that no IDs can collide (--other-cluster names them)"
	}
	by := "the flags say"
	if a.GetFromCa() {
		by = "the CA says"
	}
	p.gap()
	p.line("Read for trust domain %s, SVIDs of at most %s, and %s: %s so.", a.GetTrustDomain(), spell(a.GetMaxTtl().AsDuration()), clusters, by)
	if !a.GetFromCa() {
		p.line("What operators have denied is not known here.")
	}
}
