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

// Admitted is a caller that may ask: an agent, and what it is held to; a workload that calls by itself; or the cluster's
// API, by its objects. Only Admit, AdmitDirect and AdmitObjects make one.
type Admitted struct {
	// AgentInstance is the agent's; zero for all others.
	ca.AgentInstance
	caller  Caller
	cluster string
	member  Member
	direct  bool
	objects bool
}

// agent reports whether an agent asks, which may do so for pods beside it.
func (by *Admitted) agent() bool { return !by.direct && !by.objects }

// Admit finds out who calls: an agent that is on record, of this cluster, whose pod and node live. It is the first step
// of all that an agent may ask for, taken once for a call, however many requests that holds. It leaves no audit line: a
// refused call leaves one at its door, which knows how often the same peer was refused already.
//
// Alive is asked last: whoever is refused for a passing reason is an agent all the same.
func (a *Authority) Admit(ctx context.Context, c Caller, cluster string) (*Admitted, error) {
	member, err := a.member(cluster)
	switch {
	case err != nil:
		return nil, err
	case c.Untrusted != nil:
		return nil, refusal.New(refusal.CallerUntrusted, "%w", c.Untrusted)
	case c.ID.IsZero():
		return nil, refusal.New(refusal.AgentRequired, "the call came without an agent's SVID as client certificate, and is one that only agents may make")
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
	return &Admitted{AgentInstance: known.AgentInstance, caller: c, cluster: cluster, member: member}, nil
}

// Knows reports whether a caller is an agent as far as the CA's memory tells: its SVID is on record, lives and is not
// denied. It asks nobody, so that a door can tell agents from all others before they have said a word; Admit has the last
// one.
func (a *Authority) Knows(c Caller) bool {
	if c.ID.IsZero() || !time.Now().Before(c.NotAfter) {
		return false
	}
	_, err := a.Agents.instance(c.ID, c.Serial)
	return err == nil && a.Orders.refuses(c.ID) == nil
}

// AdmitDirect admits a caller without a client certificate to ask for its own SVID, if any rule of the policy opens that
// way in the cluster. Where none does, it is refused before anything is spent on it; where one does, its token decides
// what it is, and policy whether this one may.
func (a *Authority) AdmitDirect(c Caller, cluster string) (*Admitted, error) {
	member, err := a.member(cluster)
	switch {
	case err != nil:
		return nil, err
	case c.Untrusted != nil:
		return nil, refusal.New(refusal.CallerUntrusted, "%w", c.Untrusted)
	case !c.ID.IsZero():
		return nil, refusal.New(refusal.AgentUnknown, "%s shows a client certificate, and only agents do: a workload that calls by itself shows its token alone", c.ID)
	}
	if !a.Policy.Value().OpensDirect(cluster) {
		return nil, refusal.New(refusal.AgentRequired, "the call came without an agent's SVID as client certificate, and no policy rule of cluster %s has direct", cluster)
	}
	return &Admitted{caller: c, cluster: cluster, member: member, direct: true}, nil
}

// AdmitObjects admits what objects of the cluster's API ask for, each by its Claim. That there is a door for them is the
// configuration's word; who may make such objects is the API server's to say, and what they claim is held against the
// cluster.
func (a *Authority) AdmitObjects(cluster string) (*Admitted, error) {
	member, err := a.member(cluster)
	if err != nil {
		return nil, err
	}
	return &Admitted{cluster: cluster, member: member, objects: true}, nil
}

// Refuse records that a door refused an object's request before the procedure began, as something that its protocol does
// not allow. It returns err.
func (a *Authority) Refuse(by *Admitted, r Request, err error) error {
	d := a.Journal.begin(eventIssue, r.Door, by.caller, by.cluster)
	d.claims(r.Claim.bounded())
	a.Journal.conclude(d, ca.SVID{}, err)
	return err
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
