package kubernetes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

func status(w http.ResponseWriter, code int, reason metav1.StatusReason) {
	answer(w, code, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Code: int32(code), Reason: reason, Message: string(reason)})
}

// Whatever the API server does wrong is its fault, not the token's, and passes with it.
func TestFaultsOfTheServer(t *testing.T) {
	faults := map[string]struct {
		wrong func(w http.ResponseWriter, r *http.Request)
		want  refusal.Reason
	}{
		"401":           {func(w http.ResponseWriter, _ *http.Request) { status(w, 401, metav1.StatusReasonUnauthorized) }, refusal.KubernetesForbidden},
		"403":           {func(w http.ResponseWriter, _ *http.Request) { status(w, 403, metav1.StatusReasonForbidden) }, refusal.KubernetesForbidden},
		"429":           {func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Retry-After", "7"); w.WriteHeader(429) }, refusal.KubernetesUnavailable},
		"500":           {func(w http.ResponseWriter, _ *http.Request) { status(w, 500, metav1.StatusReasonInternalError) }, refusal.KubernetesUnavailable},
		"503":           {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }, refusal.KubernetesUnavailable},
		"a proxy's 404": {func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }, refusal.KubernetesUnavailable},
		"a web page":    {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>")) }, refusal.KubernetesUnavailable},
		"no answer":     {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, refusal.KubernetesUnavailable},
		"hung up":       {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, refusal.KubernetesUnavailable},
		"half an answer": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "99")
			_, _ = w.Write([]byte("{"))
		}, refusal.KubernetesUnavailable},
		"another's words": {func(w http.ResponseWriter, _ *http.Request) {
			answer(w, 200, map[string]string{"kind": "Secret", "apiVersion": "v1"})
		}, refusal.KubernetesUnavailable},
		"another kind of that name": {func(w http.ResponseWriter, r *http.Request) {
			path := strings.Split(r.URL.Path, "/")
			secret := &corev1.Secret{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}, ObjectMeta: metav1.ObjectMeta{Name: path[len(path)-1]}}
			if len(path) == 7 { // /api/v1/namespaces/shop/pods/web-1
				secret.Namespace = path[4]
			}
			answer(w, 200, secret)
		}, refusal.KubernetesUnavailable},
	}
	cfg := Config{}
	cfg.CallTimeout.Duration = time.Second
	b := newBench(t, cfg)
	for name, fault := range faults {
		for _, path := range []string{"tokenreviews", "/pods/", "/nodes/", "/serviceaccounts/", "/namespaces/shop"} {
			b.server.do(func() {
				b.server.wrong = func(w http.ResponseWriter, r *http.Request) bool {
					hit := strings.Contains(r.URL.Path, path) && !(path == "/namespaces/shop" && !strings.HasSuffix(r.URL.Path, path))
					if hit {
						fault.wrong(w, r)
					}
					return hit
				}
			})
			_, err := b.Attest(t.Context(), usual(b.now()).rs256(t), "meshca")
			var refused *refusal.Error
			if !errors.As(err, &refused) || refused.Reason != fault.want {
				t.Errorf("%s on %s: got %v, want %s", name, path, err, fault.want)
			} else if name == "429" && refused.RetryAfter != 7*time.Second {
				t.Errorf("%s on %s: retry after %v, want 7s", name, path, refused.RetryAfter)
			}
			b.server.do(func() { b.server.wrong = nil })
			if got := b.reason(t, usual(b.now()).rs256(t)); got != "" {
				t.Errorf("%s on %s is over: got %q", name, path, got)
			}
		}
	}
}

// Calls under way are bounded; who waits too long for one is told to come again.
func TestCallsAreBounded(t *testing.T) {
	const most = 3
	cfg := Config{MaxCalls: most}
	cfg.CallTimeout.Duration = 2 * time.Second
	b := newBench(t, cfg)
	token := usual(b.now()).rs256(t)
	var under, peak atomic.Int64
	b.server.do(func() {
		b.server.wrong = func(_ http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "tokenreviews") {
				n := under.Add(1)
				defer under.Add(-1)
				for old := peak.Load(); n > old && !peak.CompareAndSwap(old, n); old = peak.Load() {
				}
				time.Sleep(400 * time.Millisecond)
			}
			return false
		}
	})
	var mu sync.Mutex
	got := map[refusal.Reason]int{}
	var wg sync.WaitGroup
	began := time.Now()
	for range 60 {
		wg.Go(func() {
			reason := b.reason(t, token)
			mu.Lock()
			defer mu.Unlock()
			got[reason]++
		})
	}
	wg.Wait()
	if peak.Load() != most {
		t.Errorf("%d calls were under way at once, want %d", peak.Load(), most)
	}
	if got[""] == 0 || got[refusal.Overloaded] == 0 || got[""]+got[refusal.Overloaded] != 60 {
		t.Errorf("answers %v: want some attested, the others OVERLOADED, no other", got)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("they waited %v", took)
	}
}

// Strangers who want to be taken for agents get a quarter of the calls; what agents ask for their workloads has the rest.
func TestStrangersDoNotCrowdAgentsOut(t *testing.T) {
	const most, share = 8, 2
	b := newBench(t, Config{MaxCalls: most})
	b.api.wait = 200 * time.Millisecond // for a slot; a call itself has longer
	agent := usual(b.now()).with(body{"aud": []string{attestor.AgentAudience}}).rs256(t)
	workload := usual(b.now()).rs256(t)
	var mu sync.Mutex
	held, peak := 0, 0
	release := make(chan struct{})
	b.server.do(func() {
		b.server.wrong = func(_ http.ResponseWriter, r *http.Request) bool {
			raw := new(bytes.Buffer)
			_, _ = raw.ReadFrom(r.Body)
			r.Body = readCloser{bytes.NewReader(raw.Bytes())}
			if !strings.Contains(r.URL.Path, "tokenreviews") || !bytes.Contains(raw.Bytes(), []byte(attestor.AgentAudience)) {
				return false
			}
			mu.Lock()
			held++
			peak = max(peak, held)
			mu.Unlock()
			<-release
			mu.Lock()
			held--
			mu.Unlock()
			return false
		}
	})
	var strangers sync.WaitGroup
	answers := make(chan error, 40)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for range cap(answers) {
		strangers.Go(func() {
			_, err := b.Attest(ctx, agent, attestor.AgentAudience)
			answers <- err
		})
	}
	await(t, func() error {
		mu.Lock()
		defer mu.Unlock()
		if held < share {
			return fmt.Errorf("%d strangers' calls are under way", held)
		}
		return nil
	})
	var workloads sync.WaitGroup
	for range most - share { // each has a place at once: what waits is no one's fault on a busy machine
		workloads.Go(func() {
			if got := b.reason(t, workload); got != "" {
				t.Errorf("a workload behind a flood of strangers: %s", got)
			}
		})
	}
	workloads.Wait()
	for range cap(answers) - share {
		var refused *refusal.Error
		if err := <-answers; !errors.As(err, &refused) || refused.Reason != refusal.Overloaded || refused.RetryAfter <= 0 {
			t.Errorf("a stranger too many: got %v, want OVERLOADED and when to come again", err)
		}
	}
	close(release)
	strangers.Wait()
	for range share {
		if err := <-answers; err != nil {
			t.Errorf("a stranger that had its turn: %v", err)
		}
	}
	if peak != share {
		t.Errorf("%d strangers' calls were under way at once, want %d of %d", peak, share, most)
	}
	if _, err := b.Attest(t.Context(), agent, attestor.AgentAudience); err != nil {
		t.Errorf("after the flood: %v", err)
	}
}

// Reads are bounded as reviews are; and what an agent that is known brings about never is a stranger's.
func TestWhoIsAStranger(t *testing.T) {
	b := newBench(t, Config{Mode: JWKS})
	b.api.wait = 50 * time.Millisecond
	if !b.api.strangers.TryAcquire(16) || b.api.strangers.TryAcquire(1) {
		t.Fatal("strangers have another part than a quarter of 64")
	}
	unknown := usual(b.now()).with(body{"k8s.pod": body{"name": "web-9", "uid": "u"}}) // it takes a live read
	for audience, want := range map[string]refusal.Reason{attestor.AgentAudience: refusal.Overloaded, attestor.WorkloadAudience: refusal.PodGone} {
		ev, err := b.Attest(t.Context(), unknown.with(body{"aud": []string{audience}}).rs256(t), audience)
		if refusal.Of(err) != want {
			t.Errorf("a token for %s: got %v, want %s", audience, err, want)
		}
		if err := b.Alive(t.Context(), ev); refusal.Of(err) != refusal.PodGone {
			t.Errorf("whether the bearer of a token for %s lives: got %v", audience, err)
		}
	}
	if err := b.askRights(t.Context()); err != nil {
		t.Errorf("the CA's own call: %v", err)
	}
}

type readCloser struct{ *bytes.Reader }

func (readCloser) Close() error { return nil }

// A caller that goes takes its own error along, and nobody calls the API server ill for it.
func TestCallerGoes(t *testing.T) {
	b := newBench(t, Config{})
	b.server.do(func() {
		b.server.wrong = func(_ http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "tokenreviews") {
				<-r.Context().Done()
				return true
			}
			return false
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := b.Attest(ctx, usual(b.now()).rs256(t), "meshca"); !errors.Is(err, context.DeadlineExceeded) || refusal.Of(err) != refusal.CallEnded {
		t.Errorf("got %v, want the context's own error", err)
	}
	if err := b.api.last.get(); err != nil {
		t.Errorf("the API server is called ill: %v", err)
	}
}

func TestRights(t *testing.T) {
	b := newBench(t, Config{})
	if err := b.askRights(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.server.do(func() { b.server.denied = true })
	if err := b.askRights(t.Context()); refusal.Of(err) != refusal.KubernetesForbidden || !strings.Contains(err.Error(), "may not") {
		t.Errorf("got %v, want KUBERNETES_FORBIDDEN and what is not allowed", err)
	}
}

func TestObserve(t *testing.T) {
	server := newFakeServer(t)
	server.keys["rsa"] = testKeys()["rsa"].Public()
	server.putUsual()
	var mu sync.Mutex
	seen := map[string]int{}
	c, err := New(Config{Name: "prod", Kubeconfig: server.kubeconfig}, Deps{Observe: func(call Call) {
		mu.Lock()
		defer mu.Unlock()
		seen[fmt.Sprintf("%s %s", call.What, call.Outcome)]++
		if call.Took <= 0 {
			t.Errorf("%s took %v", call.What, call.Took)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Attest(t.Context(), usual(time.Now()).rs256(t), "meshca"); err != nil {
		t.Fatal(err)
	}
	server.do(func() {
		server.wrong = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(500); return true }
	})
	_, _ = c.Attest(t.Context(), usual(time.Now()).rs256(t), "meshca")
	want := "map[namespaces :1 nodes :1 pods :1 serviceaccounts :1 tokenreviews :1 tokenreviews KUBERNETES_UNAVAILABLE:1]"
	if got := fmt.Sprint(seen); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestSkew(t *testing.T) {
	noon := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	for name, test := range map[string]struct {
		date, sent, came time.Time
		want             time.Duration
	}{
		"the same":            {noon, noon.Add(300 * time.Millisecond), noon.Add(310 * time.Millisecond), 0},
		"within the second":   {noon, noon.Add(900 * time.Millisecond), noon.Add(1100 * time.Millisecond), 0},
		"a minute ahead":      {noon.Add(time.Minute), noon.Add(500 * time.Millisecond), noon.Add(500 * time.Millisecond), time.Minute},
		"an hour behind":      {noon.Add(-time.Hour), noon.Add(500 * time.Millisecond), noon.Add(500 * time.Millisecond), -time.Hour},
		"after a long answer": {noon, noon.Add(-4 * time.Second), noon.Add(4 * time.Second), 0},
	} {
		var s skew
		s.note(test.date, test.sent, test.came)
		if got, at := s.get(); got != test.want || !at.Equal(test.came) {
			t.Errorf("%s: got %v at %v, want %v", name, got, at, test.want)
		}
	}
	b := newBench(t, Config{})
	b.server.do(func() {
		b.server.wrong = func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Date", time.Now().Add(-10*time.Minute).UTC().Format(http.TimeFormat))
			return false
		}
	})
	_, _ = b.Attest(t.Context(), usual(b.now()).rs256(t), "meshca")
	if got := b.Status().ClockSkew; got < -10*time.Minute-2*time.Second || got > -10*time.Minute+2*time.Second {
		t.Errorf("an API server ten minutes behind: got %v", got)
	}
}
