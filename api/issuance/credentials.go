package issuance

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
)

// Credentials are server credentials that ask for a client certificate and do not insist: an agent that attests itself
// for the first time has none. What it shows is verified as an X509-SVID once, at the handshake; one that does not
// verify makes the caller untrusted, not the connection fail, so that the refusal has a name and an audit line.
type Credentials struct {
	credentials.TransportCredentials
	bundle x509bundle.Source
}

var _ credentials.TransportCredentials = (*Credentials)(nil)

// NewCredentials serves the certificate that serving returns at each handshake, and verifies clients by bundle.
func NewCredentials(serving func() (*tls.Certificate, error), bundle x509bundle.Source) *Credentials {
	return &Credentials{bundle: bundle, TransportCredentials: credentials.NewTLS(&tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return serving() },
		ClientAuth:     tls.RequestClientCert,
		// A resumed session would carry a client certificate past the check below.
		SessionTicketsDisabled: true,
	})}
}

// callerInfo is the AuthInfo of every connection: TLS, and who the client proved to be.
type callerInfo struct {
	credentials.TLSInfo
	caller registration.Caller
	raw    net.Conn
}

// ServerHandshake is called by grpc for each connection.
func (c *Credentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c.shake(raw)
}

func (c *Credentials) shake(raw net.Conn) (net.Conn, callerInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, callerInfo{}, err
	}
	tlsInfo, ok := info.(credentials.TLSInfo)
	if !ok {
		_ = conn.Close()
		return nil, callerInfo{}, errors.New("issuance: the connection is not TLS")
	}
	return conn, callerInfo{TLSInfo: tlsInfo, caller: c.identify(raw.RemoteAddr().String(), tlsInfo.State), raw: raw}, nil
}

// Clone keeps the verification, which the embedded Clone would lose.
func (c *Credentials) Clone() credentials.TransportCredentials { return c.clone() }

func (c *Credentials) clone() *Credentials {
	return &Credentials{TransportCredentials: c.TransportCredentials.Clone(), bundle: c.bundle}
}

func (c *Credentials) identify(address string, state tls.ConnectionState) registration.Caller {
	caller := registration.Caller{Address: address}
	if len(state.PeerCertificates) == 0 {
		return caller
	}
	id, _, err := x509svid.Verify(state.PeerCertificates, c.bundle)
	if err != nil {
		caller.Untrusted = fmt.Errorf("its client certificate: %w", err)
		return caller
	}
	leaf := state.PeerCertificates[0]
	caller.ID, caller.NotAfter = id, leaf.NotAfter
	caller.Serial = ca.SerialString(leaf.SerialNumber)
	return caller
}

// hangUp closes the connection of a call, and with it ends all that came through it.
func hangUp(ctx context.Context) {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(callerInfo); ok {
			_ = info.raw.Close()
		}
	}
}

// callerOf returns who the connection's client proved to be.
func callerOf(ctx context.Context) (registration.Caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return registration.Caller{}, errors.New("issuance: the call has no peer")
	}
	info, ok := p.AuthInfo.(callerInfo)
	if !ok {
		return registration.Caller{}, errors.New("issuance: the connection was not made with issuance.Credentials")
	}
	return info.caller, nil
}
