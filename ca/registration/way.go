package registration

import (
	"context"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca/policy"
)

// The ways of a workload's request. The usual one, an agent that shows the workload's own token, has no name. The next two
// are closed unless policy opens them, for the very workload.
const (
	wayDirect      = "direct"      // the workload shows its token itself
	wayNodeVouched = "nodeVouched" // an agent names a pod that runs beside it, and shows no token
	// The node's kubelet names a pod that runs beside it, by an object of the API. The configuration opens it for a whole
	// cluster: a kubelet could have a token of any of its pods, so policy has no more to open than for those.
	wayKubelet = "kubelet"
)

// Way is how a workload's request came: "direct", "nodeVouched", "kubelet", or empty for the usual one.
func (d *Decision) Way() string {
	switch {
	case d.Event != eventIssue:
		return ""
	case d.Evidence.Method == attestor.MethodPodCertificate:
		return wayKubelet
	case d.Evidence.Vouched:
		return wayNodeVouched
	case d.Caller.ID.IsZero():
		return wayDirect
	}
	return ""
}

// attest proves whose the request is, by the way that it came.
func (a *Authority) attest(ctx context.Context, by *Admitted, r Request) (attestor.Evidence, error) {
	cluster := by.member.Cluster
	switch {
	case by.objects != (r.Claim != nil):
		return attestor.Evidence{}, refusal.New(refusal.Internal, "a claim came to another door than that of objects, or none to that")
	case by.objects:
		return cluster.Confirm(ctx, r.Claim.Said)
	case r.Pod == nil && by.direct:
		return cluster.AttestDirect(ctx, r.Token)
	case r.Pod == nil:
		return cluster.Attest(ctx, r.Token, WorkloadAudience)
	}
	vouched := attestor.Evidence{Vouched: true}
	switch {
	case by.direct:
		return vouched, refusal.New(refusal.NodeVouchedNotAllowed, "the call came without an agent's SVID, and nobody else can vouch for a pod").On("pod")
	case r.Token.Secret() != "":
		return vouched, refusal.New(refusal.RequestMalformed, "the request has a token and names a pod: one of them").On("pod")
	}
	// Also where no rule opens this way: who is refused is to be found under the pod's name.
	pod := *r.Pod
	pod.Node = by.NodeName
	return cluster.Vouch(ctx, pod)
}

// opens reports whether the rule that grants lets the request come by its way.
func opens(d *Decision, verdict policy.Decision) error {
	who, way := d.Evidence.Identity, d.Way()
	switch {
	case way == wayDirect && !verdict.Direct:
		return refusal.New(refusal.DirectNotAllowed, "policy (%s) grants %s to service account %s/%s of cluster %s, and not to a workload that calls by itself",
			verdict.Rule, verdict.ID, who.Namespace(), who.ServiceAccount(), who.Cluster())
	case way == wayNodeVouched && !verdict.NodeVouched:
		return refusal.New(refusal.NodeVouchedNotAllowed, "policy (%s) grants %s to service account %s/%s of cluster %s, and not on an agent's word",
			verdict.Rule, verdict.ID, who.Namespace(), who.ServiceAccount(), who.Cluster())
	}
	return nil
}

// The bounds of facts are the same for those who gather them and for those who reckon with them.
var (
	_ = [1]struct{}{}[policy.MaxEntries-attestor.MaxEntries]
	_ = [1]struct{}{}[policy.MaxEntryBytes-attestor.MaxEntryBytes]
)

// PolicyInput is what policy is told of an attested workload.
func PolicyInput(e attestor.Evidence) policy.Input {
	in := policy.Input{
		Cluster: e.Identity.Cluster(), Namespace: e.Identity.Namespace(), ServiceAccount: e.Identity.ServiceAccount(), Pod: e.PodName, Node: e.NodeName,
	}
	f := e.Facts
	if f == nil {
		return in
	}
	in.PodLabels, in.PodAnnotations, in.NamespaceLabels = f.PodLabels, f.PodAnnotations, f.NamespaceLabels
	if f.TooLarge.PodLabels {
		in.TooLarge |= policy.PodLabels
	}
	if f.TooLarge.PodAnnotations {
		in.TooLarge |= policy.PodAnnotations
	}
	if f.TooLarge.NamespaceLabels {
		in.TooLarge |= policy.NamespaceLabels
	}
	return in
}

// Wants is what an attestor has to gather for a policy to decide about a cluster's workloads.
func Wants(p *policy.Policy, cluster string) attestor.Wants {
	uses := p.Uses(cluster)
	return attestor.Wants{
		PodLabels: uses&policy.PodLabels != 0, PodAnnotations: uses&policy.PodAnnotations != 0, NamespaceLabels: uses&policy.NamespaceLabels != 0,
	}
}
