package main

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
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshca/meshca/api/refusal"
)

const (
	secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	// own is the name under which everybody gets his own identity.
	own = "default"
	// answerLimit is how long a socket may keep silent that should have an answer, on a busy machine.
	answerLimit = 20 * time.Second
	// again is how long a socket that is not there is left alone.
	again = 5 * time.Millisecond
)

func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// first asks once, on a connection that is tried once: what is not there now is a fault.
func first(ctx context.Context, p *printer, socket string) error {
	line, err := fetch(ctx, socket, own)
	if err == nil {
		p.say(line)
	}
	return err
}

// fetch asks for a name, once.
func fetch(ctx context.Context, socket, name string) (Line, error) {
	conn, err := dial(socket)
	if err != nil {
		return Line{}, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	answer, err := secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(ctx, request(name))
	if err != nil {
		return Line{}, err
	}
	return identity(answer)
}

func request(names ...string) *discoveryv3.DiscoveryRequest {
	return &discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "tenant"}, ResourceNames: names, TypeUrl: secretType}
}

// identity finds the certificate in an answer.
func identity(answer *discoveryv3.DiscoveryResponse) (Line, error) {
	for _, r := range answer.GetResources() {
		s := &tlsv3.Secret{}
		if err := r.UnmarshalTo(s); err != nil {
			return Line{}, err
		}
		if s.GetTlsCertificate() == nil {
			continue
		}
		block, _ := pem.Decode(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes())
		if block == nil {
			return Line{}, errors.New("a certificate is no PEM")
		}
		leaf, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return Line{}, err
		}
		id, err := x509svid.IDFromCert(leaf)
		if err != nil {
			return Line{}, err
		}
		if len(s.GetTlsCertificate().GetPrivateKey().GetInlineBytes()) == 0 {
			return Line{}, fmt.Errorf("there is no key with %s", id)
		}
		return Line{What: "secret", ID: id.String(), Serial: serial(leaf)}, nil
	}
	return Line{}, errors.New("the answer holds no certificate")
}

// watch subscribes as a proxy does, and comes back at once when its stream ends.
func watch(ctx context.Context, p *printer, socket string) {
	for told := ""; ctx.Err() == nil; {
		got, err := stream(ctx, p, socket)
		why := err.Error()
		if no, ok := refusal.From(err); ok {
			why = no.Error() // with its reason, which the text of a status does not have
		}
		if got || why != told {
			p.say(Line{What: "closed", Text: why})
			told = why
		}
		select {
		case <-ctx.Done():
		case <-time.After(again):
		}
	}
}

// stream is one stream to its end; got: something was served on it.
func stream(ctx context.Context, p *printer, socket string) (got bool, err error) {
	conn, err := dial(socket)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	s, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		return false, err
	}
	if err := s.Send(request(own)); err != nil {
		return false, err
	}
	for {
		answer, err := s.Recv()
		if err != nil {
			return got, err
		}
		if line, err := identity(answer); err == nil {
			p.say(line)
			got = true
		} else {
			p.say(Line{What: "closed", Text: err.Error()})
		}
		ack := request(own)
		ack.VersionInfo, ack.ResponseNonce = answer.GetVersionInfo(), answer.GetNonce()
		if err := s.Send(ack); err != nil {
			return got, err
		}
	}
}
