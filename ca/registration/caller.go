package registration

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
)

// Agent is a caller that Admit found to be one, and what it is held to. Nothing else makes an Agent that issues.
type Agent struct {
	ca.AgentInstance
	caller  Caller
	cluster string
	member  Member
}

// Admit finds out who calls: an agent that is on record, of this cluster, whose pod and node live. It is the first step
// of all that an agent may ask for, taken once for a call, however many requests that holds. It leaves no audit line: a
// refused call leaves one at its door, which knows how often the same peer was refused already.
//
// No policy can open the CA to workloads without an agent yet, so they are refused here, before anything is spent on
// them. Alive is asked last: whoever is refused for a passing reason is an agent all the same.
func (a *Authority) Admit(ctx context.Context, c Caller, cluster string) (*Agent, error) {
	member, err := a.member(cluster)
	switch {
	case err != nil:
		return nil, err
	case c.Untrusted != nil:
		return nil, refusal.New(refusal.CallerUntrusted, "%w", c.Untrusted)
	case c.ID.IsZero():
		return nil, refusal.New(refusal.AgentRequired, "the call came without an agent's SVID as client certificate, and calls without an agent are not allowed")
	case !time.Now().Before(c.NotAfter):
		return nil, refusal.New(refusal.AgentExpired, "the SVID %s of %s ended at %s", c.Serial, c.ID, c.NotAfter.UTC().Format(time.RFC3339))
	}
	known, err := a.Agents.instance(c.ID, c.Serial)
	if err != nil {
		return nil, err
	}
	if known.cluster != cluster {
		return nil, refusal.New(refusal.ClusterMismatch, "%s attested to cluster %s, the request names %s", c.ID, known.cluster, cluster)
	}
	if err := a.Orders.refuses(c.ID); err != nil {
		return nil, err
	}
	if err := member.lists(known.evidence.Identity); err != nil {
		return nil, err
	}
	if err := member.Cluster.Alive(ctx, known.evidence); err != nil {
		return nil, err
	}
	return &Agent{AgentInstance: known.AgentInstance, caller: c, cluster: cluster, member: member}, nil
}

func (a *Authority) member(cluster string) (Member, error) {
	m, ok := a.Clusters[cluster]
	if !ok {
		return Member{}, refusal.New(refusal.ClusterUnknown, "the request names cluster %.63q, the CA has %s",
			cluster, strings.Join(slices.Sorted(maps.Keys(a.Clusters)), ", ")).On("cluster")
	}
	return m, nil
}

// lists reports whether the service account is one of the cluster's agents.
func (m Member) lists(i attestor.Identity) error {
	if !slices.Contains(m.Agents, i.Namespace()+"/"+i.ServiceAccount()) {
		return refusal.New(refusal.AgentNotListed, "%s/%s is not under agents of cluster %s", i.Namespace(), i.ServiceAccount(), i.Cluster()).On("sub")
	}
	return nil
}

// AgentID is the SPIFFE ID of the agent on a node; only this package grants IDs under /meshca/.
func AgentID(td spiffeid.TrustDomain, cluster, node string) (spiffeid.ID, error) {
	id, err := spiffeid.FromSegments(td, "meshca", "agent", cluster, node)
	if err != nil {
		return spiffeid.ID{}, refusal.New(refusal.IdentityInvalid, "agent of cluster %q on node %q: %w", cluster, node, err)
	}
	return id, nil
}
