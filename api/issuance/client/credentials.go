package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
)

// ServerPath is the path of the CA's own SPIFFE ID.
const ServerPath = "/meshca/server"

// maxPeerChain bounds what the other end may make us verify.
const maxPeerChain = 8

// untrusted is a handshake's failure to prove who answers.
type untrusted struct{ err error }

func (u *untrusted) Error() string { return u.err.Error() }
func (u *untrusted) Unwrap() error { return u.err }

// handshakes are TLS credentials that remember why the last attempt failed, which grpc keeps as a text only.
type handshakes struct {
	credentials.TransportCredentials
	// rejected is told of a server that did not prove to be the CA.
	rejected func(error)
	// last is how the last attempt to connect failed to prove who answers; nil when it ended otherwise.
	last *atomic.Pointer[untrusted]
}

var _ credentials.TransportCredentials = (*handshakes)(nil)

func newHandshakes(c Config) (*handshakes, error) {
	server, err := spiffeid.FromPath(c.TrustDomain, ServerPath)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The standard verification wants a DNS name; VerifyConnection does the SPIFFE one (X509-SVID §5) in its place,
		// and it runs on each connection, resumed ones too.
		InsecureSkipVerify: true, //nolint:gosec // see above
		VerifyConnection: func(s tls.ConnectionState) error {
			if err := verify(s.PeerCertificates, server, c.Bundle); err != nil {
				return &untrusted{err}
			}
			return nil
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if c.Identity != nil {
				if own := c.Identity(); own != nil {
					return own, nil
				}
			}
			return &tls.Certificate{}, nil // none: the token alone is the proof
		},
	}
	return &handshakes{
		TransportCredentials: credentials.NewTLS(config), rejected: c.Rejected, last: &atomic.Pointer[untrusted]{},
	}, nil
}

func verify(chain []*x509.Certificate, server spiffeid.ID, bundle x509bundle.Source) error {
	switch {
	case len(chain) == 0:
		return errors.New("it shows no certificate")
	case len(chain) > maxPeerChain:
		return fmt.Errorf("it shows %d certificates", len(chain))
	}
	id, _, err := x509svid.Verify(chain, bundle)
	if err != nil {
		return err
	}
	if id != server {
		return fmt.Errorf("it proves to be %s, not %s", id, server)
	}
	return nil
}

// ClientHandshake remembers the outcome.
func (h *handshakes) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := h.TransportCredentials.ClientHandshake(ctx, authority, raw)
	var u *untrusted
	if errors.As(err, &u) && h.rejected != nil {
		h.rejected(u.err)
	}
	h.remember(ctx, u)
	return conn, info, err
}

// dial opens the connection below TLS. Where nothing answers, what answered before is nobody's fault any more.
func (h *handshakes) dial(by func(ctx context.Context, address string) (net.Conn, error)) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, address string) (net.Conn, error) {
		raw, err := by(ctx, address)
		if err != nil {
			h.remember(ctx, nil)
		}
		return raw, err
	}
}

// remember takes the outcome of an attempt, unless it was given up: a connection that is replaced says nothing of the CA.
func (h *handshakes) remember(ctx context.Context, u *untrusted) {
	if u != nil || !errors.Is(ctx.Err(), context.Canceled) {
		h.last.Store(u)
	}
}

// Clone keeps what the embedded Clone would lose.
func (h *handshakes) Clone() credentials.TransportCredentials {
	return &handshakes{TransportCredentials: h.TransportCredentials.Clone(), rejected: h.rejected, last: h.last}
}
