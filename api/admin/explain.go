package admin

import (
	"context"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/durationpb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca/policy"
	"github.com/meshca/meshca/ca/registration"
)

const (
	// MaxDecisions bounds one answer of Explain.
	MaxDecisions = 1000
	// DefaultDecisions is what a request gets that names no limit.
	DefaultDecisions = 20
)

// Explain returns recent decisions about an identity or a pod, and the identity's denial if there is one.
func (s *Server) Explain(_ context.Context, r *meshcav1.ExplainRequest) (*meshcav1.ExplainResponse, error) {
	n := DefaultDecisions
	switch {
	case r.GetLimit() > MaxDecisions:
		return nil, refusal.New(refusal.RequestMalformed, "a limit of %d is over the most, %d", r.GetLimit(), MaxDecisions).On("limit")
	case r.GetLimit() > 0:
		n = int(r.GetLimit())
	}
	answer := &meshcav1.ExplainResponse{}
	var decisions []registration.Decision
	switch about := r.GetAbout().(type) {
	case *meshcav1.ExplainRequest_SpiffeId:
		id, err := s.parseID(about.SpiffeId)
		if err != nil {
			return nil, err
		}
		decisions = s.c.Decisions.ByID(id.String(), n)
		standing, _ := s.c.Orders.Get()
		if d, denied := standing.Denials[id.String()]; denied {
			answer.Denial = encodeDenial(d)
		}
	case *meshcav1.ExplainRequest_Pod:
		ns, name := about.Pod.GetNamespace(), about.Pod.GetName()
		if ns == "" || name == "" {
			return nil, refusal.New(refusal.RequestMalformed, "a pod is named by its namespace and its name").On("pod")
		}
		decisions = s.c.Decisions.ByPod(ns, name, n)
	default:
		return nil, refusal.New(refusal.RequestMalformed, "the request names neither a SPIFFE ID nor a pod").On("about")
	}
	for i := range decisions {
		answer.Decisions = append(answer.Decisions, encodeDecision(&decisions[i]))
	}
	since := s.c.Decisions.Since()
	if since.IsZero() {
		since = s.started
	}
	answer.Since = stamp(since)
	return answer, nil
}

func encodeDecision(d *registration.Decision) *meshcav1.Decision {
	caller := d.Caller.Address
	if !d.Caller.ID.IsZero() {
		caller = d.Caller.ID.String()
	}
	m := &meshcav1.Decision{
		Time: stamp(d.Time), Event: d.Event, Door: d.Door, Caller: caller, Evidence: encodeEvidence(d), Rule: d.Rule,
		Outcome: d.Outcome, Message: d.Message, Claim: d.Claim, Serial: d.Serial, NotAfter: stamp(d.NotAfter),
	}
	if !d.ID.IsZero() {
		m.SpiffeId = d.ID.String()
	}
	if d.Outcome != registration.OutcomeIssued {
		m.Hint = refusal.Reason(d.Outcome).Do()
	}
	return m
}

func encodeEvidence(d *registration.Decision) *meshcav1.Evidence {
	e := d.Evidence
	m := &meshcav1.Evidence{
		Method: e.Method, Door: d.Door, Cluster: d.Cluster,
		Namespace: e.Identity.Namespace(), ServiceAccount: e.Identity.ServiceAccount(), ServiceAccountUid: e.ServiceAccountUID,
		Pod: e.PodName, PodUid: e.PodUID, Node: e.NodeName, NodeUid: e.NodeUID, CredentialId: e.CredentialID, Rule: d.Rule, Way: d.Way(),
	}
	if !d.Caller.ID.IsZero() {
		m.Agent = d.Caller.ID.String()
	}
	return m
}

// TestPolicy says what policy makes of a service account, or of a token's; it issues nothing. A refusal is an answer.
func (s *Server) TestPolicy(ctx context.Context, r *meshcav1.TestPolicyRequest) (*meshcav1.TestPolicyResponse, error) {
	name, cluster, err := s.cluster(r.GetCluster())
	if err != nil {
		return nil, err
	}
	answer := &meshcav1.TestPolicyResponse{Cluster: name, Namespace: r.GetNamespace(), ServiceAccount: r.GetServiceAccount()}
	if r.GetToken() != "" {
		if r.GetNamespace() != "" || r.GetServiceAccount() != "" {
			return nil, refusal.New(refusal.RequestMalformed, "the request names a service account and has a token: one of them").On("token")
		}
		if r.GetFacts() != nil {
			return nil, refusal.New(refusal.RequestMalformed, "the request has a token, whose pod is looked at, and says what the pod is like: one of them").On("facts")
		}
		evidence, err := cluster.Attest(ctx, attestor.NewToken(r.GetToken()), registration.WorkloadAudience)
		answer.Namespace, answer.ServiceAccount = evidence.Identity.Namespace(), evidence.Identity.ServiceAccount()
		if err != nil {
			return refusedAnswer(answer, err)
		}
		return s.testPolicy(ctx, answer, registration.PolicyInput(evidence))
	} else if _, err := attestor.NewIdentity(name, r.GetNamespace(), r.GetServiceAccount()); err != nil {
		return nil, refusal.New(refusal.RequestMalformed, "%w", err)
	}
	return s.testPolicy(ctx, answer, policy.Input{
		Cluster: name, Namespace: answer.GetNamespace(), ServiceAccount: answer.GetServiceAccount(),
		Pod: r.GetFacts().GetPod(), Node: r.GetFacts().GetNode(),
		PodLabels: entries(r.GetFacts().GetPodLabels()), PodAnnotations: entries(r.GetFacts().GetPodAnnotations()),
		NamespaceLabels: entries(r.GetFacts().GetNamespaceLabels()),
	})
}

// entries are nil where they were not told, and empty where it was told that there are none.
func entries(l *meshcav1.Labels) map[string]string {
	switch {
	case l == nil:
		return nil
	case l.GetEntries() == nil:
		return map[string]string{}
	}
	return l.GetEntries()
}

// labels are entries the other way round.
func labels(m map[string]string) *meshcav1.Labels {
	if m == nil {
		return nil
	}
	return &meshcav1.Labels{Entries: m}
}

func (s *Server) testPolicy(ctx context.Context, answer *meshcav1.TestPolicyResponse, in policy.Input) (*meshcav1.TestPolicyResponse, error) {
	if in.Pod != "" || in.Node != "" || in.PodLabels != nil || in.PodAnnotations != nil || in.NamespaceLabels != nil {
		answer.Facts = &meshcav1.PolicyFacts{
			Pod: in.Pod, Node: in.Node, PodLabels: labels(in.PodLabels), PodAnnotations: labels(in.PodAnnotations), NamespaceLabels: labels(in.NamespaceLabels),
		}
	}
	readings, decision, err := s.c.Policy().Read(ctx, in)
	for _, rd := range readings {
		answer.Rules = append(answer.Rules, &meshcav1.RuleReading{
			Number: uint32(rd.Number), Name: rd.Name, Matched: rd.Matched, Why: rd.Why, When: rd.When,
		})
	}
	if err != nil {
		return refusedAnswer(answer, err)
	}
	standing, _ := s.c.Orders.Get()
	if d, denied := standing.Denials[decision.ID.String()]; denied {
		return refusedAnswer(answer, refusal.New(refusal.IdentityDenied, "policy grants %s, and %s denied it: %s", d.ID, d.By, d.Why))
	}
	answer.Grant = &meshcav1.Grant{
		SpiffeId: decision.ID.String(), Ttl: durationpb.New(decision.TTL), DnsNames: decision.DNSNames, Rule: decision.Rule,
		Direct: decision.Direct, NodeVouched: decision.NodeVouched, ServerKeys: decision.ServerKeys,
	}
	return answer, nil
}

// cluster finds a cluster by name; no name means the only one.
func (s *Server) cluster(name string) (string, Attestor, error) {
	names := slices.Sorted(maps.Keys(s.c.Clusters))
	if name == "" && len(names) == 1 {
		name = names[0]
	}
	if c, ok := s.c.Clusters[name]; ok {
		return name, c, nil
	}
	if name == "" {
		return "", nil, refusal.New(refusal.RequestMalformed, "the CA has several clusters, name one of %s", strings.Join(names, ", ")).On("cluster")
	}
	return "", nil, refusal.New(refusal.ClusterUnknown, "the request names cluster %.63q, the CA has %s", name, strings.Join(names, ", ")).On("cluster")
}

func refusedAnswer(answer *meshcav1.TestPolicyResponse, err error) (*meshcav1.TestPolicyResponse, error) {
	e, ok := refusal.From(err)
	if !ok {
		return nil, err
	}
	answer.Refusal = &meshcav1.Refusal{Code: uint32(e.Reason.Code()), Reason: string(e.Reason), Message: e.Detail}
	if e.RetryAfter > 0 {
		answer.Refusal.RetryAfter = durationpb.New(e.RetryAfter)
	}
	return answer, nil
}
