package issuance_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/meshca/meshca/api/issuance"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

// ends reports whether the server closes a connection.
func ends(t *testing.T, conn net.Conn) bool {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	_, err := io.Copy(io.Discard, conn)
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// Connections cost memory, and anybody can open them: neither agents nor other strangers are to be without for that.
func TestConnectionsOfStrangersAreBounded(t *testing.T) {
	key := world.NewKey(t)
	for name, open := range map[string]func(d *door, from string) net.Conn{
		"nobody's":             func(d *door, from string) net.Conn { return d.handshake(nil, from) },
		"a workload's":         func(d *door, from string) net.Conn { return d.handshake(d.workload(key, world.Web), from) },
		"before the handshake": func(d *door, from string) net.Conn { return d.reach(from) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDoor(t, issuance.Limits{ConnectionsWithoutSVID: 3})
			agent := d.connect(d.attest())
			if r, err := d.issue(meshcav1.NewIssuanceServiceClient(agent), d.item()); err != nil || r.GetResults()[0].GetSvid() == nil {
				t.Fatalf("an agent asks: %v, %v", r, err)
			}
			var opened []net.Conn
			for range 6 {
				opened = append(opened, open(d, "127.0.0.2"))
			}
			if !ends(t, opened[0]) {
				t.Error("the oldest connection of the address that has the most stays")
			}
			eventually(t, "its audit line", func() bool {
				return slices.ContainsFunc(d.Audit.Lines(t), func(line map[string]any) bool { return line["outcome"] == string(refusal.Overloaded) })
			})
			if r, err := d.issue(meshcav1.NewIssuanceServiceClient(agent), d.item()); err != nil || r.GetResults()[0].GetSvid() == nil {
				t.Errorf("an agent's connection: %v, %v", r, err)
			}
			cert := d.attest() // beside them, an agent that has no SVID yet
			for range 8 {
				if r, err := d.issue(d.dial(cert), d.item()); err != nil || r.GetResults()[0].GetSvid() == nil {
					t.Fatalf("an agent's new connection: %v, %v", r, err)
				}
			}
		})
	}
}

// Who shows that he is an agent takes none of these places any more.
func TestAgentsHavePlacesOfTheirOwn(t *testing.T) {
	d := newDoor(t, issuance.Limits{ConnectionsWithoutSVID: 2})
	cert := d.attest()
	var conns []net.Conn
	for range 6 {
		conns = append(conns, d.handshake(cert, "127.0.0.1"))
		if _, err := conns[len(conns)-1].Read(make([]byte, 1)); err != nil { // the server's settings, which follow its handshake
			t.Fatal(err)
		}
	}
	for i, conn := range conns {
		if err := conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, conn); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("connection %d of an agent: %v", i, err)
		}
	}
}

// Whoever has shown a client certificate that is as long as crypto/tls takes one, but for its end, holds all of it.
func TestAHandshakeIsShort(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	near, far := net.Pipe()
	counted := &counting{Conn: far}
	shaken := make(chan error, 1)
	go func() { shaken <- d.server.Shake(counted) }()
	large := &tls.Certificate{Certificate: [][]byte{make([]byte, 250<<10)}, PrivateKey: world.NewKey(t)}
	client := tls.Client(near, &tls.Config{InsecureSkipVerify: true, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return large, nil }})
	go func() {
		_ = client.HandshakeContext(t.Context())
		_ = near.Close()
	}()
	if err := <-shaken; !errors.Is(err, issuance.ErrGulp) {
		t.Errorf("it ended with %v", err)
	}
	if n := counted.read; n > issuance.Sip {
		t.Errorf("%d bytes were read", n)
	}
	_ = far.Close()
}

// And crypto/tls takes such messages after the handshake, too.
func TestContentComesOfWhatAStrangerSends(t *testing.T) {
	near, far := net.Pipe()
	above := &buffering{}
	conn := issuance.Sipping(far, func(sips net.Conn) net.Conn {
		above.Conn = sips
		return above
	})
	go func() {
		p := make([]byte, issuance.Sip/2+1)
		for _, err := near.Write(p); err == nil; _, err = near.Write(p) {
		}
	}()
	p := make([]byte, issuance.Sip)
	for range 4 {
		above.keep = issuance.Sip / 2
		if n, err := conn.Read(p); n == 0 || err != nil {
			t.Fatalf("content: %d, %v", n, err)
		}
	}
	above.keep = 4 * issuance.Sip
	if n, err := conn.Read(p); n > 0 || !errors.Is(err, issuance.ErrGulp) {
		t.Errorf("nothing but what is kept: %d, %v", n, err)
	}
	_, _ = near.Close(), conn.Close()
}

// counting counts what is read.
type counting struct {
	net.Conn
	read int
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.read += n
	return n, err
}

// buffering keeps so many bytes for itself before it passes one on, as TLS does with its own messages.
type buffering struct {
	net.Conn
	keep int
}

func (b *buffering) Read(p []byte) (int, error) {
	for {
		n, err := b.Conn.Read(make([]byte, min(4<<10, b.keep+1)))
		if b.keep -= n; b.keep < 0 || err != nil {
			return copy(p, make([]byte, max(0, -b.keep))), err
		}
	}
}

// workload is the SVID of a pod, as anybody who has a pod with a volume holds one.
func (d *door) workload(key *ecdsa.PrivateKey, pod localissuer.Subject) *tls.Certificate {
	d.t.Helper()
	by, err := d.RA.Admit(d.t.Context(), d.AttestAgent(world.Agent), world.Cluster)
	if err != nil {
		d.t.Fatal(err)
	}
	svid, err := d.RA.Issue(d.t.Context(), by, registration.Request{
		Door: "grpc", Token: d.Token(pod, registration.WorkloadAudience), CSR: world.CSR(d.t, key, x509.CertificateRequest{}),
	})
	if err != nil {
		d.t.Fatal(err)
	}
	cert := &tls.Certificate{PrivateKey: key}
	for _, c := range svid.Chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return cert
}

// tenant is the n-th pod of many, each with a service account of its own.
func tenant(n int) localissuer.Subject {
	s := world.Web
	s.ServiceAccount, s.ServiceAccountUID = fmt.Sprint("tenant-", n), fmt.Sprint("sa-tenant-", n)
	s.Pod, s.PodUID = fmt.Sprint("tenant-", n), fmt.Sprint("pod-tenant-", n)
	return s
}

// open opens calls that say nothing, as many as are taken, over one connection.
func (d *door) open(conn *grpc.ClientConn, calls int, method string) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), 30*time.Second)
	d.t.Cleanup(cancel)
	for range calls {
		if _, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method); err != nil {
			d.t.Fatal(err)
		}
	}
}

// An SVID makes nobody an agent: its places are for those that the CA knows.
func TestWorkloadsTakeNoPlacesOfAgents(t *testing.T) {
	d := newDoor(t, issuance.Limits{}, patience(time.Hour))
	agent := d.attest()
	for n := range 4 {
		d.open(d.connect(d.workload(world.NewKey(t), tenant(n))), 32, meshcav1.IssuanceService_IssueX509SVIDs_FullMethodName)
	}
	for range 8 { // by the last of them the calls above have come
		if r, err := d.issue(d.dial(agent), d.item()); err != nil || r.GetResults()[0].GetSvid() == nil {
			t.Fatalf("an agent asks: %v, %v", r, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if n := d.server.Arriving(); n != 0 {
		t.Errorf("%d calls of workloads are counted among agents'", n)
	}
	if _, err := d.sync(agent, hello()).Recv(); err != nil {
		t.Errorf("its stream: %v", err)
	}
}

// Nor is an agent who was one: whose SVID was taken and denied counts with strangers from then on.
func TestADeniedAgentIsAStranger(t *testing.T) {
	d := newDoor(t, issuance.Limits{}, patience(time.Hour))
	cert := d.attest()
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.RA.Orders.Deny(t.Context(), ca.Denial{ID: leaf.URIs[0].String(), By: "test"}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.issue(d.dial(cert), d.item()); refusal.Of(err) != refusal.IdentityDenied {
		t.Fatalf("it asks: %v", err)
	}
	if line := d.Audit.Last(t); line["caller"] != leaf.URIs[0].String() {
		t.Errorf("its line: %v", line)
	}
	d.open(d.connect(cert), 2, meshcav1.IssuanceService_IssueX509SVIDs_FullMethodName)
	time.Sleep(100 * time.Millisecond)
	if n := d.server.Arriving(); n != 0 {
		t.Errorf("%d of its calls are counted among agents'", n)
	}
}

// A hello may be as long as any message: until it has come the stream counts with the messages that arrive.
func TestHalfSentHellosAreCounted(t *testing.T) {
	d := newDoor(t, issuance.Limits{}, within(time.Hour, time.Hour, time.Hour), patience(time.Hour))
	cert := d.attest()
	d.open(d.connect(cert), 2, meshcav1.IssuanceService_Sync_FullMethodName)
	eventually(t, "them to be seen", func() bool { return d.server.Arriving() == 2 })
	if _, err := d.sync(cert, hello()).Recv(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the one that said hello to be counted no more", func() bool { return d.server.Arriving() == 2 })
}

// Each frame costs many times the byte that it brings, so who sends such is hung up on early.
func TestStrangersMayNotSendCrumbs(t *testing.T) {
	for name, cert := range map[string]func(*door) *tls.Certificate{
		"nobody":     func(*door) *tls.Certificate { return nil },
		"a workload": func(d *door) *tls.Certificate { return d.workload(world.NewKey(t), world.Web) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDoor(t, issuance.Limits{}, patience(time.Hour))
			conn := d.handshake(cert(d), "127.0.0.1")
			fr := http2.NewFramer(conn, nil)
			stream := beginCall(t, conn, fr)
			var said error
			go func() { _, _ = io.Copy(io.Discard, conn) }()
			for range 100_000 {
				if said = fr.WriteData(stream, false, []byte{0}); said != nil {
					break
				}
			}
			if said == nil {
				t.Error("100 000 frames of a byte each are taken")
			}
		})
	}
}

// handshake connects from an address of loopback, by TLS alone.
func (d *door) handshake(cert *tls.Certificate, from string) *tls.Conn {
	d.t.Helper()
	bundle, _ := d.Trust.Bundle()
	config := tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeAny())
	config.NextProtos = []string{"h2"}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	conn := tls.Client(d.reach(from), config)
	if err := conn.HandshakeContext(d.t.Context()); err != nil {
		d.t.Fatal(err)
	}
	return conn
}

// reach connects from an address of loopback.
func (d *door) reach(from string) net.Conn {
	d.t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := dialer.DialContext(d.t.Context(), "tcp", d.address)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// In one /64 are the pods of a node, or all: one of them must not use up the calls of the others. But one machine can have
// all of it.
func TestCallsOfANetwork(t *testing.T) {
	d := newDoor(t, issuance.Limits{CallsPerSecondWithoutSVID: 0.01})
	for i := range 2 {
		if err := d.server.Open("[fd00::1]:1"); (err == nil) != (i == 0) || err != nil && refusal.Of(err) != refusal.PeerLimit {
			t.Errorf("call %d of an address: %v", i, err)
		}
	}
	if err := d.server.Open("[fd00::2]:1"); err != nil {
		t.Errorf("another address of the network: %v", err)
	}
	refused := 0
	for i := range 100 {
		if err := d.server.Open(fmt.Sprintf("[fd00::1:%x]:1", i)); err != nil {
			refused++
		}
	}
	if refused == 0 {
		t.Error("a network may call as often as it likes")
	}
	for _, other := range []string{"[fd00:0:0:1::1]:1", "10.0.0.1:1"} {
		if err := d.server.Open(other); err != nil {
			t.Errorf("%s: %v", other, err)
		}
	}
}

// Answers that nobody reads are kept after their calls have ended.
func TestStrangersReadTheirAnswers(t *testing.T) {
	d := newDoor(t, issuance.Limits{CallsPerSecondWithoutSVID: 1000})
	conn := d.handshake(nil, "127.0.0.1")
	fr := http2.NewFramer(conn, nil)
	_, err := io.WriteString(conn, http2.ClientPreface)
	if err = errors.Join(err, fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})); err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, conn); close(closed) }()
	for i := range uint32(40) {
		err := fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: headersOf(t, healthv1.Health_Check_FullMethodName), EndHeaders: true})
		if err = errors.Join(err, fr.WriteData(2*i+1, true, make([]byte, 5))); err != nil {
			break
		}
		time.Sleep(5 * time.Millisecond) // it is answered
	}
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Error("40 answers wait to be read")
	}
}

func headersOf(t *testing.T, method string) []byte {
	t.Helper()
	var block bytes.Buffer
	e := hpack.NewEncoder(&block)
	for _, f := range [][2]string{
		{":method", "POST"}, {":scheme", "https"}, {":authority", "ca"}, {":path", method}, {"te", "trailers"}, {"content-type", "application/grpc"},
	} {
		if err := e.WriteField(hpack.HeaderField{Name: f[0], Value: f[1], Sensitive: true}); err != nil {
			t.Fatal(err)
		}
	}
	return block.Bytes()
}

// beginCall opens AttestAgent, and says that its message has 4 MiB.
func beginCall(t *testing.T, conn io.Writer, fr *http2.Framer) (stream uint32) {
	t.Helper()
	headers := headersOf(t, meshcav1.IssuanceService_AttestAgent_FullMethodName)
	_, err := io.WriteString(conn, http2.ClientPreface)
	err = errors.Join(err, fr.WriteSettings(), fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers, EndHeaders: true}),
		fr.WriteData(1, false, binary.BigEndian.AppendUint32([]byte{0}, 4<<20-64)))
	if err != nil {
		t.Fatal(err)
	}
	return 1
}
