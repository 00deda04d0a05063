package kubernetes

import (
	"bytes"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// A hundred calls at once reach the API server at once: it answers none before all are there. With client-go's own limit
// (a burst of ten, then five a second) the last would leave after 18 seconds, which is longer than a call may take.
func TestNoRateLimitInTheWay(t *testing.T) {
	const calls = 100
	cfg := Config{MaxCalls: 2 * calls} // the rights that Run asks for need some of them too
	cfg.CallTimeout.Duration = 10 * time.Second
	b := newBench(t, cfg)
	for _, path := range []string{"/pods/", "/tokenreviews"} {
		var mu sync.Mutex
		came, all := 0, make(chan struct{})
		b.server.do(func() {
			b.server.wrong = func(_ http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, path) {
					return false
				}
				mu.Lock()
				if came++; came == calls {
					close(all)
				}
				mu.Unlock()
				select {
				case <-all:
				case <-r.Context().Done():
				}
				return false
			}
		})
		var wg sync.WaitGroup
		for range calls {
			wg.Go(func() {
				var err error
				if path == "/pods/" {
					_, _, err = b.api.get(t.Context(), laneKnown, pods, name{"shop", "web-1"}, attestor.Wants{})
				} else {
					_, err = b.api.review(t.Context(), laneKnown, usual(b.now()).rs256(t), "meshca")
				}
				if err != nil {
					mu.Lock()
					defer mu.Unlock()
					t.Errorf("%s: with %d of %d calls under way: %v", path, came, calls, err)
				}
			})
		}
		wg.Wait()
	}
	c := b.api.clients()
	if c.core.GetRateLimiter() != nil || c.authentication.GetRateLimiter() != nil || c.authorization.GetRateLimiter() != nil {
		t.Error("a client has a rate limit of its own")
	}
}

// only has the API server know one token.
func (f *fakeServer) only(token string) {
	f.do(func() {
		f.wrong = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Authorization") == "Bearer "+token {
				return false
			}
			status(w, http.StatusUnauthorized, "Unauthorized")
			return true
		}
	})
}

// A token that is replaced in the kubeconfig is used without a restart: soon after calls failed with the old one, by
// calls and by watches.
func TestKubeconfigIsReadAgainAfterAFailure(t *testing.T) {
	for _, mode := range []Mode{TokenReview, JWKS} {
		b := newBench(t, Config{Mode: mode})
		use := func(token string) {
			b.server.writeKubeconfig(b.server.Server, token)
		}
		newPod := usual(b.now()).with(body{"k8s.pod": body{"name": "web-2", "uid": "pod-2"}}).rs256(t) // no watch knows it
		attest := func() error {
			_, err := b.Attest(t.Context(), newPod, "meshca")
			return err
		}
		for _, token := range []string{"token-a", "token-b"} {
			b.server.only(token)
			if err := attest(); refusal.Of(err) != refusal.KubernetesForbidden {
				t.Fatalf("%s, %s: the API server knows us no more: got %v", mode, token, err)
			}
			b.server.CloseClientConnections() // and no watch lives on with the old token
			use(token)
			b.clock.forward(kubeconfigPause)
			_ = attest() // this one may fail still, and has the file read again
			if err := attest(); refusal.Of(err) != refusal.PodGone {
				t.Errorf("%s, %s: the kubeconfig was replaced: got %v, want the API server's word on the pod", mode, token, err)
			}
			if mode == JWKS {
				before := b.server.count("watch pods")
				b.server.CloseClientConnections()
				await(t, func() error {
					if b.server.count("watch pods") == before {
						return errors.New("no watch was opened with the new token")
					}
					return nil
				})
			}
			await(t, b.Ready)
		}
	}
}

// Watches fail by themselves; nobody need call for the kubeconfig to be read again.
func TestWatchesReadTheKubeconfigAgain(t *testing.T) {
	b := newBench(t, Config{Mode: JWKS})
	before := b.server.count("list nodes") + b.server.count("watch nodes")
	b.server.only("token-b")
	b.server.writeKubeconfig(b.server.Server, "token-b")
	b.clock.forward(kubeconfigPause)
	b.server.CloseClientConnections()
	await(t, func() error {
		if b.server.count("list nodes")+b.server.count("watch nodes") == before {
			return errors.New("nodes are not watched again")
		}
		return nil
	})
}

// Also where nothing fails: what the old token still may is no reason to wait for its end.
func TestKubeconfigIsReadAgainEveryMinute(t *testing.T) {
	at := &clock{}
	server := newFakeServer(t)
	var log bytes.Buffer
	c, err := newConnection(server.kubeconfig, func(next http.RoundTripper) http.RoundTripper { return next }, at.now, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	server.putUsual()
	sent := func() (header string) {
		t.Helper()
		server.do(func() {
			server.wrong = func(_ http.ResponseWriter, r *http.Request) bool {
				header = r.Header.Get("Authorization")
				return false
			}
		})
		if err := c.clients().core.Get().Resource("nodes").Name("node-1").Do(t.Context()).Error(); err != nil {
			t.Fatal(err)
		}
		return header
	}
	use := func(token string) {
		server.writeKubeconfig(server.Server, token)
	}
	steps := []struct {
		name   string
		change func()
		after  time.Duration
		doubt  bool
		want   string
	}{
		{"at first", func() {}, 0, false, ""},
		{"replaced", func() { use("a") }, 0, false, ""},
		{"replaced, a call fails too soon after the last look", func() {}, 0, true, ""},
		{"nearly a minute later", func() {}, 50 * time.Second, false, ""},
		{"a minute later", func() {}, 11 * time.Second, false, "Bearer a"},
		{"replaced, and a call fails", func() { use("b") }, kubeconfigPause, true, "Bearer b"},
		{"broken", func() { _ = os.WriteFile(server.kubeconfig, []byte("{"), 0o600) }, kubeconfigPeriod, false, "Bearer b"},
		{"broken still", func() {}, kubeconfigPeriod, false, "Bearer b"},
		{"back", func() { use("c") }, kubeconfigPeriod, false, "Bearer c"},
		{"gone", func() { _ = os.Remove(server.kubeconfig) }, kubeconfigPeriod, false, "Bearer c"},
		{"back again, as it was", func() { use("c") }, kubeconfigPeriod, false, "Bearer c"},
	}
	for _, step := range steps {
		step.change()
		at.forward(step.after)
		if step.doubt {
			c.doubt()
		}
		if got := sent(); got != step.want {
			t.Errorf("%s: called with %q, want %q", step.name, got, step.want)
		}
	}
	if c := c.clients(); c.core.GetRateLimiter() != nil || c.authentication.GetRateLimiter() != nil {
		t.Error("a client that was made anew has a rate limit")
	}
	if n := strings.Count(log.String(), "cannot be read again"); n != 2 {
		t.Errorf("%d warnings about a file that was broken for two looks and gone for one, want 2:\n%s", n, log.String())
	}
	if n := strings.Count(log.String(), "the kubeconfig changed"); n != 3 {
		t.Errorf("%d changes are logged, want 3:\n%s", n, log.String())
	}
	if strings.Contains(log.String(), "Bearer") || strings.Contains(log.String(), "token") {
		t.Errorf("the log holds a token:\n%s", log.String())
	}
}

// The server's address and the trust in it may change as well.
func TestKubeconfigMayNameAnotherServer(t *testing.T) {
	b := newBench(t, Config{})
	attest := func() error {
		_, err := b.Attest(t.Context(), usual(b.now()).rs256(t), "meshca")
		return err
	}
	moved := httptest.NewUnstartedServer(b.server)
	moved.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0) // it is not trusted at first
	moved.StartTLS()
	t.Cleanup(func() { moved.CloseClientConnections(); moved.Close() }) // watches would keep it open
	b.server.closeAll()
	if err := attest(); refusal.Of(err) != refusal.KubernetesUnavailable {
		t.Fatalf("the server moved: got %v", err)
	}
	b.server.writeKubeconfigWith(map[string]any{"server": moved.URL, "certificate-authority-data": otherCA(t)}, map[string]any{})
	b.clock.forward(kubeconfigPause)
	_ = attest()
	if err := attest(); refusal.Of(err) != refusal.KubernetesUnavailable || !strings.Contains(err.Error(), "certificate") {
		t.Fatalf("a server that is not trusted: got %v", err)
	}
	b.server.writeKubeconfig(moved, "")
	b.clock.forward(kubeconfigPause)
	_ = attest()
	if err := attest(); err != nil {
		t.Errorf("the kubeconfig names the server and its certificate: %v", err)
	}
}
