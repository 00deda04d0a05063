package issuance_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/api/issuance"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

// door is the issuance server on a world, at a loopback port.
type door struct {
	*world.World
	t       testing.TB
	address string
	server  *issuance.Server
	stop    func()
}

// newDoor serves; adjust changes the server and what is behind it before it does.
func newDoor(t testing.TB, limits issuance.Limits, adjust ...func(*issuance.Server, *world.World)) *door {
	t.Helper()
	w := world.New(t, "")
	serving, err := ca.NewServing(w.Issuer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := serving.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	bundle, _ := w.Trust.Bundle()
	s := issuance.New(issuance.Config{
		Registration: w.RA, Bundle: w.Trust.Bundle, Hold: func() error { return nil }, Limits: limits, Log: slog.New(slog.DiscardHandler),
		Credentials: issuance.NewCredentials(func() (*tls.Certificate, error) { return serving.Certificate(nil) }, bundle),
	})
	for _, a := range adjust {
		a(s, w)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	stop := sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(20 * time.Second):
			t.Error("the server did not stop")
		}
	})
	t.Cleanup(stop)
	return &door{World: w, t: t, address: l.Addr().String(), server: s, stop: stop}
}

// dial connects, showing a certificate if one is given.
func (d *door) dial(cert *tls.Certificate) meshcav1.IssuanceServiceClient {
	d.t.Helper()
	return meshcav1.NewIssuanceServiceClient(d.connect(cert))
}

func (d *door) connect(cert *tls.Certificate) *grpc.ClientConn {
	d.t.Helper()
	bundle, _ := d.Trust.Bundle()
	server, err := ca.ServerID(world.TrustDomain)
	if err != nil {
		d.t.Fatal(err)
	}
	config := tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(server))
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient(d.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// attest makes an agent of the world's first node, through the wire.
func (d *door) attest() *tls.Certificate {
	d.t.Helper()
	return d.attestOver(d.connect(nil))
}

func (d *door) attestOver(conn *grpc.ClientConn) *tls.Certificate {
	d.t.Helper()
	key := world.NewKey(d.t)
	r, err := meshcav1.NewIssuanceServiceClient(conn).AttestAgent(d.t.Context(), &meshcav1.AttestAgentRequest{
		Cluster: world.Cluster, Token: d.Token(world.Agent, "meshca-agent").Secret(), Csr: world.CSR(d.t, key, x509.CertificateRequest{}), Version: "v1",
	})
	if err != nil {
		d.t.Fatal(err)
	}
	if _, err := spiffebundle.Parse(world.TrustDomain, r.GetBundle()); err != nil {
		d.t.Errorf("the bundle that came with the SVID: %v", err)
	}
	return certificate(key, r.GetSvid())
}

func certificate(key *ecdsa.PrivateKey, svid *meshcav1.X509SVID) *tls.Certificate {
	return &tls.Certificate{Certificate: svid.GetChain(), PrivateKey: key}
}

func (d *door) item() *meshcav1.X509SVIDRequest { return d.itemFor(world.NewKey(d.t)) }

func (d *door) itemFor(key *ecdsa.PrivateKey) *meshcav1.X509SVIDRequest {
	return &meshcav1.X509SVIDRequest{Token: d.Token(world.Web, "meshca").Secret(), Csr: world.CSR(d.t, key, x509.CertificateRequest{})}
}

func TestABatchIsAnsweredItemByItem(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	agent := d.dial(d.attest())
	bad := d.item()
	bad.Token = "not.a.token"
	r, err := agent.IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{
		Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{d.item(), bad, d.item()},
	})
	if err != nil {
		t.Fatal(err)
	}
	got := r.GetResults()
	if len(got) != 3 {
		t.Fatalf("%d answers to 3 requests", len(got))
	}
	for _, i := range []int{0, 2} {
		svid := got[i].GetSvid()
		if svid.GetSpiffeId() != "spiffe://mesh.test/ns/shop/sa/web" || svid.GetLife().AsDuration() != ca.MaxTTL {
			t.Errorf("answer %d: %v", i, got[i])
		}
		if left := svid.GetRemaining().AsDuration(); left > ca.MaxTTL || left < ca.MaxTTL-time.Minute {
			t.Errorf("answer %d: %s remain", i, left)
		}
	}
	if r := got[1].GetRefusal(); r.GetReason() != string(refusal.TokenMalformed) {
		t.Errorf("the bad one was answered %v", got[1])
	}
}

func TestBatchesAreBounded(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	agent := d.dial(d.attest())
	for n, want := range map[int]refusal.Reason{0: refusal.RequestMalformed, issuance.MaxBatch + 1: refusal.BatchTooLarge} {
		r := &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster}
		for range n {
			r.Requests = append(r.Requests, &meshcav1.X509SVIDRequest{})
		}
		if _, err := agent.IssueX509SVIDs(t.Context(), r); refusal.Of(err) != want {
			t.Errorf("%d requests: %v, want %s", n, err, want)
		}
		if line := d.Audit.Last(t); line["outcome"] != string(want) {
			t.Errorf("%d requests: audit line %v", n, line)
		}
	}
}

// The largest batch of real tokens must fit both ends' limits, going and coming.
func TestTheLargestBatchFits(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	pace, err := registration.NewPace(issuance.MaxBatch) // the batch is one pod's
	if err != nil {
		t.Fatal(err)
	}
	d.RA.Pace = pace
	agent := d.dial(d.attest())
	r := &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster}
	item := d.item()
	for range issuance.MaxBatch {
		r.Requests = append(r.Requests, item)
	}
	answer, err := agent.IssueX509SVIDs(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	serials := map[string]bool{}
	for i, result := range answer.GetResults() {
		if result.GetSvid() == nil {
			t.Fatalf("answer %d: %v", i, result)
		}
		leaf, err := x509.ParseCertificate(result.GetSvid().GetChain()[0])
		if err != nil {
			t.Fatal(err)
		}
		serials[leaf.SerialNumber.String()] = true
	}
	if len(serials) != issuance.MaxBatch {
		t.Errorf("%d serials for %d SVIDs", len(serials), issuance.MaxBatch)
	}
}

// A call that runs out of time while the ledger's places are taken answers for each request, and leaves nothing running.
func TestACallThatEndsAnswersByName(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	agent := d.dial(d.attest())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := agent.IssueX509SVIDs(ctx, &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{d.item()}}); status.Code(err) != codes.Canceled {
		t.Errorf("got %v", err)
	}
	if _, err := agent.IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{d.item()}}); err != nil {
		t.Errorf("after it: %v", err)
	}
}

// What a stranger sends must not grow on its way to the audit log.
func TestStrangersCannotFillTheAuditLog(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	key := world.NewKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{{Scheme: "spiffe", Host: strings.Repeat("x", 60_000), Path: "/a"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	stranger := d.dial(&tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})
	floods := map[string]meshcav1.IssuanceServiceClient{"foreign": stranger, "anonymous": d.dial(nil)}
	workload := d.attest()
	svid, err := d.dial(workload).IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{d.itemFor(key)}})
	if err != nil {
		t.Fatal(err)
	}
	chain := append(svid.GetResults()[0].GetSvid().GetChain(), svid.GetIntermediates()...)
	floods["a workload's SVID"] = d.dial(&tls.Certificate{Certificate: chain, PrivateKey: key})
	before := len(d.Audit.Lines(t))
	for name, flood := range floods {
		for _, cluster := range []string{world.Cluster, strings.Repeat("y", 1<<20)} {
			r := &meshcav1.IssueX509SVIDsRequest{Cluster: cluster}
			for range issuance.MaxBatch {
				r.Requests = append(r.Requests, &meshcav1.X509SVIDRequest{})
			}
			for range 10 {
				if _, err := flood.IssueX509SVIDs(t.Context(), r); err == nil {
					t.Fatalf("%s: was answered", name)
				}
			}
		}
	}
	lines := len(d.Audit.Lines(t)) - before
	if size := len(d.Audit.String()); lines > 20 || size > 50<<10 {
		t.Errorf("30000 requests left %d lines; %d bytes of audit log", lines, size)
	}
	if lines < len(floods) {
		t.Errorf("%d lines for %d kinds of refused callers", lines, len(floods))
	}
}

// An agent's own requests are bounded too: each leaves a line.
func TestRequestsOfOnePeerAreBoundedInTime(t *testing.T) {
	d := newDoor(t, issuance.Limits{RequestsPerSecond: 1})
	agent := d.dial(d.attest())
	r := &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster}
	for range issuance.MaxBatch {
		r.Requests = append(r.Requests, &meshcav1.X509SVIDRequest{})
	}
	if _, err := agent.IssueX509SVIDs(t.Context(), r); err != nil { // the burst
		t.Fatal(err)
	}
	_, err := agent.IssueX509SVIDs(t.Context(), r)
	e, _ := refusal.From(err)
	if e == nil || e.Reason != refusal.PeerLimit || !strings.Contains(e.Detail, "requestsPerSecond") {
		t.Errorf("got %v", err)
	}
	if line := d.Audit.Last(t); line["outcome"] != string(refusal.PeerLimit) || line["cluster"] != world.Cluster {
		t.Errorf("audit line: %v", line)
	}
}

// A peer that is refused for one reason again and again must not hide that it is refused for another.
func TestEachReasonOfARefusedPeerLeavesALine(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	agent := d.dial(d.attest())
	for _, cluster := range []string{"three", "three", world.Twin, "three"} {
		_, _ = agent.IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{Cluster: cluster, Requests: []*meshcav1.X509SVIDRequest{{}}})
	}
	got := map[any]int{}
	for _, line := range d.Audit.Lines(t) {
		got[line["outcome"]]++
	}
	if got[string(refusal.ClusterUnknown)] != 1 || got[string(refusal.ClusterMismatch)] != 1 {
		t.Errorf("lines by outcome: %v", got)
	}
}

// The answer holds each intermediate once, and none that the caller has.
func TestIntermediatesAreSentOnce(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	agent := d.dial(d.attest())
	r := &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{d.item(), d.item(), d.item()}}
	first, err := agent.IssueX509SVIDs(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if len(first.GetIntermediates()) != 1 {
		t.Fatalf("%d intermediates", len(first.GetIntermediates()))
	}
	digest := sha256.Sum256(first.GetIntermediates()[0])
	for _, result := range first.GetResults() {
		svid := result.GetSvid()
		if len(svid.GetChain()) != 1 || len(svid.GetIntermediates()) != 1 || !bytes.Equal(svid.GetIntermediates()[0], digest[:]) {
			t.Errorf("an SVID with a chain of %d and intermediates %x", len(svid.GetChain()), svid.GetIntermediates())
		}
	}
	for held, want := range map[string]int{string(digest[:]): 0, "another": 1, "": 1} {
		r.HeldIntermediates = [][]byte{[]byte(held)}
		again, err := agent.IssueX509SVIDs(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		if len(again.GetIntermediates()) != want {
			t.Errorf("who holds %x gets %d intermediates, want %d", held, len(again.GetIntermediates()), want)
		}
	}
}

// While the API server is away nobody knows whether an agent's pod lives; a denial must reach it all the same.
func TestDenialsReachAgentsWhileTheClusterIsAway(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	cert := d.attest()
	d.Gone.Store(refusal.New(refusal.KubernetesUnavailable, "the API server is away"))
	stream := d.sync(cert, &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{
		Cluster: world.Cluster, Version: strings.Repeat("v", 63) + "é",
	}}})
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.RA.Orders.Deny(t.Context(), ca.Denial{ID: "spiffe://mesh.test/ns/shop/sa/web", Since: time.Now(), By: "uid 0"}); err != nil {
		t.Fatal(err)
	}
	if next, err := stream.Recv(); err != nil || len(next.GetDeniedIds()) != 1 {
		t.Fatalf("got %v, %v", next, err)
	}
	if v := d.RA.Agents.List()[0].Version; !utf8.ValidString(v) {
		t.Errorf("the version %q is no text: status could not be sent", v)
	}
	d.Gone.Store(refusal.New(refusal.PodGone, "the pod is gone"))
	if _, err := d.RA.Orders.Allow(t.Context(), "spiffe://mesh.test/ns/shop/sa/web"); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); refusal.Of(err) != refusal.PodGone {
		t.Errorf("an agent whose pod is gone: %v", err)
	}
}

func TestAFloodOfAcknowledgementsEndsTheStream(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	stream := d.sync(d.attest(), &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: world.Cluster}}})
	ack := &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Ack{Ack: &meshcav1.BundleAck{BundleSequence: 1}}}
	for range 200 {
		if err := stream.Send(ack); err != nil {
			break
		}
	}
	for {
		if _, err := stream.Recv(); err != nil {
			if refusal.Of(err) != refusal.PeerLimit {
				t.Errorf("got %v", err)
			}
			return
		}
	}
}

func TestAForeignClientCertificateIsRefusedByName(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	other := newDoor(t, issuance.Limits{})
	stranger := d.dial(other.attest())
	_, err := stranger.IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{d.item()}})
	if refusal.Of(err) != refusal.CallerUntrusted {
		t.Fatalf("got %v", err)
	}
	if line := d.Audit.Last(t); line["outcome"] != string(refusal.CallerUntrusted) || line["peer"] == nil {
		t.Errorf("audit line: %v", line)
	}
}

func TestSyncFollowsOrdersAndCountsAcknowledgements(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	stream := d.sync(d.attest(), &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: world.Cluster}}})
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := spiffebundle.Parse(world.TrustDomain, first.GetBundle())
	if err != nil {
		t.Fatal(err)
	}
	sequence, _ := bundle.SequenceNumber()
	if len(first.GetDeniedIds()) != 0 || sequence == 0 {
		t.Fatalf("the first state: %v", first)
	}

	const id = "spiffe://mesh.test/ns/shop/sa/web"
	if _, err := d.RA.Orders.Deny(t.Context(), ca.Denial{ID: id, Since: time.Now(), By: "uid 0"}); err != nil {
		t.Fatal(err)
	}
	if next, err := stream.Recv(); err != nil || len(next.GetDeniedIds()) != 1 || next.GetDeniedIds()[0] != id {
		t.Fatalf("after a denial: %v, %v", next, err)
	}

	// An acknowledgement of what was never sent does not count; one of what was sent does.
	for _, n := range []uint64{sequence + 100, sequence} {
		if err := stream.Send(&meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Ack{Ack: &meshcav1.BundleAck{BundleSequence: n}}}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the acknowledgement", func() bool {
		all := d.RA.Agents.List()
		return len(all) == 1 && all[0].AckedSequence == sequence && all[0].Connected
	})
}

func TestADeniedAgentLosesItsStream(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	stream := d.sync(d.attest(), &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: world.Cluster}}})
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.RA.Orders.Deny(t.Context(), ca.Denial{ID: "spiffe://mesh.test/meshca/agent/one/node1", Since: time.Now(), By: "uid 0"}); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := stream.Recv(); err != nil {
			if refusal.Of(err) != refusal.IdentityDenied {
				t.Fatalf("the stream ended with %v", err)
			}
			return
		}
	}
}

func TestSyncNeedsAnAgentAndAHello(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	hello := &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: world.Cluster}}}
	ack := &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Ack{Ack: &meshcav1.BundleAck{BundleSequence: 1}}}
	agent := d.attest()
	tests := map[string]struct {
		cert  *tls.Certificate
		first *meshcav1.SyncRequest
		want  refusal.Reason
	}{
		"no certificate": {nil, hello, refusal.AgentRequired},
		"no hello":       {agent, ack, refusal.RequestMalformed},
		"another cluster": {agent, &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: "three"}}},
			refusal.ClusterUnknown},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := d.sync(tt.cert, tt.first).Recv(); refusal.Of(err) != tt.want {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}

func TestLimits(t *testing.T) {
	t.Run("calls a second", func(t *testing.T) {
		d := newDoor(t, issuance.Limits{CallsPerSecond: 0.5}) // a burst of two
		agent := d.dial(d.attest())
		var refused error
		for range 4 {
			_, err := agent.IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{{}}})
			refused = errors.Join(refused, err)
		}
		e, _ := refusal.From(refused)
		if e == nil || e.Reason != refusal.PeerLimit || e.RetryAfter == 0 || !strings.Contains(e.Detail, "callsPerSecond") {
			t.Errorf("got %v", refused)
		}
	})
	t.Run("open calls, and they are given back", func(t *testing.T) {
		d := newDoor(t, issuance.Limits{OpenCalls: 1})
		cert := d.attest()
		hello := &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: world.Cluster}}}
		first := d.sync(cert, hello)
		if _, err := first.Recv(); err != nil {
			t.Fatal(err)
		}
		if _, err := d.sync(cert, hello).Recv(); refusal.Of(err) != refusal.PeerLimit {
			t.Fatalf("a second stream: %v", err)
		}
		if err := first.CloseSend(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the place to be free again", func() bool {
			_, err := d.sync(cert, hello).Recv()
			return err == nil
		})
	})
	t.Run("callers without an SVID, together", func(t *testing.T) {
		d := newDoor(t, issuance.Limits{OpenCallsWithoutSVID: 1})
		silent := d.sync(nil) // holds its place for as long as it may stay silent
		eventually(t, "the refusal", func() bool {
			_, err := d.dial(nil).AttestAgent(t.Context(), &meshcav1.AttestAgentRequest{Cluster: world.Cluster})
			return refusal.Of(err) == refusal.Overloaded
		})
		_ = silent.CloseSend()
	})
	t.Run("bytes a second", func(t *testing.T) {
		d := newDoor(t, issuance.Limits{BytesPerSecond: 1}) // a burst of the largest message
		agent := d.dial(d.attest())
		big := &meshcav1.X509SVIDRequest{Csr: make([]byte, 3<<20)}
		var refused error
		for range 2 {
			_, err := agent.IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{big}})
			refused = errors.Join(refused, err)
		}
		if refusal.Of(refused) != refusal.PeerLimit {
			t.Errorf("got %v", refused)
		}
	})
	t.Run("open requests of one peer", func(t *testing.T) {
		d := newDoor(t, issuance.Limits{OpenRequests: 2})
		r, err := d.dial(d.attest()).IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{
			Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{{}, {}, {}},
		})
		if refusal.Of(err) != refusal.PeerLimit {
			t.Errorf("got %v, %v", r, err)
		}
		if line := d.Audit.Last(t); line["outcome"] != string(refusal.PeerLimit) {
			t.Errorf("audit line: %v", line)
		}
	})
	t.Run("connections of one address", func(t *testing.T) {
		d := newDoor(t, issuance.Limits{ConnectionsPerAddress: 2})
		var open []net.Conn
		for range 2 {
			conn, err := net.Dial("tcp", d.address)
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, conn)
		}
		third, err := net.Dial("tcp", d.address)
		if err != nil {
			t.Fatal(err)
		}
		_ = third.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := third.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the third connection was not closed: %v", err)
		}
		for _, c := range open {
			_ = c.Close()
		}
		eventually(t, "the places to be given back", func() bool {
			_, err := d.dial(nil).AttestAgent(t.Context(), &meshcav1.AttestAgentRequest{Cluster: world.Cluster})
			return refusal.Of(err) == refusal.TokenMissing // not Unavailable
		})
	})
	t.Run("requests in flight", func(t *testing.T) {
		d := newDoor(t, issuance.Limits{RequestsInFlight: 2})
		agent := d.dial(d.attest())
		_, err := agent.IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{
			Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{{}, {}, {}},
		})
		if refusal.Of(err) != refusal.Overloaded {
			t.Errorf("got %v", err)
		}
	})
}

func TestHealthSaysWhetherItCanSign(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	health := healthv1.NewHealthClient(d.connect(nil))
	for _, ready := range []bool{false, true} {
		d.server.SetServing(ready)
		r, err := health.Check(t.Context(), &healthv1.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if (r.GetStatus() == healthv1.HealthCheckResponse_SERVING) != ready {
			t.Errorf("ready is %v, health says %v", ready, r.GetStatus())
		}
	}
}

func TestStopEndsStreamsAndSaysWhy(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	stream := d.sync(d.attest(), &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{Cluster: world.Cluster}}})
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	d.stop()
	if _, err := stream.Recv(); refusal.Of(err) != refusal.Stopping {
		t.Errorf("the stream ended with %v", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("stopping took %s with a stream open", took)
	}
}

// The CA's certificate must be its own SVID: an agent accepts nothing else.
func TestOnlyTheCAsOwnIDIsAccepted(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	bundle, _ := d.Trust.Bundle()
	config := tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/web")))
	conn, err := tls.Dial("tcp", d.address, config)
	if err == nil {
		_ = conn.Close()
		t.Fatal("the CA passed as a workload")
	}
}

func (d *door) sync(cert *tls.Certificate, messages ...*meshcav1.SyncRequest) grpc.BidiStreamingClient[meshcav1.SyncRequest, meshcav1.SyncResponse] {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), 30*time.Second)
	d.t.Cleanup(cancel)
	stream, err := d.dial(cert).Sync(ctx)
	if err != nil {
		d.t.Fatal(err)
	}
	for _, m := range messages {
		if err := stream.Send(m); errors.Is(err, io.EOF) {
			break // refused already; Recv says why
		} else if err != nil {
			d.t.Fatal(err)
		}
	}
	return stream
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for range 200 {
		if done() {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("waited in vain for %s", what)
}
