// Package envoy holds what the SDS door promises against a real Envoy: names, refusals, restarts.
package envoy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"text/template"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"

	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/rotation"
	"github.com/meshca/meshca/test/mesh"
	"github.com/meshca/meshca/test/parts"
)

//go:embed envoy.yaml.tmpl
var bootstrap string

// listener is a TLS listener by the names of its secrets.
type listener struct{ Name, Certificate, Context string }

// settings fill the template.
type settings struct {
	Node, API, Socket string
	Plain             bool
	Listeners         []listener
}

// apis are both forms of SDS in Envoy's words.
var apis = []string{"GRPC", "DELTA_GRPC"}

// door is an SDS server at a unix socket; it can be stopped and opened again.
type door struct {
	socket  string
	current *rotation.Current[*sds.Secrets]
	sds     *sds.Server
	grpc    *grpc.Server
	served  chan struct{}

	mu      sync.Mutex
	nacks   []sds.Nack // guarded by mu
	unknown []string   // guarded by mu
}

func openDoor(t *testing.T, s *sds.Secrets) *door {
	t.Helper()
	dir, err := os.MkdirTemp("", "sds") // t.TempDir can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	d := &door{socket: filepath.Join(dir, "s"), current: rotation.NewCurrent(s)}
	d.open(t)
	t.Cleanup(d.close)
	return d
}

func (d *door) open(t *testing.T) {
	t.Helper()
	var err error
	d.sds, err = sds.New(sds.Config{
		Source: func(context.Context) (sds.Source, error) { return sds.SourceFunc(d.current.Get), nil },
		Observe: sds.Observe{
			Nacked: func(_ sds.Stream, n sds.Nack) {
				d.mu.Lock()
				defer d.mu.Unlock()
				d.nacks = append(d.nacks, n)
			},
			Unknown: func(_ sds.Stream, names []string) {
				d.mu.Lock()
				defer d.mu.Unlock()
				d.unknown = append(d.unknown, names...)
			},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	d.grpc, d.served = grpc.NewServer(d.sds.ServerOptions()...), make(chan struct{})
	secretv3.RegisterSecretDiscoveryServiceServer(d.grpc, d.sds)
	go func(g *grpc.Server, served chan struct{}) {
		defer close(served)
		_ = g.Serve(l)
	}(d.grpc, d.served)
}

func (d *door) close() {
	d.grpc.Stop()
	<-d.served
}

func (d *door) seen() (nacks []sds.Nack, unknown []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.nacks, d.unknown
}

// envoy is a running one.
type envoy struct{ *mesh.Proxy }

// start starts an Envoy and returns when it is live, within the time given.
func start(t *testing.T, within time.Duration, s settings) *envoy {
	t.Helper()
	s.Node = strings.ToLower(s.API)
	var config bytes.Buffer
	if err := template.Must(template.New("envoy").Parse(bootstrap)).Execute(&config, s); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	proxy, err := mesh.StartProxy(ctx, parts.Path(t, "envoy"), t.TempDir(), "envoy", config.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		proxy.Stop(5 * time.Second)
		if t.Failed() {
			t.Logf("Envoy said last:\n%s", proxy.Output())
		}
	})
	return &envoy{proxy}
}

// stat sums the statistics that end so.
func (e *envoy) stat(t *testing.T, suffix string) int64 {
	t.Helper()
	all, err := e.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return all.Sum("", suffix)
}

// address is where a listener listens.
func (e *envoy) address(t *testing.T, name string) string {
	t.Helper()
	all, err := e.Listeners(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if all[name] == "" {
		t.Fatalf("Envoy has no listener %s: %v", name, all)
	}
	return all[name]
}

// greet makes a handshake as the caller with a listener, and returns the certificate that Envoy showed. An error means
// that Envoy did not accept the caller, or has nothing to show.
func greet(address string, caller *x509svid.SVID) (*x509.Certificate, error) {
	certificate := tls.Certificate{PrivateKey: caller.PrivateKey}
	for _, c := range caller.Certificates {
		certificate.Certificate = append(certificate.Certificate, c.Raw)
	}
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", address, &tls.Config{
		Certificates:       []tls.Certificate{certificate},
		InsecureSkipVerify: true,
	})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	// With TLS 1.3 a refusal of the client's certificate comes when the client first reads.
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: envoy\r\nConnection: close\r\n\r\n"); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("Envoy answered %s", resp.Status)
	}
	return conn.ConnectionState().PeerCertificates[0], nil
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, met func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if met() {
			return
		}
	}
	t.Fatalf("it never came to this: %s", what)
}
