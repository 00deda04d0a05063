package issuance

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/credentials"

	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/ca/registration"
)

// Credentials ask for a client certificate and do not insist: an agent that attests itself
// for the first time has none. What it shows is verified as an X509-SVID once, at the handshake; one that does not
// verify makes the caller untrusted, not the connection fail, so that the refusal has a name and an audit line.
type Credentials struct {
	credentials.TransportCredentials
	bundle x509bundle.Source
}

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
	party *party
	raw   net.Conn
}

// shake shakes hands, and returns who the client proved to be.
func (c *Credentials) shake(raw net.Conn) (net.Conn, credentials.TLSInfo, registration.Caller, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, credentials.TLSInfo{}, registration.Caller{}, err
	}
	tlsInfo, ok := info.(credentials.TLSInfo)
	if !ok {
		_ = conn.Close()
		return nil, credentials.TLSInfo{}, registration.Caller{}, errors.New("issuance: the connection is not TLS")
	}
	return conn, tlsInfo, c.identify(raw.RemoteAddr().String(), tlsInfo.State), nil
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
	caller.Serial = serial.String(leaf.SerialNumber)
	return caller
}
