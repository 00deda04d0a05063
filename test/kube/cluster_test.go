package kube_test

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/test/kube"
)

const audience = "meshca"

// shared is one cluster for all tests that only add objects of their own to it. TestMain owns it.
var shared *kube.Cluster

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "meshca-kube-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	shared, err = kube.Launch(ctx, dir)
	cancel()
	code := 1
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		code = m.Run()
		shared.Close()
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

var modes = []kubernetes.Mode{kubernetes.TokenReview, kubernetes.JWKS}

// inBothModes runs a test against an attestor of each mode.
func inBothModes(t *testing.T, test func(t *testing.T, w *world)) {
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			test(t, newWorld(t, shared, kubernetes.Config{Name: "prod", Mode: mode, Kubeconfig: shared.Kubeconfig}))
		})
	}
}

// world is a namespace of its own with a service account, and an attestor that runs.
type world struct {
	*kube.Cluster
	t         *testing.T
	attestor  *kubernetes.Cluster
	calls     *atomic.Int64 // of the attestor to the API server
	namespace string
	account   *corev1.ServiceAccount
	node      *corev1.Node
}

func newWorld(t *testing.T, c *kube.Cluster, cfg kubernetes.Config) *world {
	t.Helper()
	w := &world{Cluster: c, t: t, namespace: fmt.Sprintf("ns-%x", time.Now().UnixNano())}
	w.attestor, w.calls = run(t, cfg)
	must(c.CreateNamespace(t.Context(), w.namespace))(t)
	w.account = must(c.CreateServiceAccount(t.Context(), w.namespace, "web"))(t)
	w.node = w.newNode("first")
	return w
}

// run makes an attestor, runs it until the test ends, and waits until it is ready. It counts its calls.
func run(t *testing.T, cfg kubernetes.Config) (*kubernetes.Cluster, *atomic.Int64) {
	t.Helper()
	calls := new(atomic.Int64)
	a := must(kubernetes.New(cfg, kubernetes.Deps{Observe: func(kubernetes.Call) { calls.Add(1) }}))(t)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = a.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	eventually(t, 20*time.Second, a.Ready)
	return a, calls
}

// untilWatched attests until that takes no call to the API server any more: the watches know all that the token stands on.
func (w *world) untilWatched(token attestor.Token) {
	w.t.Helper()
	eventually(w.t, 10*time.Second, func() error {
		before := w.calls.Load()
		if err := w.attest(token); err != nil {
			return err
		}
		if more := w.calls.Load() - before; more > 0 {
			return fmt.Errorf("an attestation made %d calls", more)
		}
		return nil
	})
}

func (w *world) newNode(name string) *corev1.Node {
	w.t.Helper()
	return must(w.CreateNode(w.t.Context(), name+"-"+w.namespace))(w.t)
}

func (w *world) newPod(name string, node *corev1.Node) *corev1.Pod {
	w.t.Helper()
	return must(w.CreatePod(w.t.Context(), w.namespace, name, "web", node.Name))(w.t)
}

func (w *world) token(pod *corev1.Pod, audience string) attestor.Token {
	w.t.Helper()
	return attestor.NewToken(must(w.Token(w.t.Context(), w.namespace, "web", pod, audience, time.Hour))(w.t))
}

func (w *world) attest(token attestor.Token) error {
	_, err := w.attestor.Attest(w.t.Context(), token, audience)
	return err
}

// refused waits until the token is refused for this reason: a watch needs a moment.
func (w *world) refused(token attestor.Token, want refusal.Reason) {
	w.t.Helper()
	eventually(w.t, 10*time.Second, func() error {
		if err := w.attest(token); refusal.Of(err) != want {
			return fmt.Errorf("got %v, want %s", err, want)
		}
		return nil
	})
}

func eventually(t *testing.T, limit time.Duration, check func() error) {
	t.Helper()
	end := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %v still: %v", limit, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
