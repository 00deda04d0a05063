package agent

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// proxy is an SDS stream that asks for names and takes or keeps silent about what it is sent.
type proxy struct {
	t      *testing.T
	stream grpc.BidiStreamingClient[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]
	names  []string
	got    chan *discoveryv3.DiscoveryResponse
}

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

func newProxy(t *testing.T, socket string, names ...string) *proxy {
	t.Helper()
	conn := dial(t, socket)
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx, grpc.WaitForReady(true))
	must(t, err)
	p := &proxy{t: t, stream: stream, names: names, got: make(chan *discoveryv3.DiscoveryResponse, 1000)}
	go func() {
		defer close(p.got)
		for {
			r, err := stream.Recv()
			if err != nil {
				return
			}
			p.got <- r
		}
	}()
	t.Cleanup(func() {
		cancel()
		for range p.got {
		}
		_ = conn.Close()
	})
	err = stream.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "proxy"}, ResourceNames: names, TypeUrl: secretType})
	if !errors.Is(err, io.EOF) { // the end of a stream that was refused: its status comes to whoever receives
		must(t, err)
	}
	return p
}

// next is the next answer.
func (p *proxy) next() *discoveryv3.DiscoveryResponse {
	p.t.Helper()
	select {
	case r, open := <-p.got:
		if !open {
			p.t.Fatal("the stream ended")
		}
		return r
	case <-time.After(15 * time.Second):
		p.t.Fatal("no answer came")
	}
	return nil
}

func (p *proxy) ack(r *discoveryv3.DiscoveryResponse) {
	must(p.t, p.stream.Send(&discoveryv3.DiscoveryRequest{
		ResourceNames: p.names, TypeUrl: secretType, VersionInfo: r.GetVersionInfo(), ResponseNonce: r.GetNonce(),
	}))
}

func certificateIn(t *testing.T, r *discoveryv3.DiscoveryResponse) string {
	t.Helper()
	for _, a := range r.GetResources() {
		s := &tlsv3.Secret{}
		must(t, a.UnmarshalTo(s))
		if c := s.GetTlsCertificate(); c != nil {
			return string(c.GetCertificateChain().GetInlineBytes())
		}
	}
	return ""
}

func TestAgentRotatesUnderAnOpenStream(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	n.ca.Lives(2*time.Second, 2*time.Second)
	a := n.start()
	p := newProxy(t, n.path("web.sock"), "default")
	seen := map[string]bool{}
	for range 4 {
		r := p.next()
		p.ack(r)
		cert := certificateIn(t, r)
		if cert == "" || seen[cert] {
			t.Fatal("no new certificate came")
		}
		seen[cert] = true
	}
	w := a.status().GetWorkloads()[0]
	if w.GetSvid().GetRotations() < 2 || w.GetState() != "fresh" || w.GetOpenStreams() != 1 {
		t.Errorf("status %v", w)
	}
}

func TestAgentRestartedWithTheCAGone(t *testing.T) {
	n := newNode(t)
	id := n.workload("web")
	a := n.start()
	before := fetch(t, n.path("web.sock"), "default")["default"]
	if before == nil {
		t.Fatal("nothing served")
	}
	must(t, a.stop())
	n.ca.Stop()
	must(t, os.Remove(n.path("web.token")))
	must(t, os.Remove(n.path("bundle.json")))

	b := n.start()
	after := fetch(t, n.path("web.sock"), "default", "ROOTCA")
	if string(after["default"].GetTlsCertificate().GetCertificateChain().GetInlineBytes()) != string(before.GetTlsCertificate().GetCertificateChain().GetInlineBytes()) {
		t.Error("not what was held before")
	}
	if after["ROOTCA"] == nil {
		t.Error("no roots")
	}
	st := b.status()
	if w := st.GetWorkloads()[0]; w.GetSvid().GetSpiffeId() != id || w.GetState() != "fresh" {
		t.Errorf("status %v", w)
	}
	if st.GetSelf().GetSpiffeId() == "" {
		t.Error("the agent's own SVID was not kept")
	}
}

func TestAgentNeverServesWhatHasEnded(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	n.ca.Lives(2*time.Second, time.Hour)
	a := n.start()
	if fetch(t, n.path("web.sock"), "default")["default"] == nil {
		t.Fatal("nothing served")
	}
	n.ca.Stop()
	eventually(t, "the state is expired", func() bool { return a.state(0) == "expired" })
	got := fetch(t, n.path("web.sock"), "default", "ROOTCA")
	if got["default"] != nil || got["ROOTCA"] == nil {
		t.Errorf("after the end: %v", got)
	}
	if entries, _ := filepath.Glob(filepath.Join(n.config.RuntimeDir, "keys", "svid-*")); len(entries) != 0 {
		t.Errorf("the ended key is still there: %v", entries)
	}
	if why := a.status().GetWorkloads()[0].GetLastRefusal(); why.GetReason() != string(refusal.CAUnreachable) {
		t.Errorf("the state says %v", why)
	}
	must(t, a.stop())

	b := n.start()
	if b.state(0) != "pending" {
		t.Errorf("restarted with what has ended: %s", b.state(0))
	}
	_, err := n.ca.Start()
	must(t, err)
	eventually(t, "it comes back by itself", func() bool { return b.state(0) == "fresh" })
}

func TestWorkloadsOutliveTheAgentsOwnSVID(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	n.ca.Lives(time.Hour, 2*time.Second)
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" })
	n.ca.Refuse(func(id spiffeid.ID) error { return refusal.New(refusal.AgentNotListed, "no longer") })
	eventually(t, "the agent's own SVID ends", func() bool { return a.status().GetSelf() == nil })
	if a.state(0) != "fresh" || fetch(t, n.path("web.sock"), "default")["default"] == nil {
		t.Error("the workload's SVID went with the agent's")
	}
	if st := a.status(); st.GetReady() || len(st.GetNotReady()) == 0 {
		t.Error("ready without an SVID")
	}
}

func TestOneBrokenWorkloadLeavesTheOthersAlone(t *testing.T) {
	n := newNode(t)
	n.workload("good")
	n.workload("tokenless")
	n.workload("badsocket")
	n.workload("refused")
	must(t, os.Remove(n.path("tokenless.token")))
	n.write("badsocket.sock", "a file stands here")
	n.write("refused.token", "nobody's token")
	a := n.start()
	eventually(t, "the states are told apart", func() bool {
		w := a.status().GetWorkloads()
		return w[0].GetState() == "fresh" && w[1].GetState() == "broken" && w[2].GetState() == "broken" && w[3].GetState() == "refused"
	})
	w := a.status().GetWorkloads()
	for i, want := range map[int]refusal.Reason{1: refusal.TokenUnreadable, 2: refusal.SocketPath, 3: refusal.TokenRejected} {
		if i == 2 && w[i].GetLastRefusal() == nil {
			continue // its renewal succeeds; the socket's fault shows once that is done
		}
		if got := w[i].GetLastRefusal().GetReason(); got != string(want) {
			t.Errorf("workload %d: %s, want %s", i, got, want)
		}
	}
	if fetch(t, n.path("good.sock"), "default")["default"] == nil {
		t.Error("the good one is not served")
	}
	// What was wrong is put right, and nobody restarts anything.
	n.write("tokenless.token", "tokenless-token")
	must(t, os.Remove(n.path("badsocket.sock")))
	eventually(t, "they heal", func() bool { return a.state(1) == "fresh" && a.state(2) == "fresh" })
}

func TestDenials(t *testing.T) {
	n := newNode(t)
	id := n.workload("web")
	n.workload("db")
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.state(1) == "fresh" && a.status().GetConnected() })
	file := filepath.Join(n.config.RuntimeDir, "keys", nameOf(n.config.Workloads[0])+keptSuffix)
	given, err := os.ReadFile(file)
	must(t, err)
	n.ca.Order(stateOf(id))
	began := time.Now()
	eventually(t, "dropped", func() bool { return a.state(0) == "denied" })
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %v", took)
	}
	if got := fetch(t, n.path("web.sock"), "default", id); len(got) != 0 {
		t.Errorf("still served: %v", got)
	}
	if fetch(t, n.path("db.sock"), "default")["default"] == nil || a.state(1) != "fresh" {
		t.Error("another identity was hurt")
	}
	if kept, _ := filepath.Glob(filepath.Join(n.config.RuntimeDir, "keys", "svid-*")); len(kept) != 1 {
		t.Errorf("on disk: %v", kept)
	}
	kept := n.path("state/denied.json")
	eventually(t, "the denial is on disk", func() bool {
		data, _ := os.ReadFile(kept)
		return contains(string(data), id)
	})
	if info, err := os.Stat(kept); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	// Restarted with the CA gone, it must not come back from disk, also where the file did not go, or came again.
	must(t, a.stop())
	n.ca.Stop()
	must(t, os.WriteFile(file, given, 0o600))
	b := n.start()
	if got := b.state(0); got != "denied" {
		t.Errorf("restarted with a denied SVID on disk: %s", got)
	}
	if got := fetch(t, n.path("web.sock"), "default", "ROOTCA"); got["default"] != nil || got["ROOTCA"] == nil {
		t.Errorf("served: %v", got)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("the denied SVID is still on disk")
	}
	_, err = n.ca.Start()
	must(t, err)
	eventually(t, "the CA's word is heard again", func() bool { return b.state(0) == "denied" && b.status().GetConnected() })
	n.ca.Order(stateOf())
	eventually(t, "allowed again", func() bool { return b.state(0) == "fresh" })
}

func TestRenewOrders(t *testing.T) {
	n := newNode(t)
	id := n.workload("web")
	other := n.workload("db")
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.state(1) == "fresh" && a.status().GetConnected() })
	time.Sleep(1100 * time.Millisecond) // Keep lets one renewal a second pass, and NotAfter counts in seconds
	order := &meshcav1.RenewOrder{SpiffeId: id, IssuedBefore: timestamppb.New(time.Now()), Spread: durationpb.New(200 * time.Millisecond)}
	s := stateOf()
	s.Renew = append(s.Renew, order)
	n.ca.Order(s)
	count := func(id string) int { return n.ca.Seen().Issued[spiffeid.RequireFromString(id)] }
	eventually(t, "renewed", func() bool { return count(id) == 2 })
	n.ca.Order(s) // the whole state comes again at each change
	n.ca.Order(s)
	time.Sleep(500 * time.Millisecond)
	if count(id) != 2 || count(other) != 1 {
		t.Errorf("%d and %d renewals, want 2 and 1", count(id), count(other))
	}
	time.Sleep(700 * time.Millisecond)
	s.Renew = []*meshcav1.RenewOrder{order, {IssuedBefore: timestamppb.New(time.Now())}}
	attests := n.ca.Seen().Attests
	n.ca.Order(s)
	eventually(t, "all renewed, the agent too", func() bool {
		return count(id) == 3 && count(other) == 2 && n.ca.Seen().Attests > attests
	})
}

func TestBundleIsAcknowledgedOnceProxiesHaveIt(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	a := n.start()
	p := newProxy(t, n.path("web.sock"), "ROOTCA")
	p.ack(p.next())
	acked := func() uint64 {
		if acks := n.ca.Seen().Acks; len(acks) > 0 {
			return acks[len(acks)-1]
		}
		return 0
	}
	eventually(t, "the first bundle is acknowledged", func() bool { return acked() == 1 })
	must(t, n.ca.AddRoot())
	r := p.next()
	time.Sleep(300 * time.Millisecond)
	if acked() != 1 {
		t.Fatal("acknowledged before the proxy had it")
	}
	p.ack(r)
	eventually(t, "the second bundle is acknowledged", func() bool { return acked() == 2 })
	if got := a.status().GetBundleSequence(); got != 2 {
		t.Errorf("status says sequence %d", got)
	}
	// The connection was made anew under the new bundle; nothing may have been lost on the way.
	eventually(t, "connected", func() bool { return a.status().GetConnected() })
}

func TestOneCallForManyWorkloads(t *testing.T) {
	const many = 300
	n := newNode(t)
	for i := range many {
		n.workload(fmt.Sprintf("w%d", i))
	}
	a := n.start()
	eventually(t, "all fresh", func() bool {
		for _, w := range a.status().GetWorkloads() {
			if w.GetState() != "fresh" {
				return false
			}
		}
		return true
	})
	seen := n.ca.Seen()
	if len(seen.Batches) > 30 {
		t.Errorf("%d calls for %d workloads: %v", len(seen.Batches), many, seen.Batches)
	}
	t.Logf("batches %v", seen.Batches)
}

func TestAgentComesBackAfterTheRootChanged(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	n.ca.Lives(time.Hour, time.Hour)
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" })
	must(t, a.stop())
	must(t, n.ca.ReplaceRoot())

	b := n.start()
	time.Sleep(500 * time.Millisecond)
	if st := b.status(); st.GetConnected() || st.GetBundleSequence() != 1 {
		t.Fatalf("trusts a root that nobody vouched for: %v", st)
	}
	n.write("bundle.json", string(n.ca.Bundle()))
	eventually(t, "connected under the new root", func() bool {
		st := b.status()
		return st.GetConnected() && st.GetBundleSequence() == 2 && b.state(0) == "fresh"
	})
}

func TestAgentTellsNothingToAnImpostor(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	n.ca.PoseAs("/ns/test/sa/web") // a workload of the same trust domain, with a chain that verifies
	a := n.start()
	eventually(t, "told apart", func() bool {
		return a.status().GetWorkloads()[0].GetLastRefusal().GetReason() == string(refusal.CAUntrusted) ||
			len(a.NotReady()) > 0 && contains(a.NotReady()[0], string(refusal.CAUntrusted))
	})
	if seen := n.ca.Seen(); seen.Attests+len(seen.Batches) != 0 {
		t.Errorf("a token went to %v", seen)
	}
	n.ca.PoseAs("/meshca/server")
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" })
}

func TestAgentAttestsAnewWhenTheCAForgotIt(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.status().GetConnected() })
	before := n.ca.Seen().Attests
	n.ca.ForgetAgents()
	n.ca.Stop()
	n.ca.Agent("agent-token", "node-1-again")
	_, err := n.ca.Start()
	must(t, err)
	eventually(t, "attested anew", func() bool {
		st := a.status()
		return n.ca.Seen().Attests > before && st.GetConnected() && st.GetSelf().GetSpiffeId() == "spiffe://mesh.test/meshca/agent/test/node-1-again"
	})
}

// replaced starts an agent whose kept SVID the CA does not take any more, for the reason.
func (n *node) replaced(reason refusal.Reason) *running {
	n.t.Helper()
	a := n.start()
	eventually(n.t, "fresh", func() bool { return a.state(0) == "fresh" && a.status().GetConnected() })
	old := a.status().GetSelf().GetSerial()
	must(n.t, a.stop())
	n.ca.RefuseCallers(func(svid *x509.Certificate) error {
		if hex.EncodeToString(svid.SerialNumber.Bytes()) == old {
			return refusal.New(reason, "another pod's")
		}
		return nil
	})
	return n.start()
}

func TestAgentAttestsAnewWhenItsPodWasReplaced(t *testing.T) {
	for _, reason := range []refusal.Reason{
		refusal.PodRecreated, refusal.PodGone, refusal.PodFinished, refusal.NodeGone, refusal.ServiceAccountGone, refusal.NamespaceGone,
		refusal.ClusterMismatch, refusal.AgentNotListed, refusal.AgentUnknown,
	} {
		t.Run(string(reason), func(t *testing.T) {
			n := newNode(t)
			n.workload("web")
			n.ca.Lives(6*time.Second, time.Hour)
			a := n.replaced(reason)
			began := time.Now()
			eventually(t, "attested anew", func() bool { return n.ca.Seen().Attests == 2 && a.status().GetConnected() })
			if took := time.Since(began); took > 4*time.Second {
				t.Errorf("it took %v", took)
			}
			eventually(t, "renewed", func() bool {
				w := a.status().GetWorkloads()[0]
				if s := w.GetState(); s == "expired" {
					t.Fatal("the workload expired")
				}
				return w.GetState() == "fresh" && w.GetSvid().GetRotations() > 0
			})
		})
	}
}

// What the CA says of its own trouble, or of the message, is no word against the agent.
func TestAgentKeepsItsSVIDWhenTheCAJudgesSomethingElse(t *testing.T) {
	for _, reason := range []refusal.Reason{refusal.Internal, refusal.Overloaded, refusal.KubernetesUnavailable, refusal.RequestMalformed} {
		n := newNode(t)
		n.workload("web")
		a := n.replaced(reason)
		eventually(t, "refused", func() bool {
			_, last, _, _ := a.follower.standing()
			return refusal.Of(last) == reason
		})
		time.Sleep(300 * time.Millisecond)
		if got := n.ca.Seen().Attests; got != 1 || a.status().GetSelf() == nil {
			t.Errorf("%s: attested %d times", reason, got)
		}
	}
}

func TestAgentMovedToAnotherClusterAttestsAnew(t *testing.T) {
	n := newNode(t)
	ca := n.ca
	s := &store{n.path("run/keys"), machineClocks()}
	must(t, s.prepare())
	h := newHeld(t, ca, "/meshca/agent/other/node-1", time.Hour)
	must(t, s.save(selfName, Workload{}, h, 0))
	a := n.start()
	eventually(t, "attested", func() bool {
		return a.status().GetConnected() && a.status().GetSelf().GetSpiffeId() == "spiffe://mesh.test/meshca/agent/test/node-1"
	})
	if got := ca.Seen().Hellos; len(got) != 1 {
		t.Errorf("%d streams", len(got))
	}
	if contains(n.log.String(), "does not take the agent's SVID") {
		t.Error("the other cluster's SVID was shown to the CA")
	}
}

func TestSecondAgentIsRefused(t *testing.T) {
	n := newNode(t)
	a := n.start()
	eventually(t, "it runs", func() bool { return a.status().GetReady() })
	b, err := New(n.config)
	must(t, err)
	if err := b.Run(t.Context()); refusal.Of(err) != refusal.SocketInUse || !contains(err.Error(), "another meshca-agent") {
		t.Errorf("got %v, want %s", err, refusal.SocketInUse)
	}
	if !a.status().GetReady() {
		t.Error("the first one was hurt")
	}
}

func TestSocketThatWasRemovedComesBack(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as the agent takes to notice")
	}
	n := newNode(t)
	n.workload("web")
	n.start()
	if fetch(t, n.path("web.sock"), "default") == nil {
		t.Fatal("nothing served")
	}
	must(t, os.Remove(n.path("web.sock")))
	for end := time.Now().Add(watch + reopen + 5*time.Second); ; time.Sleep(100 * time.Millisecond) {
		if _, err := os.Lstat(n.path("web.sock")); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the socket did not come back")
		}
	}
	if fetch(t, n.path("web.sock"), "default")["default"] == nil {
		t.Error("nothing served at the new socket")
	}
}
