package admin

import (
	"context"
	"fmt"
	"net"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// PeerCredentials are gRPC server credentials of a unix socket: no encryption, and the peer's uid as the kernel took it
// down when the peer connected (SO_PEERCRED). Connections that are not unix sockets are refused.
type PeerCredentials struct{}

var _ credentials.TransportCredentials = PeerCredentials{}

// Peer is the AuthInfo of a connection.
type Peer struct {
	credentials.CommonAuthInfo
	UID, GID uint32
	PID      int32
}

// AuthType names the kind of proof.
func (Peer) AuthType() string { return "unix-peer" }

// ServerHandshake reads the peer from the socket.
func (PeerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p, err := peerOf(conn)
	if err != nil {
		_ = conn.Close()
		return nil, nil, fmt.Errorf("admin: who connected is not known: %w", err)
	}
	// Nothing else on this machine can read or change what passes through the socket.
	p.SecurityLevel = credentials.PrivacyAndIntegrity
	return conn, p, nil
}

// ClientHandshake is not what these are for.
func (PeerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, fmt.Errorf("admin: these are a server's credentials")
}

// Info describes the transport.
func (PeerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}

// Clone returns the same: they hold nothing.
func (PeerCredentials) Clone() credentials.TransportCredentials { return PeerCredentials{} }

// OverrideServerName has no meaning for a socket.
func (PeerCredentials) OverrideServerName(string) error { return nil }

// peerName is the caller in audit lines and denials: "uid 0".
func peerName(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		if who, ok := p.AuthInfo.(Peer); ok {
			return fmt.Sprintf("uid %d", who.UID)
		}
	}
	return "uid unknown"
}
