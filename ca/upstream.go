package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Upstream holds roots, and signs the intermediates of replicas with the issuers below them. There may be several
// issuers at a time: the one in use, and its successor.
//
// Both calls may be slow and may fail for a while: what errs is answered with UPSTREAM_UNAVAILABLE and tried again.
// They are safe for concurrent use.
type Upstream interface {
	// Issuers returns all that could sign, those that the configuration names first. To list them is not to trust them.
	Issuers(ctx context.Context) ([]UpstreamIssuer, error)
	// SignIntermediate has the issuer with this reference sign. It returns the new intermediate first, then what leads to
	// the issuer's root, never the root itself. The certificate has path length 0 and the URI SAN spiffe://<trust domain>
	// (SPIFFE X509-SVID §3.2: no path). It may live shorter than was asked; its caller checks all of it.
	SignIntermediate(ctx context.Context, ref string, r IntermediateRequest) ([]*x509.Certificate, error)
}

// UpstreamIssuer is one that could sign intermediates.
type UpstreamIssuer struct {
	// Ref is the upstream's own name for it, which no other one ever gets.
	Ref string
	// Name is for people; it may change.
	Name string
	// Root is the self-signed end of its chain; nil when it is not known, and then Fault says why.
	Root *x509.Certificate
	// Path is what leads to Root, without that, the issuer's own certificate first; empty where that is the root itself.
	Path []*x509.Certificate
	// NotAfter is the earliest end in its chain.
	NotAfter time.Time
	// Named says that the configuration names it: the first start trusts and uses it.
	Named bool
	// Fault says why it cannot be used; nil when it can.
	Fault error
}

// IntermediateRequest asks an Upstream for an intermediate.
type IntermediateRequest struct {
	PublicKey   crypto.PublicKey
	TrustDomain spiffeid.TrustDomain
	// Life is from now to NotAfter. The upstream shortens it to its own end.
	Life       time.Duration
	CommonName string
	// CSR is a PKCS #10 request (DER) for the same key, name and URI SAN, for upstreams that want the proof of
	// possession.
	CSR []byte
}
