// Package attestor says what "attested" means: an Identity that was proven, and the Evidence it rests on.
// How it is proven is the subpackages' matter.
package attestor

import (
	"fmt"
	"log/slog"
	"time"
)

// Audiences of service-account tokens. A token proves a workload, or the agent that asks for workloads, never both.
const (
	WorkloadAudience = "meshca"
	AgentAudience    = "meshca-agent"
)

// Methods by which objects of the cluster's API prove whom they ask for: see Evidence.Method.
const (
	MethodPodCertificate = "kubernetes/podCertificateRequest"
	MethodSigningRequest = "kubernetes/certificateSigningRequest"
)

// Identity is the Kubernetes service account that a workload proved to run as. It is comparable, and comes only out of
// NewIdentity, so its parts are always valid names.
type Identity struct {
	cluster, namespace, serviceAccount string
}

// NewIdentity checks the parts: the cluster a name of its configuration (RFC 1123 label), the namespace an RFC 1123
// label, the service account an RFC 1123 subdomain. None of them can hold a slash, a colon or a percent sign, so none
// can change the shape of a SPIFFE ID that is made of them.
func NewIdentity(cluster, namespace, serviceAccount string) (Identity, error) {
	switch {
	case !isLabel(cluster):
		return Identity{}, fmt.Errorf("cluster name %q is not an RFC 1123 label", cluster)
	case !isLabel(namespace):
		return Identity{}, fmt.Errorf("namespace %q is not an RFC 1123 label", namespace)
	case !isSubdomain(serviceAccount):
		return Identity{}, fmt.Errorf("service account %q is not an RFC 1123 subdomain", serviceAccount)
	}
	return Identity{cluster, namespace, serviceAccount}, nil
}

// Cluster is the cluster's name in the CA's configuration.
func (i Identity) Cluster() string { return i.cluster }

// Namespace is the service account's namespace.
func (i Identity) Namespace() string { return i.namespace }

// ServiceAccount is the service account's name.
func (i Identity) ServiceAccount() string { return i.serviceAccount }

// String is cluster/namespace/name, for people.
func (i Identity) String() string { return i.cluster + "/" + i.namespace + "/" + i.serviceAccount }

// IsZero reports whether i is the zero Identity, which nobody has.
func (i Identity) IsZero() bool { return i == Identity{} }

// Evidence is what an attestation found: the identity, and the objects it was proven to stand on.
//
// A refused attestation returns what it had by then: Proven tells whether the token's signature (or the API server)
// stands behind it, or it is only what an unverified token says of itself, good for explaining and for nothing else.
type Evidence struct {
	Proven bool
	// Vouched: no token stands behind it, but an agent's word that the cluster bears out.
	Vouched  bool
	Identity Identity
	// Method is how it was proven: "kubernetes/tokenReview", "kubernetes/jwks", by an agent's word that the cluster
	// bears out, "kubernetes/nodeVouched", or by an object of the cluster's API that it confirms.
	Method string
	// ServiceAccountUID, PodName, PodUID: from the token, checked against the cluster where it can be asked.
	ServiceAccountUID, PodName, PodUID string
	// NodeName and NodeUID: the token's node claim, and the pod's spec.nodeName where the cluster can be asked. Both are
	// set, or the attestation was refused (NODE_UNKNOWN).
	NodeName, NodeUID string
	// CredentialID is the token's jti, which the API server's own audit log has too.
	CredentialID string
	// IssuedAt and ExpiresAt are the token's.
	IssuedAt, ExpiresAt time.Time
	// Facts are nil where none were wanted, or nobody can be asked for them.
	Facts *Facts
}

// Token is a bearer secret: whatever prints, logs or marshals it gets a placeholder.
type Token struct{ secret string }

// NewToken wraps a token as it came.
func NewToken(secret string) Token { return Token{secret} }

// Secret is the token itself; call it only where it is verified or sent to be verified.
func (t Token) Secret() string { return t.secret }

// String, GoString, Format, MarshalText and LogValue keep the secret out of every print and dump.
func (t Token) String() string               { return "(token)" }
func (t Token) GoString() string             { return "(token)" }
func (t Token) Format(f fmt.State, _ rune)   { _, _ = f.Write([]byte("(token)")) }
func (t Token) MarshalText() ([]byte, error) { return []byte("(token)"), nil }
func (t Token) LogValue() slog.Value         { return slog.StringValue("(token)") }

func isLabel(s string) bool {
	if len(s) == 0 || len(s) > 63 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		case c == '-' && i > 0 && i < len(s)-1:
		default:
			return false
		}
	}
	return true
}

func isSubdomain(s string) bool {
	if len(s) == 0 || len(s) > 253 {
		return false
	}
	start := 0
	for i := 0; i <= len(s); i++ {
		if i == len(s) || s[i] == '.' {
			if !isSubdomainLabel(s[start:i]) {
				return false
			}
			start = i + 1
		}
	}
	return true
}

// isSubdomainLabel is isLabel without the bound of 63: Kubernetes' subdomain bounds only the whole.
func isSubdomainLabel(s string) bool {
	if len(s) == 0 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		case c == '-' && i > 0 && i < len(s)-1:
		default:
			return false
		}
	}
	return true
}
