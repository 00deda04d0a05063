package registration

import (
	"context"
	"crypto"
	"fmt"
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
	Agents *AgentBook
	Orders *Orders
	// Endings is what lives, and what of it has lost its cause.
	Endings *Endings
	// Continuity says whether the store still knows who is denied.
	Continuity *Continuity
	// Pace bounds how many SVIDs one pod is issued.
	Pace *Pace
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
	case c.Policy == nil || c.Issuer == nil || c.Agents == nil || c.Orders == nil || c.Endings == nil || c.Continuity == nil || c.Pace == nil || c.Journal == nil:
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

// Issue is the one procedure through which a workload's request becomes a certificate; its first step, who calls, is
// Admit's. It returns the SVID or a refusal, and leaves a decision behind either way: audit line, ring, metrics.
func (a *Authority) Issue(ctx context.Context, by *Admitted, r Request) (ca.SVID, error) {
	d := a.Journal.begin(eventIssue, r.Door, by.caller, by.cluster)
	r.Claim = r.Claim.bounded()
	d.claims(r.Claim)
	defer a.Journal.concludePanic(d)
	svid, err := a.issue(ctx, by, r, d)
	a.Journal.conclude(d, svid, err)
	return svid, err
}

func (a *Authority) issue(ctx context.Context, by *Admitted, r Request, d *Decision) (_ ca.SVID, err error) {
	// 1. Who calls: an agent, as the CA knows it, of this cluster, and alive; the workload itself, where policy lets any; or
	// an object of the cluster's API. Admit, AdmitDirect and AdmitObjects have found that out for the whole call.

	// 2. Attest: the workload's own token, made for us, of a pod that lives. An agent's word alone is worth nothing, but
	// where policy takes it for a pod that the cluster itself knows; an object's word is worth what the cluster confirms.
	d.Evidence, err = a.attest(ctx, by, r)
	if err != nil {
		return ca.SVID{}, err
	}

	// 3. Authorise: an agent may ask only for pods that run beside it. Names can be reused; UIDs cannot.
	if by.agent() && d.Evidence.NodeUID != by.NodeUID {
		return ca.SVID{}, refusal.New(refusal.PodNotOnNode, "pod %s/%s runs on node %s (%s), the agent asks from node %s (%s)",
			d.Evidence.Identity.Namespace(), d.Evidence.PodName, d.Evidence.NodeName, d.Evidence.NodeUID, by.NodeName, by.NodeUID).
			On("kubernetes.io.node.uid")
	}

	// 4. Grant: policy says as what, for how long, and whether by this way; an operator's denial goes before it. Whoever
	// changes either waits until what was decided before is out.
	a.Orders.beginIssuing()
	defer a.Orders.endIssuing()
	grant, basis, err := a.grant(ctx, r, d)
	if err != nil {
		return ca.SVID{}, err
	}
	if err := a.mayIssue(grant.ID); err != nil {
		return ca.SVID{}, err
	}

	// 5. The CSR: its public key, proven to be held; names it may repeat, not add.
	key, err := a.requestedKey(r, grant)
	if err != nil {
		return ca.SVID{}, err
	}

	// 6. Issue: prepare, lint, record, sign, compare. What is signed comes from the grant, and no pod fills the ledger.
	giveBack, err := a.Pace.take(&d.Evidence, grant.TTL)
	if err != nil {
		return ca.SVID{}, err
	}
	svid, err := a.Issuer.Issue(ctx, ca.Request{Grant: grant, PublicKey: key, Evidence: ledgerEvidence(d, basis)})
	if err != nil {
		giveBack()
		return ca.SVID{}, err
	}
	if by.agent() {
		a.Agents.issuedThrough(by.caller.ID.String(), svid.NotAfter)
		a.Endings.issued(d, svid) // before it leaves: what has died since it was attested ends at the next look
	}
	return svid, nil
}

// AttestAgent gives an agent its own SVID, against its own token, every time anew: the node and pod in the token are
// what later calls under this SVID are held to.
func (a *Authority) AttestAgent(ctx context.Context, c Caller, cluster, version string, r Request) (ca.SVID, error) {
	d := a.Journal.begin(eventAttestAgent, r.Door, c, cluster)
	defer a.Journal.concludePanic(d)
	svid, err := a.attestAgent(ctx, cluster, version, r, d)
	a.Journal.conclude(d, svid, err)
	return svid, err
}

func (a *Authority) attestAgent(ctx context.Context, cluster, version string, r Request, d *Decision) (ca.SVID, error) {
	// 1. Attest: a token made for agents, of a pod that lives.
	member, err := a.member(cluster)
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
	d.ID, err = AgentID(a.TrustDomain, cluster, d.Evidence.NodeName)
	if err != nil {
		return ca.SVID{}, err
	}
	grant := ca.Grant{ID: d.ID, TTL: a.AgentTTL}
	a.Orders.beginIssuing()
	defer a.Orders.endIssuing()
	if err := a.mayIssue(grant.ID); err != nil {
		return ca.SVID{}, err
	}

	// 4. The CSR, the ledger, the signature: as for everyone.
	key, err := a.requestedKey(r, grant)
	if err != nil {
		return ca.SVID{}, err
	}
	giveBack, err := a.Pace.take(&d.Evidence, grant.TTL)
	if err != nil {
		return ca.SVID{}, err
	}
	svid, err := a.Issuer.Issue(ctx, ca.Request{Grant: grant, Profile: ca.ProfileAgent, PublicKey: key, Evidence: ledgerEvidence(d, 0)})
	if err != nil {
		giveBack()
		return ca.SVID{}, err
	}

	// 5. Remember: calls under this serial are held to this node and pod.
	if err := a.Agents.admit(ctx, d.ID, cluster, version, svid, d.Evidence); err != nil {
		return ca.SVID{}, err
	}
	return svid, nil
}

// mayIssue refuses what is denied, and all while nobody knows what is.
func (a *Authority) mayIssue(id spiffeid.ID) error {
	if err := a.Continuity.Ready(); err != nil {
		return err
	}
	return a.Orders.refuses(id)
}

func (a *Authority) grant(ctx context.Context, r Request, d *Decision) (ca.Grant, policy.Basis, error) {
	verdict, err := a.Policy.Value().Decide(ctx, PolicyInput(d.Evidence))
	d.Rule, d.ID = verdict.Rule, verdict.ID
	if err == nil {
		err = opens(d, verdict)
	}
	switch {
	case err != nil:
		return ca.Grant{}, 0, err
	case r.TTL < 0:
		return ca.Grant{}, 0, refusal.New(refusal.RequestMalformed, "a life of %s was asked for", r.TTL).On("ttl")
	}
	grant := ca.Grant{ID: verdict.ID, TTL: verdict.TTL, DNSNames: verdict.DNSNames}
	if r.TTL > 0 {
		grant.TTL = min(grant.TTL, max(r.TTL, MinAsked))
	}
	if grant.TTL < r.AtLeast {
		return ca.Grant{}, 0, refusal.New(refusal.LifeTooShort, "policy (%s) grants %s for %s, and a certificate of this API lives %s at least",
			verdict.Rule, verdict.ID, verdict.TTL, r.AtLeast).On("ttl")
	}
	grant.AtLeast = r.AtLeast
	return grant, verdict.Basis, nil
}

func (a *Authority) requestedKey(r Request, grant ca.Grant) (crypto.PublicKey, error) {
	if r.Proof != nil {
		return r.Proof.Key()
	}
	csr, err := ca.ParseCSR(r.CSR)
	if err != nil {
		return nil, err
	}
	if err := csr.WithinGrant(grant); err != nil {
		return nil, err
	}
	return csr.PublicKey, nil
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
	// Way is "direct", "nodeVouched" or "kubelet"; empty where an agent showed the workload's own token.
	Way string `json:"way,omitempty"`
	// Object is the UID of the API object that asked. One object may have several entries, where a try was broken off: at
	// most one of their certificates was delivered.
	Object string `json:"object,omitempty"`
	// Basis is policy.Basis, as text: what of the policy the grant rested on.
	Basis string `json:"basis,omitempty"`
}

func ledgerEvidence(d *Decision, basis policy.Basis) []byte {
	e := d.Evidence
	o := newObject(768)
	o.text("method", e.Method)
	o.text("door", d.Door)
	o.text("cluster", d.Cluster)
	o.text("namespace", e.Identity.Namespace())
	o.text("serviceAccount", e.Identity.ServiceAccount())
	o.text("serviceAccountUID", e.ServiceAccountUID)
	o.text("pod", e.PodName)
	o.text("podUID", e.PodUID)
	o.text("node", e.NodeName)
	o.text("nodeUID", e.NodeUID)
	o.text("credentialID", e.CredentialID)
	o.text("agent", d.agent())
	o.text("rule", d.Rule)
	o.text("way", d.Way())
	o.text("object", d.Object)
	o.text("basis", basis.String())
	return o.end()
}
