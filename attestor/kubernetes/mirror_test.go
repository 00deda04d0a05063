package kubernetes

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

func (b *bench) reason(t *testing.T, token attestor.Token) refusal.Reason {
	t.Helper()
	_, err := b.Attest(t.Context(), token, "meshca")
	return refusal.Of(err)
}

func (b *bench) liveReads() int {
	n := 0
	for k := range kinds {
		n += b.server.count("get " + k.String())
	}
	return n
}

// What the watches know costs the API server nothing; what they do not know is read once before it is refused.
func TestOneLiveReadBeforeARefusal(t *testing.T) {
	b := newBench(t, Config{Mode: JWKS})
	for range 20 {
		if got := b.reason(t, usual(b.now()).rs256(t)); got != "" {
			t.Fatal(got)
		}
	}
	if n := b.liveReads(); n != 0 {
		t.Errorf("20 tokens of a known pod took %d reads", n)
	}

	b.server.do(func() {
		b.server.mute = map[kind]bool{pods: true, nodes: true, serviceAccounts: true, namespaces: true}
	})
	newPod := func(name, uid, node string) *corev1.Pod {
		return aPod(func(p *corev1.Pod) { p.Name, p.UID, p.Spec.NodeName = name, types.UID(uid), node })
	}
	b.server.put(pods, newPod("web-2", "pod-2", "node-1"))
	b.server.put(nodes, &corev1.Node{ObjectMeta: meta("", "node-2", "node-2-uid")})
	b.server.put(pods, newPod("web-3", "pod-3", "node-2"))
	b.server.put(pods, newPod("web-1", "pod-1-again", "node-1")) // the watch knows its predecessor
	claims := func(pod, uid, node, nodeUID string) body {
		return body{"k8s.pod": body{"name": pod, "uid": uid}, "k8s.node": body{"name": node, "uid": nodeUID}}
	}
	for _, test := range []struct {
		name  string
		claim body
		want  refusal.Reason
		reads int
	}{
		{"a new pod", claims("web-2", "pod-2", "node-1", "node-uid"), "", 1},
		{"a new pod on a new node", claims("web-3", "pod-3", "node-2", "node-2-uid"), "", 2},
		{"a pod made anew", claims("web-1", "pod-1-again", "node-1", "node-uid"), "", 1},
		{"a pod of old, as the watch still has it", claims("web-1", "pod-uid", "node-1", "node-uid"), "", 0},
		{"no such pod", claims("web-9", "u", "node-1", "node-uid"), refusal.PodGone, 1},
		{"no such pod on no such node", claims("web-9", "u", "node-9", "u"), refusal.PodGone, 2},
		{"another pod", claims("web-2", "u", "node-1", "node-uid"), refusal.PodRecreated, 1},
	} {
		before := b.liveReads()
		if got := b.reason(t, usual(b.now()).with(test.claim).rs256(t)); got != test.want {
			t.Errorf("%s: got %q, want %q", test.name, got, test.want)
		}
		if n := b.liveReads() - before; n != test.reads {
			t.Errorf("%s: %d reads, want %d", test.name, n, test.reads)
		}
	}
	b.server.do(func() { clear(b.server.mute) })
	b.server.put(pods, aPod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }))
	await(t, func() error {
		before := b.liveReads()
		if got := b.reason(t, usual(b.now()).rs256(t)); got != refusal.PodFinished || b.liveReads() != before {
			return fmt.Errorf("a finished pod: got %q after %d reads; nothing can change that", got, b.liveReads()-before)
		}
		return nil
	})
}

func TestSilentWatchIsStaleAndRecovers(t *testing.T) {
	b := newBench(t, Config{Mode: JWKS})
	token := func() attestor.Token { return usual(b.now()).rs256(t) }
	b.clock.forward(9 * time.Minute)
	if got := b.reason(t, token()); got != "" {
		t.Fatalf("nine silent minutes: got %q", got)
	}
	b.clock.forward(2 * time.Minute)
	if got := b.reason(t, token()); got != refusal.KubernetesStale {
		t.Fatalf("eleven silent minutes: got %q, want KUBERNETES_STALE", got)
	}
	if err := b.Ready(); refusal.Of(err) != refusal.KubernetesStale {
		t.Errorf("ready: %v", err)
	}
	// Three kinds are heard of: one is silent still.
	for _, k := range []kind{namespaces, serviceAccounts, nodes} {
		b.server.bookmark(k)
	}
	await(t, func() error {
		for _, k := range []kind{namespaces, serviceAccounts, nodes} {
			if err := b.mirrors[k].fresh(); err != nil {
				return err
			}
		}
		return nil
	})
	if got := b.reason(t, token()); got != refusal.KubernetesStale {
		t.Errorf("pods are still silent: got %q, want KUBERNETES_STALE", got)
	}
	b.server.put(pods, aPod(func(p *corev1.Pod) { p.Name, p.UID = "web-2", "pod-2" }))
	await(t, func() error {
		if got := b.reason(t, token()); got != "" {
			return fmt.Errorf("all kinds were heard of: got %q", got)
		}
		return nil
	})
}

// A server that cannot be reached makes the watches stale in the end, but not the tokens of known pods before that.
func TestWatchesWithoutAServer(t *testing.T) {
	b := newBench(t, Config{Mode: JWKS})
	b.server.do(func() {
		b.server.wrong = func(w http.ResponseWriter, r *http.Request) bool {
			w.WriteHeader(http.StatusBadGateway)
			return true
		}
	})
	b.server.CloseClientConnections()
	if got := b.reason(t, usual(b.now()).rs256(t)); got != "" {
		t.Errorf("a known pod: got %q", got)
	}
	other := usual(b.now()).with(body{"k8s.pod": body{"name": "web-2", "uid": "u"}}).rs256(t)
	if got := b.reason(t, other); got != refusal.KubernetesUnavailable {
		t.Errorf("a pod that only the server may know: got %q", got)
	}
	b.clock.forward(11 * time.Minute)
	if got := b.reason(t, usual(b.now()).rs256(t)); got != refusal.KubernetesStale {
		t.Errorf("after eleven minutes: got %q", got)
	}
	b.server.do(func() { b.server.wrong = nil })
	await(t, func() error {
		if got := b.reason(t, usual(b.now()).rs256(t)); got != "" {
			return fmt.Errorf("the server is back: got %q", got)
		}
		return nil
	})
}

// A watch is asked to end within half of maxStale: opening it anew is hearing of the cluster, too.
func TestWatchesEndInTime(t *testing.T) {
	seen := make(chan string, 100)
	cfg := Config{Mode: JWKS}
	cfg.MaxStale.Duration = 2 * time.Minute
	server := newFakeServer(t)
	server.keys["rsa"] = testKeys()["rsa"].Public()
	server.wrong = func(w http.ResponseWriter, r *http.Request) bool {
		if q := r.URL.Query(); q.Get("watch") != "" && q.Get("sendInitialEvents") == "" {
			seen <- q.Get("timeoutSeconds") + " " + q.Get("allowWatchBookmarks")
		}
		return false
	}
	cfg.Name, cfg.Kubeconfig = "prod", server.kubeconfig
	c, err := New(cfg, Deps{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = c.Run(ctx) }()
	for range kinds {
		if got := <-seen; got != "60 true" {
			t.Errorf("a watch asks for %q, want 60 seconds and bookmarks", got)
		}
	}
	cancel()
	<-ended
}

func TestMirrorKeepsWhatIsUsed(t *testing.T) {
	now := metav1.Now()
	full := aPod(func(p *corev1.Pod) {
		p.Labels, p.Annotations = map[string]string{"a": "b"}, map[string]string{"c": "d"}
		p.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "m"}}
		p.Spec.Containers = []corev1.Container{{Name: "c"}}
		p.DeletionTimestamp, p.ResourceVersion = &now, "7"
	})
	got, err := strip(full, attestor.Wants{})
	if err != nil {
		t.Fatal(err)
	}
	p := got.(*corev1.Pod)
	if p.Name != "web-1" || p.Namespace != "shop" || p.UID != "pod-uid" || p.Spec.NodeName != "node-1" || p.Status.Phase != corev1.PodRunning ||
		p.DeletionTimestamp == nil || p.ResourceVersion != "7" {
		t.Errorf("something that is used is gone: %+v", p)
	}
	if p.Labels != nil || p.Annotations != nil || p.ManagedFields != nil || p.Spec.Containers != nil {
		t.Errorf("something that is not used is kept: %+v", p)
	}
	for _, o := range []runtime.Object{&corev1.Node{}, &corev1.Namespace{}, &corev1.ServiceAccount{}} {
		o.(metav1.ObjectMetaAccessor).GetObjectMeta().SetLabels(map[string]string{"a": "b"})
		got, err := strip(o, attestor.Wants{})
		if err != nil || fmt.Sprintf("%T", got) != fmt.Sprintf("%T", o) || strings.Contains(fmt.Sprint(got), "a:b") {
			t.Errorf("%T: got %v, %v", o, got, err)
		}
	}
}
