package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Upstream signs the intermediates of replicas; it holds the root.
//
// Both calls may be slow and may fail for a while: what errs is answered with UPSTREAM_UNAVAILABLE and tried again.
// They are safe for concurrent use.
type Upstream interface {
	// SignIntermediate returns the new intermediate first, then what leads to a root, never the root itself. The
	// certificate has path length 0 and the URI SAN spiffe://<trust domain> (SPIFFE X509-SVID §3.2: no path). It may
	// live shorter than was asked; its caller checks all of it.
	SignIntermediate(ctx context.Context, r IntermediateRequest) ([]*x509.Certificate, error)
	// Roots returns the upstream's roots. To list them is not to trust them: see Trust.
	Roots(ctx context.Context) ([]*x509.Certificate, error)
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
