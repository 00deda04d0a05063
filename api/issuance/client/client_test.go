package client

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/fakeca"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a CA that runs and a client of it.
type world struct {
	t        *testing.T
	ca       *fakeca.CA
	client   *Client
	identity atomic.Pointer[tls.Certificate]
	bundle   atomic.Pointer[spiffebundle.Bundle]
	rejected atomic.Int32
}

// source is an x509bundle.Source of the bundle of now.
type source struct{ w *world }

func (s source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return s.w.bundle.Load().GetX509BundleForTrustDomain(td)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ca, err := fakeca.New("mesh.test")
	must(t, err)
	address, err := ca.Start()
	must(t, err)
	w := &world{t: t, ca: ca}
	w.learn()
	ca.Agent("agent", "n1")
	w.client, err = New(Config{
		Address: address, TrustDomain: ca.Domain(), Bundle: source{w}, Identity: w.identity.Load,
		Rejected: func(error) { w.rejected.Add(1) },
	})
	must(t, err)
	t.Cleanup(func() {
		_ = w.client.Close()
		ca.Stop()
		for _, v := range ca.Seen().Violations {
			t.Errorf("the client broke the contract: %s", v)
		}
	})
	return w
}

// learn takes the CA's bundle of now.
func (w *world) learn() {
	b, err := spiffebundle.Parse(w.ca.Domain(), w.ca.Bundle())
	must(w.t, err)
	w.bundle.Store(b)
}

func csr(t *testing.T) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(t, err)
	return key, der
}

// attest gets an agent's SVID and shows it from then on.
func (w *world) attest() error {
	key, der := csr(w.t)
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Second)
	defer cancel()
	answer, err := w.client.AttestAgent(ctx, &meshcav1.AttestAgentRequest{Cluster: "test", Token: "agent", Csr: der})
	if err != nil {
		return err
	}
	w.identity.Store(&tls.Certificate{Certificate: answer.GetSvid().GetChain(), PrivateKey: key})
	return w.client.Redial()
}

func (w *world) issue(token string) (*meshcav1.IssueX509SVIDsResponse, error) {
	_, der := csr(w.t)
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Second)
	defer cancel()
	return w.client.Issue(ctx, &meshcav1.IssueX509SVIDsRequest{
		Cluster: "test", Requests: []*meshcav1.X509SVIDRequest{{Csr: der, Token: token}},
	})
}

func TestClientShowsTheIdentityOfNow(t *testing.T) {
	w := newWorld(t)
	w.ca.Workload("web", "/ns/a/sa/web")
	if _, err := w.issue("web"); refusal.Of(err) != refusal.AgentRequired {
		t.Fatalf("without an identity: %v", err)
	}
	must(t, w.attest())
	answer, err := w.issue("web")
	must(t, err)
	if id := answer.GetResults()[0].GetSvid().GetSpiffeId(); id != "spiffe://mesh.test/ns/a/sa/web" {
		t.Errorf("got %q", id)
	}
	w.identity.Store(nil)
	must(t, w.client.Redial())
	if _, err := w.issue("web"); refusal.Of(err) != refusal.AgentRequired {
		t.Errorf("after the identity was given up: %v", err)
	}
}

func TestRefusalsArriveAsTheyWere(t *testing.T) {
	w := newWorld(t)
	w.ca.Workload("web", "/ns/a/sa/web")
	must(t, w.attest())
	w.ca.Refuse(func(spiffeid.ID) error { return refusal.New(refusal.Overloaded, "busy").After(7 * time.Second) })
	answer, err := w.issue("web")
	must(t, err)
	e, ok := refusal.From(RefusalOf(answer.GetResults()[0]))
	if !ok || e.Reason != refusal.Overloaded || e.RetryAfter != 7*time.Second || e.Detail != "busy" {
		t.Errorf("an item's: %+v", e)
	}
	if e, ok = refusal.From(w.attest()); !ok || e.Reason != refusal.Overloaded || e.RetryAfter != 7*time.Second {
		t.Errorf("a call's: %+v", e)
	}
	if got := refusal.Of(RefusalOf(&meshcav1.X509SVIDResult{})); got != refusal.Internal {
		t.Errorf("an empty result is %s", got)
	}
}

func TestClientTrustsTheCAAlone(t *testing.T) {
	for name, pretend := range map[string]func(*fakeca.CA) error{
		"a workload of the trust domain": func(ca *fakeca.CA) error { ca.PoseAs("/ns/a/sa/b"); return nil },
		"an agent":                       func(ca *fakeca.CA) error { ca.PoseAs("/meshca/agent/test/n1"); return nil },
		"another root":                   (*fakeca.CA).ReplaceRoot,
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			must(t, pretend(w.ca))
			if err := w.attest(); refusal.Of(err) != refusal.CAUntrusted {
				t.Errorf("got %v", err)
			}
			if err := w.client.Probe(t.Context()); refusal.Of(err) != refusal.CAUntrusted {
				t.Errorf("a probe says %v", err)
			}
			if w.rejected.Load() == 0 {
				t.Error("nobody was told")
			}
			if n := w.ca.Seen().Attests; n != 0 {
				t.Errorf("%d tokens went out", n)
			}
		})
	}
}

// The bundle that Rejected brings is what the next handshake is judged by.
func TestClientLearnsANewRoot(t *testing.T) {
	w := newWorld(t)
	must(t, w.attest())
	must(t, w.ca.ReplaceRoot())
	must(t, w.client.Redial())
	if err := w.attest(); refusal.Of(err) != refusal.CAUntrusted {
		t.Fatalf("got %v", err)
	}
	w.learn()
	eventually(t, func() bool { return w.attest() == nil })
}

func TestUnreachable(t *testing.T) {
	w := newWorld(t)
	w.ca.Stop()
	if err := w.attest(); refusal.Of(err) != refusal.CAUnreachable {
		t.Errorf("stopped: %v", err)
	}
	if err := w.client.Probe(t.Context()); refusal.Of(err) != refusal.CAUnreachable {
		t.Errorf("a probe says %v", err)
	}
	_, err := w.ca.Start()
	must(t, err)
	eventually(t, func() bool { return w.attest() == nil })
	must(t, w.client.Probe(t.Context()))
}

// What answered once and was not the CA is told no longer than it answers.
func TestWhatIsToldIsTheLastAttemptsFault(t *testing.T) {
	hangUp := func(w *world) {
		l, err := net.Listen("tcp", w.client.config.Address)
		must(w.t, err)
		w.t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				_ = conn.Close()
			}
		}()
	}
	for name, then := range map[string]func(*world){
		"nothing answers":       func(*world) {},
		"what answers hangs up": hangUp,
		"another connection":    func(w *world) { must(w.t, w.client.Redial()) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.ca.PoseAs("/ns/a/sa/b")
			if err := w.attest(); refusal.Of(err) != refusal.CAUntrusted {
				t.Fatalf("got %v", err)
			}
			w.ca.Stop()
			then(w)
			var told error
			eventually(t, func() bool { told = w.attest(); return refusal.Of(told) == refusal.CAUnreachable })
			if told = w.attest(); refusal.Of(told) != refusal.CAUnreachable {
				t.Errorf("and then %v", told)
			}
		})
	}
}

func TestASilentServerIsUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	w := newWorld(t)
	c, err := New(Config{Address: l.Addr().String(), TrustDomain: w.ca.Domain(), Bundle: source{w}})
	must(t, err)
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := c.AttestAgent(ctx, &meshcav1.AttestAgentRequest{}); refusal.Of(err) != refusal.CAUnreachable {
		t.Errorf("got %v", err)
	}
}

// Calls that are under way when the identity changes are answered; none fails.
func TestRedialLeavesCallsInFlightAlone(t *testing.T) {
	w := newWorld(t)
	w.ca.Workload("web", "/ns/a/sa/web")
	must(t, w.attest())
	w.ca.Refuse(func(spiffeid.ID) error { time.Sleep(2 * time.Millisecond); return nil })
	stop := make(chan struct{})
	var calls sync.WaitGroup
	var answered atomic.Int32
	for range 8 {
		calls.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := w.issue("web"); err != nil {
					t.Errorf("a call failed: %v", err)
					return
				}
				answered.Add(1)
			}
		})
	}
	for n := 0; (n < 50 || answered.Load() < 50) && !t.Failed(); n++ {
		time.Sleep(5 * time.Millisecond)
		must(t, w.client.Redial())
	}
	close(stop)
	calls.Wait()
}

func TestSync(t *testing.T) {
	w := newWorld(t)
	must(t, w.attest())
	states := make(chan *meshcav1.SyncResponse, 100)
	ended := make(chan error, 1)
	go func() {
		ended <- w.client.Sync(t.Context(), &meshcav1.SyncHello{Cluster: "test"}, func(_ context.Context, s *Stream) error {
			state, err := s.Receive()
			if err != nil {
				return err
			}
			states <- state
			if err := s.Acknowledge(1); err != nil {
				return err
			}
			_, err = s.Receive()
			return err
		})
	}()
	<-states
	eventually(t, func() bool { return len(w.ca.Seen().Acks) == 1 })
	must(t, w.client.Redial())
	if err := <-ended; err != nil {
		t.Errorf("after Redial: %v", err)
	}
	w.identity.Store(nil)
	must(t, w.client.Redial())
	err := w.client.Sync(t.Context(), &meshcav1.SyncHello{Cluster: "test"}, func(_ context.Context, s *Stream) error {
		_, err := s.Receive()
		return err
	})
	if refusal.Of(err) != refusal.AgentRequired {
		t.Errorf("without an identity: %v", err)
	}
}

func TestSyncWaitsForTheCA(t *testing.T) {
	w := newWorld(t)
	must(t, w.attest())
	w.ca.Stop()
	ended := make(chan error, 1)
	stopped := errors.New("seen enough")
	go func() {
		ended <- w.client.Sync(t.Context(), &meshcav1.SyncHello{Cluster: "test"}, func(_ context.Context, s *Stream) error {
			if _, err := s.Receive(); err != nil {
				return err
			}
			return stopped
		})
	}()
	time.Sleep(300 * time.Millisecond)
	_, err := w.ca.Start()
	must(t, err)
	if err := <-ended; !errors.Is(err, stopped) {
		t.Errorf("got %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("mesh.test")
	bundle := spiffebundle.New(td)
	for name, c := range map[string]Config{
		"no bundle":       {Address: "ca:1", TrustDomain: td},
		"no trust domain": {Address: "ca:1", Bundle: bundle},
		"no port":         {Address: "ca", TrustDomain: td, Bundle: bundle},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestCloseTwiceAndRedialAfter(t *testing.T) {
	w := newWorld(t)
	must(t, w.client.Close())
	must(t, w.client.Close())
	must(t, w.client.Redial())
	if err := w.attest(); err == nil {
		t.Error("a closed client calls")
	}
}

func eventually(t *testing.T, f func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatal("never")
}
