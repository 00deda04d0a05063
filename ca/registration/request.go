package registration

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
)

// Token audiences. A token made for one purpose is worth nothing for the other.
const (
	WorkloadAudience = attestor.WorkloadAudience
	AgentAudience    = attestor.AgentAudience
)

const (
	// MinTTL is the shortest life that policy may grant: below it, renewal would be a busy loop.
	MinTTL = ca.MinTTL
	// MinAsked is the shortest that a caller may ask for: each renewal is an entry of the ledger, which is the operator's to
	// spend. Who asks for less gets this, or what policy grants where that is less.
	MinAsked = 10 * time.Minute
)

// Caller is who stands at a door, as the transport proved it.
type Caller struct {
	// Address is the peer's, for the audit line.
	Address string
	// ID, Serial (lower-case hex) and NotAfter are those of the SVID it showed; ID is zero when it showed none.
	ID       spiffeid.ID
	Serial   string
	NotAfter time.Time
	// Untrusted is set when it showed a certificate that is no SVID of this trust domain, and says why.
	Untrusted error
}

// Request asks for one workload's X509-SVID.
type Request struct {
	// Door is the API the request came through: "grpc". A bounded metric label.
	Door string
	// Token is the workload's own.
	Token attestor.Token
	// Pod is named instead of a token by an agent that vouches for it, where policy says nodeVouched.
	Pod *attestor.PodRef
	// Claim is made by an object of the cluster's API instead: see AdmitObjects.
	Claim *Claim
	// CSR is PKCS #10, DER. Only its public key is used.
	CSR []byte
	// Proof shows the key where the door's protocol has no CSR.
	Proof *ca.KeyProof
	// TTL asks for a shorter life than the grant's; zero or more than the grant is clamped to it, less than MinAsked to that.
	TTL time.Duration
	// AtLeast is the shortest life that the door's protocol allows, from now to NotAfter. Where less is granted the request
	// is refused (LIFE_TOO_SHORT); where less is left of the intermediate it has to come again (ISSUER_ENDING).
	AtLeast time.Duration
}

// Claim is what an object of the cluster's API says of a pod: a PodCertificateRequest or a CertificateSigningRequest. It is
// worth what the cluster says to it.
type Claim struct {
	// Said is the pod, its service account and its node, by names and UIDs. Its Method says who makes such objects:
	// attestor.MethodPodCertificate the kubelet, for pods beside it; attestor.MethodSigningRequest the pod itself.
	Said attestor.Evidence
	// Object is the UID of the object, for audit and ledger: entries of one object are tries for one certificate.
	Object string
}

// bounded is the claim without what can be no object's name or UID, and not proven; nil of nil.
func (c *Claim) bounded() *Claim {
	if c == nil {
		return nil
	}
	b := *c
	b.Said.Proven, b.Said.Vouched, b.Said.Facts = false, false, nil
	for _, s := range []*string{&b.Object, &b.Said.ServiceAccountUID, &b.Said.PodName, &b.Said.PodUID, &b.Said.NodeName, &b.Said.NodeUID, &b.Said.CredentialID} {
		if len(*s) > 253 {
			*s = ""
		}
	}
	return &b
}

// Cluster attests the workloads of one Kubernetes cluster, and knows what has become of them. All methods are called
// concurrently, answer with a *refusal.Error, and end before ctx does.
type Cluster interface {
	Living
	// Attest proves a token of exactly this audience and that what it stands for is alive. With an error it returns what
	// it knew by then; see Evidence.Proven.
	Attest(ctx context.Context, token attestor.Token, audience string) (attestor.Evidence, error)
	// AttestDirect is Attest for a workload's token that strangers bring: whatever that costs a dependency is bounded apart
	// from what agents cost.
	AttestDirect(ctx context.Context, token attestor.Token) (attestor.Evidence, error)
	// Vouch finds out whose a pod is that an agent names without a token, from what the cluster itself knows of the pod.
	// The node in the evidence is where it runs: on an agent's word alone nothing follows.
	Vouch(ctx context.Context, pod attestor.PodRef) (attestor.Evidence, error)
	// Confirm holds what somebody claims of a pod against what the cluster knows: pod, service account and node, each by
	// its UID. What comes back is proven, or an error says why not.
	Confirm(ctx context.Context, claimed attestor.Evidence) (attestor.Evidence, error)
}

// Living knows what has become of what was attested.
type Living interface {
	// Alive checks again that the pod, node, service account and namespace of an earlier attestation live. It is called
	// for the agent with every request, so it must be cheap.
	Alive(ctx context.Context, e attestor.Evidence) error
	// Ended tells which of these earlier attestations rest on what is certainly no more, by their index, and why. Whatever is
	// not certain ends nothing: it is called again and again, with all that lives. It may last a few seconds.
	Ended(ctx context.Context, held []*attestor.Evidence) map[int]*refusal.Error
}

// Issuer signs what was granted.
type Issuer interface {
	Issue(ctx context.Context, r ca.Request) (ca.SVID, error)
}

// Member is one cluster of the configuration.
type Member struct {
	Cluster Cluster
	// Agents are the service accounts, "namespace/name", whose pods are agents; nobody else is.
	Agents []string
}
