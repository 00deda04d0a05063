package sds

import (
	"cmp"
	"context"
	"errors"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"

	"github.com/meshca/meshca/api/inbound"
)

// Server is the secret discovery service. Its methods are safe for concurrent use.
type Server struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer

	config  Config
	streams registry
	calls   calls
	backlog backlog
	large   *inbound.Room // requests that are larger than RequestBytes, while they arrive
}

var _ secretv3.SecretDiscoveryServiceServer = (*Server)(nil)

// New checks the config and makes a server of it.
func New(c Config) (*Server, error) {
	if c.Source == nil {
		return nil, errors.New("an SDS server needs a Source")
	}
	if err := c.Limits.check(); err != nil {
		return nil, err
	}
	c.Limits = c.Limits.withDefaults()
	if c.Peer == nil {
		c.Peer = peerOf
	}
	if c.Account == nil {
		c.Account = func(ctx context.Context) Account { return Account{Name: c.Peer(ctx)} }
	}
	if c.SystemBundle == "" {
		c.SystemBundle = DefaultSystemBundle
	}
	return &Server{config: c, large: inbound.NewRoom(c.Limits.LargeRequests, largeTime)}, nil
}

// account is the peer's, with its limits.
func (s *Server) account(ctx context.Context) Account {
	a := s.config.Account(ctx)
	orDefault(&a.Streams, s.config.Limits.StreamsPerPeer)
	a.Limit = cmp.Or(a.Limit, s.config.Limits.called("StreamsPerPeer"))
	return a
}

// StreamSecrets serves one state-of-the-world stream.
func (s *Server) StreamSecrets(g secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	return s.serve(g.Context(), SotW, sotwStream{g})
}

// DeltaSecrets serves one delta stream.
func (s *Server) DeltaSecrets(g secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	return s.serve(g.Context(), Delta, deltaStream{g})
}

// Streams shows the open streams that have said what they want, in no order.
func (s *Server) Streams() []Stream { return s.streams.all() }

// Acknowledged says how many open streams have not yet taken the bundle of this sequence (or a later one), and gives a
// channel that closes when that may have changed. Set the bundle at the sources first: then zero means that every
// proxy that is connected now and is served holds it. A stream whose source has nothing yet is not counted: what it
// gets first will be that bundle, and one workload that is refused its SVID must not hold up a new root everywhere.
func (s *Server) Acknowledged(sequence uint64) (lacking int, changed <-chan struct{}) {
	return s.streams.lacking(sequence)
}
