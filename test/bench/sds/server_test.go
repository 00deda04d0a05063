package sds

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/rotation"
	"github.com/meshca/meshca/test/pki"
)

// childServer tells this binary to be a server at the socket in childSocket, so that its memory is measured alone.
const (
	childServer = "MESHCA_BENCH_SDS_SERVER"
	childSocket = "MESHCA_BENCH_SDS_SOCKET"
)

const (
	meshca = "meshca"
	bare   = "bare"
)

func TestMain(m *testing.M) {
	if kind := os.Getenv(childServer); kind != "" {
		if err := serve(kind, os.Getenv(childSocket), os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// pusher is a server that can be told to rotate.
type pusher interface {
	secretv3.SecretDiscoveryServiceServer
	push(*x509svid.SVID) error
}

// serve is the child's main: it rotates when it reads a line, and ends with its input.
func serve(kind, socket string, in io.Reader, out io.Writer) error {
	root, err := pki.NewRoot("bench.test")
	if err != nil {
		return err
	}
	var p pusher
	options := []grpc.ServerOption{}
	switch kind {
	case meshca:
		current := rotation.NewCurrent[*sds.Secrets](nil)
		// All connections come through one socket, so they are one peer's; and all acknowledge each push at once.
		limits := sds.Limits{StreamsPerPeer: 2 * connections, RequestsPerSecond: 100 * connections}
		server, err := sds.New(sds.Config{
			Source: func(context.Context) (sds.Source, error) { return sds.SourceFunc(current.Get), nil },
			Limits: limits,
		})
		if err != nil {
			return err
		}
		options = server.ServerOptions()
		p = &ours{Server: server, current: current, bundle: root.Bundle(1)}
	case bare:
		p = &floor{stale: make(chan struct{})}
	}
	rotate := func() error {
		svid, err := root.SVID("/ns/bench/sa/web", time.Hour)
		if err != nil {
			return err
		}
		// The root, three times over, makes a chain whose secret has the size of one from a CA with intermediates.
		svid.Certificates = append(svid.Certificates, root.Cert, root.Cert, root.Cert)
		return p.push(svid)
	}
	if err := rotate(); err != nil {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	g := grpc.NewServer(options...)
	secretv3.RegisterSecretDiscoveryServiceServer(g, p)
	go func() { _ = g.Serve(listener) }()
	defer g.Stop()
	fmt.Fprintln(out, "ready")
	for lines := bufio.NewScanner(in); lines.Scan(); {
		if err := rotate(); err != nil {
			return err
		}
	}
	return nil
}

// ours is the engine, as an agent runs it.
type ours struct {
	*sds.Server
	current *rotation.Current[*sds.Secrets]
	bundle  *spiffebundle.Bundle
}

func (o *ours) push(svid *x509svid.SVID) error {
	s, err := sds.NewSecrets(sds.SecretsConfig{SVIDs: []*x509svid.SVID{svid}, Bundles: []*spiffebundle.Bundle{o.bundle}})
	if err != nil {
		return err
	}
	o.current.Set(s)
	return nil
}

// floor is the least that a grpc-go server has to do: one response for all, encoded once as far as grpc-go lets it,
// sent to whoever is there; what peers say is read and dropped. It knows no names, no versions and no limits.
type floor struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer

	mu       sync.Mutex
	resource *anypb.Any
	pushes   int
	stale    chan struct{}
}

func (f *floor) push(svid *x509svid.SVID) error {
	key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		return err
	}
	var chain []byte
	for _, cert := range svid.Certificates {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	inline := func(b []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
	}
	resource, err := anypb.New(&tlsv3.Secret{Name: "default", Type: &tlsv3.Secret_TlsCertificate{
		TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(chain),
			PrivateKey:       inline(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
		},
	}})
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resource = resource
	f.pushes++
	close(f.stale)
	f.stale = make(chan struct{})
	return nil
}

func (f *floor) get() (*anypb.Any, int, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.resource, f.pushes, f.stale
}

func (f *floor) StreamSecrets(s secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	first, err := s.Recv()
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := s.Recv(); err != nil {
				ended <- err
				return
			}
		}
	}()
	for {
		resource, n, stale := f.get()
		if err := s.Send(&discoveryv3.DiscoveryResponse{
			VersionInfo: "0123456789abcdef0123456789abcdef"[:30] + strconv.Itoa(10+n%90), Nonce: strconv.Itoa(n),
			TypeUrl: first.GetTypeUrl(), Resources: []*anypb.Any{resource},
		}); err != nil {
			return err
		}
		select {
		case <-stale:
		case err := <-ended:
			return err
		}
	}
}
