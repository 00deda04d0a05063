package kill

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// peer is a workload's proxy, as the agent sees it: it has its certificate and the roots over SDS, and acknowledges what it
// has taken into use. It tells the witness of both.
type peer struct {
	account, socket string
	// slow is how long it takes to bring other roots into use.
	slow    time.Duration
	witness *witness
}

// run follows both secrets until ctx ends. A stream that ends is opened again; what the peer has stays in use.
func (p *peer) run(ctx context.Context, name string, take func(context.Context, *tlsv3.Secret) error) {
	for ctx.Err() == nil {
		if err := p.follow(ctx, name, take); err != nil && ctx.Err() == nil {
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}
}

func (p *peer) follow(ctx context.Context, name string, take func(context.Context, *tlsv3.Secret) error) error {
	conn, err := grpc.NewClient("unix:"+p.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	ask := &discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: p.account}, ResourceNames: []string{name}, TypeUrl: secretType}
	for {
		if err := stream.Send(ask); err != nil {
			return err
		}
		answer, err := stream.Recv()
		if err != nil {
			return err
		}
		for _, resource := range answer.GetResources() {
			var s tlsv3.Secret
			if err := proto.Unmarshal(resource.GetValue(), &s); err != nil {
				return err
			}
			if err := take(ctx, &s); err != nil {
				return err
			}
		}
		ask = &discoveryv3.DiscoveryRequest{ResourceNames: []string{name}, TypeUrl: secretType, VersionInfo: answer.GetVersionInfo(), ResponseNonce: answer.GetNonce()}
	}
}

// certificate takes an SVID into use at once.
func (p *peer) certificate(_ context.Context, s *tlsv3.Secret) error {
	chain, err := certificates(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes())
	if err != nil {
		return err
	}
	p.witness.served(p.account, chain)
	return nil
}

// trust takes roots into use, which may last a while. Only then they are acknowledged, and the witness knows before anybody.
func (p *peer) trust(ctx context.Context, s *tlsv3.Secret) error {
	roots, err := certificates(s.GetValidationContext().GetTrustedCa().GetInlineBytes())
	if err != nil {
		return err
	}
	if p.witness.told(p.account, roots) {
		select {
		case <-time.After(p.slow):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	p.witness.trusts(p.account, roots)
	return nil
}

func certificates(text []byte) (all []*x509.Certificate, err error) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("what the agent serves: %w", err)
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, errors.New("the agent serves no certificate")
	}
	return all, nil
}
