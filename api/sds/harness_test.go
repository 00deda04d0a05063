package sds

import (
	"context"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/meshca/meshca/rotation"
	"github.com/meshca/meshca/test/pki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is made once, outside of any bubble: keys take time, and time stands still in bubbles.
var fixture = sync.OnceValue(func() (f struct {
	root, other  *pki.Root
	web, web2    *x509svid.SVID
	admin        *x509svid.SVID
	first, later *Secrets
}) {
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	var err error
	f.root, err = pki.NewRoot("td.test")
	must(err)
	f.other, err = pki.NewRoot("other.test")
	must(err)
	f.web, err = f.root.SVID("/ns/a/sa/web", time.Hour)
	must(err)
	f.web2, err = f.root.SVID("/ns/a/sa/web", time.Hour)
	must(err)
	f.admin, err = f.root.SVID("/ns/a/sa/admin", time.Hour)
	must(err)
	bundles := []*spiffebundle.Bundle{f.root.Bundle(1), f.other.Bundle(9)}
	f.first, err = NewSecrets(SecretsConfig{SVIDs: []*x509svid.SVID{f.web, f.admin}, Bundles: bundles})
	must(err)
	f.later, err = NewSecrets(SecretsConfig{SVIDs: []*x509svid.SVID{f.web2, f.admin}, Bundles: bundles})
	must(err)
	return f
})

const (
	webID   = "spiffe://td.test/ns/a/sa/web"
	adminID = "spiffe://td.test/ns/a/sa/admin"
	ownTD   = "spiffe://td.test"
	otherTD = "spiffe://other.test"
)

// door is a server, one source for all its peers, and a connection to it. Everything runs in one bubble: quiet is then
// a fact and not a matter of waiting long enough.
type door struct {
	t      *testing.T
	server *Server
	source *rotation.Current[*Secrets]
	client secretv3.SecretDiscoveryServiceClient
	conn   *grpc.ClientConn
	listen *bufconn.Listener

	mu      sync.Mutex
	opened  int
	closed  []error
	cut     bool // the last one was
	acked   int
	refused int
	nacks   []Nack
	unknown [][]string
}

// withDoor runs a test in a bubble of its own.
func withDoor(t *testing.T, adjust func(*Config), test func(*testing.T, *door)) {
	t.Helper()
	fixture()
	synctest.Test(t, func(t *testing.T) {
		d := &door{t: t, source: rotation.NewCurrent(fixture().first), listen: bufconn.Listen(1 << 20)}
		config := Config{
			Source:  func(context.Context) (Source, error) { return SourceFunc(d.source.Get), nil },
			Observe: d.observe(),
		}
		if adjust != nil {
			adjust(&config)
		}
		var err error
		if d.server, err = New(config); err != nil {
			t.Fatal(err)
		}
		g := grpc.NewServer(d.server.ServerOptions()...)
		secretv3.RegisterSecretDiscoveryServiceServer(g, d.server)
		served := make(chan error, 1)
		go func() { served <- g.Serve(d.listen) }()
		d.conn = d.dial()
		d.client = secretv3.NewSecretDiscoveryServiceClient(d.conn)
		defer d.shut(g, served)
		test(t, d)
	})
}

// shut ends everything, also after a test that failed, and checks that the server has forgotten all streams.
func (d *door) shut(g *grpc.Server, served <-chan error) {
	_ = d.conn.Close()
	g.Stop()
	if err := <-served; err != nil {
		d.t.Error(err)
	}
	synctest.Wait()
	if n := len(d.server.Streams()); n != 0 {
		d.t.Errorf("%d streams are still known after all have ended", n)
	}
	for name, p := range d.server.streams.peers {
		if p.streams != 0 || p.bytes != 0 {
			d.t.Errorf("%d streams and %d bytes are still counted for %q after all streams have ended", p.streams, p.bytes, name)
		}
	}
	if d.opened != len(d.closed) {
		d.t.Errorf("%d streams were told as opened, %d as closed", d.opened, len(d.closed))
	}
}

func (d *door) dial() *grpc.ClientConn {
	d.t.Helper()
	conn, err := grpc.NewClient("passthrough:sds",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return d.listen.DialContext(ctx) }))
	if err != nil {
		d.t.Fatal(err)
	}
	return conn
}

func (d *door) observe() Observe {
	locked := func(f func()) {
		d.mu.Lock()
		defer d.mu.Unlock()
		f()
	}
	return Observe{
		Opened:  func(Stream) { locked(func() { d.opened++ }) },
		Closed:  func(_ Stream, cut bool, err error) { locked(func() { d.closed, d.cut = append(d.closed, err), cut }) },
		Acked:   func(Stream) { locked(func() { d.acked++ }) },
		Refused: func(string, error) { locked(func() { d.refused++ }) },
		Nacked:  func(_ Stream, n Nack) { locked(func() { d.nacks = append(d.nacks, n) }) },
		Unknown: func(_ Stream, names []string) { locked(func() { d.unknown = append(d.unknown, slices.Clone(names)) }) },
	}
}

// one is the only open stream, as the server shows it.
func (d *door) one() Stream {
	d.t.Helper()
	synctest.Wait()
	all := d.server.Streams()
	if len(all) != 1 {
		d.t.Fatalf("the server shows %d streams, want one", len(all))
	}
	return all[0]
}

// caller is the client's end of a stream of either protocol; whatever comes is read at once.
type caller[Req, Resp any] struct {
	t    *testing.T
	send func(*Req) error
	half func() error
	got  chan *Resp
	end  chan error
}

func (d *door) sotw() *caller[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse] {
	d.t.Helper()
	s, err := d.client.StreamSecrets(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	return newCaller(d.t, s)
}

func (d *door) delta() *caller[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse] {
	d.t.Helper()
	s, err := d.client.DeltaSecrets(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	return newCaller(d.t, s)
}

func newCaller[Req, Resp any](t *testing.T, s grpc.BidiStreamingClient[Req, Resp]) *caller[Req, Resp] {
	p := &caller[Req, Resp]{t: t, send: s.Send, half: s.CloseSend, got: make(chan *Resp, 1000), end: make(chan error, 1)}
	go func() {
		for {
			m, err := s.Recv()
			if err != nil {
				p.end <- err
				return
			}
			p.got <- m
		}
	}()
	return p
}

// say sends a request.
func (p *caller[Req, Resp]) say(r *Req) {
	p.t.Helper()
	if err := p.send(r); err != nil && err != io.EOF {
		p.t.Fatal(err)
	}
}

// next is the next response.
func (p *caller[Req, Resp]) next() *Resp {
	p.t.Helper()
	synctest.Wait()
	select {
	case m := <-p.got:
		return m
	default:
	}
	select {
	case err := <-p.end:
		p.t.Fatalf("the stream ended: %v", err)
	default:
		p.t.Fatal("no response came")
	}
	return nil
}

// quiet fails if anything came.
func (p *caller[Req, Resp]) quiet() {
	p.t.Helper()
	synctest.Wait()
	select {
	case m := <-p.got:
		p.t.Fatalf("a response came that should not have: %v", m)
	case err := <-p.end:
		p.t.Fatalf("the stream ended: %v", err)
	default:
	}
}

// ended is how the server ended the stream.
func (p *caller[Req, Resp]) ended() error {
	p.t.Helper()
	synctest.Wait()
	select {
	case err := <-p.end:
		return err
	default:
		p.t.Fatal("the stream is still open")
	}
	return nil
}

// ask is a first SotW request.
func ask(names ...string) *discoveryv3.DiscoveryRequest {
	return &discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "node"}, TypeUrl: TypeURL, ResourceNames: names}
}

// ack takes a response, with what is asked for from now on.
func ack(r *discoveryv3.DiscoveryResponse, names ...string) *discoveryv3.DiscoveryRequest {
	return &discoveryv3.DiscoveryRequest{
		VersionInfo: r.GetVersionInfo(), ResponseNonce: r.GetNonce(), TypeUrl: TypeURL, ResourceNames: names,
	}
}

// nack refuses a response.
func nack(r *discoveryv3.DiscoveryResponse, version string, names ...string) *discoveryv3.DiscoveryRequest {
	return &discoveryv3.DiscoveryRequest{
		VersionInfo: version, ResponseNonce: r.GetNonce(), TypeUrl: TypeURL, ResourceNames: names,
		ErrorDetail: &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: "unusable"},
	}
}

// subscribe is a first delta request.
func subscribe(names ...string) *discoveryv3.DeltaDiscoveryRequest {
	return &discoveryv3.DeltaDiscoveryRequest{
		Node: &corev3.Node{Id: "node"}, TypeUrl: TypeURL, ResourceNamesSubscribe: names,
	}
}

func deltaAck(r *discoveryv3.DeltaDiscoveryResponse) *discoveryv3.DeltaDiscoveryRequest {
	return &discoveryv3.DeltaDiscoveryRequest{TypeUrl: TypeURL, ResponseNonce: r.GetNonce()}
}

// secretsIn opens the resources of a SotW response.
func secretsIn(t *testing.T, resources []*anypb.Any) map[string]*tlsv3.Secret {
	t.Helper()
	all := map[string]*tlsv3.Secret{}
	for _, any := range resources {
		secret := &tlsv3.Secret{}
		if err := any.UnmarshalTo(secret); err != nil {
			t.Fatal(err)
		}
		if all[secret.GetName()] != nil {
			t.Fatalf("%q is twice in one response", secret.GetName())
		}
		all[secret.GetName()] = secret
	}
	return all
}

// namesIn are the names of a SotW response, sorted.
func namesIn(t *testing.T, r *discoveryv3.DiscoveryResponse) []string {
	t.Helper()
	var names []string
	for name := range secretsIn(t, r.GetResources()) {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// deltaNames are the names of a delta response, sorted; each must agree with the secret within.
func deltaNames(t *testing.T, r *discoveryv3.DeltaDiscoveryResponse) []string {
	t.Helper()
	var names []string
	for _, resource := range r.GetResources() {
		secret := &tlsv3.Secret{}
		if err := resource.GetResource().UnmarshalTo(secret); err != nil {
			t.Fatal(err)
		}
		if secret.GetName() != resource.GetName() {
			t.Fatalf("the resource %q holds the secret %q", resource.GetName(), secret.GetName())
		}
		names = append(names, resource.GetName())
	}
	slices.Sort(names)
	return names
}

func wantNames(t *testing.T, got []string, want ...string) {
	t.Helper()
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}
