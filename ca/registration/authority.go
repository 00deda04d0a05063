package registration

import (
	"context"
	"crypto"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/policy"
	"github.com/meshca/meshca/rotation"
)

// Config is what an Authority is made of; every field is needed.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Clusters    map[string]Member
	// Policy is read anew for each decision.
	Policy *rotation.Current[*policy.Policy]
	Issuer Issuer
	// IsOwnKey reports whether a public key is one of the CA's own.
	IsOwnKey func(crypto.PublicKey) bool
	Agents   *AgentBook
	Orders   *Orders
	// AgentTTL is the life of agents' own SVIDs.
	AgentTTL time.Duration
	Journal  *Journal
}

// Authority is the registration authority. All methods are safe for concurrent use.
type Authority struct {
	Config
}

// New checks the configuration and returns an Authority.
func New(c Config) (*Authority, error) {
	switch {
	case c.TrustDomain.IsZero():
		return nil, fmt.Errorf("registration: no trust domain")
	case len(c.Clusters) == 0:
		return nil, fmt.Errorf("registration: no clusters: nobody could be attested")
	case c.Policy == nil || c.Issuer == nil || c.IsOwnKey == nil || c.Agents == nil || c.Orders == nil || c.Journal == nil:
		return nil, fmt.Errorf("registration: incomplete configuration")
	case c.AgentTTL < MinTTL:
		return nil, fmt.Errorf("registration: agents' SVIDs of %s are too short: at least %s", c.AgentTTL, MinTTL)
	}
	for name, m := range c.Clusters {
		for _, account := range m.Agents {
			ns, sa, ok := strings.Cut(account, "/")
			if _, err := attestor.NewIdentity(name, ns, sa); !ok || err != nil {
				return nil, fmt.Errorf("registration: cluster %s: agent %q is not namespace/service-account", name, account)
			}
		}
	}
	return &Authority{Config: c}, nil
}

// Issue is the one procedure through which a workload's request becomes a certificate. It returns the SVID or a
// refusal, and leaves a decision behind either way: audit line, ring, metrics.
func (a *Authority) Issue(ctx context.Context, r Request) (ca.SVID, error) {
	d := a.Journal.begin(eventIssue, r.Door, r.Caller, r.Cluster)
	defer a.Journal.concludePanic(d)
	svid, err := a.issue(ctx, r, d)
	a.Journal.conclude(d, svid, err)
	return svid, err
}

func (a *Authority) issue(ctx context.Context, r Request, d *Decision) (ca.SVID, error) {
	// 1. Who calls: an agent, as the CA knows it, of this cluster, and alive.
	member, agent, err := a.caller(ctx, r.Caller, r.Cluster)
	if err != nil {
		return ca.SVID{}, err
	}

	// 2. Attest: the workload's own token, made for us, of a pod that lives. An agent's word alone is worth nothing.
	d.Evidence, err = member.Cluster.Attest(ctx, r.Token, WorkloadAudience)
	if err != nil {
		return ca.SVID{}, err
	}

	// 3. Authorise: an agent may ask only for pods that run beside it. Names can be reused; UIDs cannot.
	if d.Evidence.NodeUID != agent.NodeUID {
		return ca.SVID{}, refusal.New(refusal.PodNotOnNode, "pod %s/%s runs on node %s (%s), the agent asks from node %s (%s)",
			d.Evidence.Identity.Namespace(), d.Evidence.PodName, d.Evidence.NodeName, d.Evidence.NodeUID, agent.NodeName, agent.NodeUID).
			On("kubernetes.io.node.uid")
	}

	// 4. Grant: policy says as what, for how long; an operator's denial goes before it.
	grant, err := a.grant(r, d)
	if err != nil {
		return ca.SVID{}, err
	}

	// 5. The CSR: its public key, proven to be held; names it may repeat, not add.
	key, err := a.requestedKey(r.CSR, grant)
	if err != nil {
		return ca.SVID{}, err
	}

	// 6. Issue: prepare, lint, record, sign, compare. What is signed comes from the grant.
	evidence, err := ledgerEvidence(d)
	if err != nil {
		return ca.SVID{}, err
	}
	svid, err := a.Issuer.Issue(ctx, ca.Request{Grant: grant, PublicKey: key, Evidence: evidence})
	if err != nil {
		return ca.SVID{}, err
	}
	a.Agents.issuedThrough(r.Caller.ID.String(), svid.NotAfter)
	return svid, nil
}

// AttestAgent gives an agent its own SVID, against its own token, every time anew: the node and pod in the token are
// what later calls under this SVID are held to.
func (a *Authority) AttestAgent(ctx context.Context, r Request, version string) (ca.SVID, error) {
	d := a.Journal.begin(eventAttestAgent, r.Door, r.Caller, r.Cluster)
	defer a.Journal.concludePanic(d)
	svid, err := a.attestAgent(ctx, r, version, d)
	a.Journal.conclude(d, svid, err)
	return svid, err
}

func (a *Authority) attestAgent(ctx context.Context, r Request, version string, d *Decision) (ca.SVID, error) {
	// 1. Attest: a token made for agents, of a pod that lives.
	member, err := a.member(r.Cluster)
	if err != nil {
		return ca.SVID{}, err
	}
	d.Evidence, err = member.Cluster.Attest(ctx, r.Token, AgentAudience)
	if err != nil {
		return ca.SVID{}, err
	}

	// 2. Authorise: only the service accounts that the cluster's entry lists are agents.
	if err := member.lists(d.Evidence.Identity); err != nil {
		return ca.SVID{}, err
	}

	// 3. Grant: the agent's name is its cluster and node; policy has no say in it, an operator's denial has.
	id, err := AgentID(a.TrustDomain, r.Cluster, d.Evidence.NodeName)
	if err != nil {
		return ca.SVID{}, err
	}
	d.ID = id
	if err := a.Orders.refuses(id); err != nil {
		return ca.SVID{}, err
	}
	grant := ca.Grant{ID: id, TTL: a.AgentTTL}

	// 4. The CSR, the ledger, the signature: as for everyone.
	key, err := a.requestedKey(r.CSR, grant)
	if err != nil {
		return ca.SVID{}, err
	}
	evidence, err := ledgerEvidence(d)
	if err != nil {
		return ca.SVID{}, err
	}
	svid, err := a.Issuer.Issue(ctx, ca.Request{Grant: grant, Profile: ca.ProfileAgent, PublicKey: key, Evidence: evidence})
	if err != nil {
		return ca.SVID{}, err
	}

	// 5. Remember: calls under this serial are held to this node and pod.
	if err := a.Agents.admit(ctx, id, r.Cluster, version, svid, d.Evidence); err != nil {
		return ca.SVID{}, err
	}
	return svid, nil
}

// AuthenticateAgent admits a caller that must be an agent of this cluster, for calls that issue nothing. A refusal
// leaves an audit line, unless it will pass: an API server that is away is asked about each agent, again and again.
func (a *Authority) AuthenticateAgent(ctx context.Context, door string, c Caller, cluster string) error {
	_, _, err := a.caller(ctx, c, cluster)
	if err != nil && !refusal.Of(err).Passing() {
		a.Journal.Refused(eventAgentCall, door, c, cluster, err)
	}
	return err
}

// caller finds out who calls: an agent that is on record, of this cluster, whose pod and node live. No policy can open
// the CA to workloads without an agent yet, so they are refused here, before anything is spent on them. Alive is asked
// last: whoever is refused for a passing reason is an agent all the same.
func (a *Authority) caller(ctx context.Context, c Caller, cluster string) (Member, *ca.AgentInstance, error) {
	member, err := a.member(cluster)
	switch {
	case err != nil:
		return Member{}, nil, err
	case c.Untrusted != nil:
		return Member{}, nil, refusal.New(refusal.CallerUntrusted, "%w", c.Untrusted)
	case c.ID.IsZero():
		return Member{}, nil, refusal.New(refusal.AgentRequired, "the call came without an agent's SVID as client certificate, and calls without an agent are not allowed")
	case !time.Now().Before(c.NotAfter):
		return Member{}, nil, refusal.New(refusal.AgentExpired, "the SVID %s of %s ended at %s", c.Serial, c.ID, c.NotAfter.UTC().Format(time.RFC3339))
	}
	agent, err := a.Agents.instance(ctx, c.ID, c.Serial)
	if err != nil {
		return Member{}, nil, err
	}
	if agent.cluster != cluster {
		return Member{}, nil, refusal.New(refusal.ClusterMismatch, "%s attested to cluster %s, the request names %s", c.ID, agent.cluster, cluster)
	}
	if err := a.Orders.refuses(c.ID); err != nil {
		return Member{}, nil, err
	}
	if err := member.lists(agent.evidence.Identity); err != nil {
		return Member{}, nil, err
	}
	if err := member.Cluster.Alive(ctx, agent.evidence); err != nil {
		return Member{}, nil, err
	}
	return member, &agent.AgentInstance, nil
}

func (a *Authority) grant(r Request, d *Decision) (ca.Grant, error) {
	who := d.Evidence.Identity
	verdict, err := a.Policy.Value().Decide(policy.Input{Cluster: who.Cluster(), Namespace: who.Namespace(), ServiceAccount: who.ServiceAccount()})
	d.Rule, d.ID = verdict.Rule, verdict.ID
	switch {
	case err != nil:
		return ca.Grant{}, err
	case r.TTL < 0 || r.TTL > 0 && r.TTL < MinTTL:
		return ca.Grant{}, refusal.New(refusal.RequestMalformed, "a life of %s was asked for, the shortest is %s", r.TTL, MinTTL).On("ttl")
	}
	if err := a.Orders.refuses(verdict.ID); err != nil {
		return ca.Grant{}, err
	}
	grant := ca.Grant{ID: verdict.ID, TTL: verdict.TTL, DNSNames: verdict.DNSNames}
	if r.TTL > 0 {
		grant.TTL = min(grant.TTL, r.TTL)
	}
	return grant, nil
}

func (a *Authority) requestedKey(der []byte, grant ca.Grant) (crypto.PublicKey, error) {
	csr, err := ca.ParseCSR(der)
	if err != nil {
		return nil, err
	}
	if err := csr.WithinGrant(grant); err != nil {
		return nil, err
	}
	if a.IsOwnKey(csr.PublicKey) {
		return nil, refusal.New(refusal.CSRKeyIsCA, "the CSR for %s holds a public key of the CA", grant.ID)
	}
	return csr.PublicKey, nil
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

// LedgerEvidence is what stands in the ledger beside each certificate: what its grant rested on. It holds no secret.
type LedgerEvidence struct {
	Method            string `json:"method"`
	Door              string `json:"door"`
	Cluster           string `json:"cluster"`
	Namespace         string `json:"namespace"`
	ServiceAccount    string `json:"serviceAccount"`
	ServiceAccountUID string `json:"serviceAccountUID,omitempty"`
	Pod               string `json:"pod,omitempty"`
	PodUID            string `json:"podUID,omitempty"`
	Node              string `json:"node,omitempty"`
	NodeUID           string `json:"nodeUID,omitempty"`
	CredentialID      string `json:"credentialID,omitempty"`
	Agent             string `json:"agent,omitempty"`
	Rule              string `json:"rule,omitempty"`
}

func ledgerEvidence(d *Decision) ([]byte, error) {
	e := d.Evidence
	b, err := json.Marshal(LedgerEvidence{
		Method: e.Method, Door: d.Door, Cluster: d.Cluster, Namespace: e.Identity.Namespace(), ServiceAccount: e.Identity.ServiceAccount(),
		ServiceAccountUID: e.ServiceAccountUID, Pod: e.PodName, PodUID: e.PodUID, Node: e.NodeName, NodeUID: e.NodeUID,
		CredentialID: e.CredentialID, Agent: d.agent(), Rule: d.Rule,
	})
	if err != nil {
		return nil, fmt.Errorf("registration: evidence for the ledger: %w", err)
	}
	return b, nil
}
