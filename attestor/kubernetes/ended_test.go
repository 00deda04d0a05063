package kubernetes

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// holder is the evidence of a pod of the usual service account on the usual node.
func holder(pod, uid string) *attestor.Evidence {
	id, _ := attestor.NewIdentity("prod", "shop", "web")
	return &attestor.Evidence{Proven: true, Identity: id, ServiceAccountUID: "sa-uid", PodName: pod, PodUID: uid, NodeName: "node-1", NodeUID: "node-uid"}
}

// watching waits until every watch is open: what happens from now on they say themselves.
func (b *bench) watching(t *testing.T) {
	t.Helper()
	for k := range kinds {
		await(t, func() error {
			if b.server.count("watch "+k.String()) == 0 {
				return fmt.Errorf("no watch on %s", k)
			}
			return nil
		})
	}
}

// ends waits until the holder has ended, and returns why and how many live reads that took.
func (b *bench) ends(t *testing.T, held ...*attestor.Evidence) (map[int]*refusal.Error, int) {
	t.Helper()
	before := b.liveReads()
	var ended map[int]*refusal.Error
	await(t, func() error {
		if ended = b.Ended(t.Context(), held); len(ended) != len(held) {
			return fmt.Errorf("%d of %d have ended", len(ended), len(held))
		}
		return nil
	})
	return ended, b.liveReads() - before
}

func TestWhatEnds(t *testing.T) {
	now := time.Now()
	for what, c := range map[string]struct {
		do    func(b *bench)
		want  refusal.Reason
		reads int // at most: what the watch said of the very object takes none
	}{
		"pod deleted": {func(b *bench) { b.server.remove(pods, name{"shop", "web-1"}) }, refusal.PodGone, 0},
		"pod deleted and made anew": {func(b *bench) {
			b.server.remove(pods, name{"shop", "web-1"})
			b.server.put(pods, aPod(func(p *corev1.Pod) { p.UID = "another" }))
		}, refusal.PodRecreated, 0},
		"pod finished": {func(b *bench) { b.server.put(pods, aPod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })) }, refusal.PodFinished, 0},
		"pod's grace over": {func(b *bench) {
			b.server.put(pods, aPod(func(p *corev1.Pod) { p.DeletionTimestamp = deletedAt(now.Add(-time.Second)) }))
		}, refusal.PodFinished, 0},
		"account deleted": {func(b *bench) { b.server.remove(serviceAccounts, name{"shop", "web"}) }, refusal.ServiceAccountGone, 0},
		"account made anew": {func(b *bench) {
			b.server.remove(serviceAccounts, name{"shop", "web"})
			b.server.put(serviceAccounts, &corev1.ServiceAccount{ObjectMeta: meta("shop", "web", "another")})
		}, refusal.ServiceAccountGone, 0},
		"namespace terminating": {func(b *bench) {
			n := &corev1.Namespace{ObjectMeta: meta("", "shop", "ns-uid")}
			n.DeletionTimestamp = deletedAt(now)
			b.server.put(namespaces, n)
		}, refusal.NamespaceGone, 1},
		"namespace deleted": {func(b *bench) { b.server.remove(namespaces, name{"", "shop"}) }, refusal.NamespaceGone, 1},
		"node deleted":      {func(b *bench) { b.server.remove(nodes, name{"", "node-1"}) }, refusal.NodeGone, 0},
		"node made anew": {func(b *bench) {
			b.server.remove(nodes, name{"", "node-1"})
			b.server.put(nodes, &corev1.Node{ObjectMeta: meta("", "node-1", "another")})
		}, refusal.NodeGone, 0},
	} {
		t.Run(what, func(t *testing.T) {
			for _, mode := range []Mode{TokenReview, JWKS} {
				b := newBench(t, Config{Mode: mode})
				b.watching(t)
				web := holder("web-1", "pod-uid")
				if ended := b.Ended(t.Context(), []*attestor.Evidence{web}); len(ended) > 0 {
					t.Fatalf("%s: it has ended before: %v", mode, ended)
				}
				c.do(b)
				ended, reads := b.ends(t, web)
				// A look can come between the end of a pod and the next one of its name.
				wanted := func(got refusal.Reason) bool {
					return got == c.want || c.want == refusal.PodRecreated && got == refusal.PodGone
				}
				if !wanted(ended[0].Reason) || reads > c.reads {
					t.Errorf("%s: %v after %d reads, want %s after %d", mode, ended[0], reads, c.want, c.reads)
				}
				if mode == JWKS { // and a renewal is refused, by what is known
					if got := b.reason(t, usual(b.now()).rs256(t)); !wanted(got) {
						t.Errorf("a renewal: got %s", got)
					}
				}
			}
		})
	}
}

// A pod that terminates still serves, until its grace is over: nobody need say so then.
func TestATerminatingPodLives(t *testing.T) {
	b := newBench(t, Config{Mode: TokenReview})
	b.watching(t)
	b.server.put(pods, aPod(func(p *corev1.Pod) { p.DeletionTimestamp = deletedAt(time.Now().Add(time.Minute)) }))
	await(t, func() error {
		if o, _ := b.watched[pods].find(name{"shop", "web-1"}); o.deletion.IsZero() {
			return fmt.Errorf("the watch has not said it")
		}
		return nil
	})
	if ended := b.Ended(t.Context(), []*attestor.Evidence{holder("web-1", "pod-uid")}); len(ended) > 0 {
		t.Fatalf("it has ended: %v", ended)
	}
	b.clock.forward(time.Minute + time.Second)
	if ended := b.Ended(t.Context(), []*attestor.Evidence{holder("web-1", "pod-uid")}); ended[0] == nil || ended[0].Reason != refusal.PodFinished {
		t.Errorf("its grace is over: %v", ended)
	}
}

// Nothing dies because a watch does not know it, says nothing, or is not there; nor because the API server cannot be asked.
func TestNothingEndsForWantOfNews(t *testing.T) {
	web := []*attestor.Evidence{holder("web-1", "pod-uid"), holder("web-2", "pod-2")}
	ends := func(t *testing.T, b *bench, what string) {
		t.Helper()
		if ended := b.Ended(t.Context(), web); len(ended) > 0 {
			t.Errorf("%s: %v", what, ended)
		}
	}
	second := aPod(func(p *corev1.Pod) { p.Name, p.UID = "web-2", "pod-2" })
	t.Run("nothing was listed", func(t *testing.T) {
		f := newFakeServer(t)
		c, err := New(Config{Name: "prod", Kubeconfig: f.kubeconfig}, Deps{})
		if err != nil {
			t.Fatal(err)
		}
		ends(t, &bench{Cluster: c, server: f}, "without a watch") // the server has no object at all
	})
	t.Run("a watch that lags", func(t *testing.T) {
		b := newBench(t, Config{Mode: JWKS})
		b.watching(t)
		b.server.do(func() { b.server.mute[pods] = true })
		b.server.put(pods, second)
		ends(t, b, "a pod that the watch does not know")
		reads := b.liveReads()
		for range 5 {
			ends(t, b, "again")
		}
		if more := b.liveReads() - reads; more > 0 {
			t.Errorf("it was read %d times more, within seconds", more)
		}
		b.clock.forward(wellFor)
		ends(t, b, "later")
		if more := b.liveReads() - reads; more != 1 {
			t.Errorf("later it was read %d times, want once", more)
		}
	})
	t.Run("an API server that is away", func(t *testing.T) {
		b := newBench(t, Config{Mode: TokenReview})
		b.watching(t)
		b.server.do(func() { b.server.mute[pods] = true })
		b.server.put(pods, second)
		b.server.do(func() {
			b.server.wrong = func(w http.ResponseWriter, r *http.Request) bool {
				w.WriteHeader(http.StatusInternalServerError)
				return true
			}
		})
		ends(t, b, "it answers with a fault")
		b.server.do(func() {
			b.server.wrong = func(w http.ResponseWriter, r *http.Request) bool { http.NotFound(w, r); return true }
		})
		ends(t, b, "something else answers: not found")
		b.server.do(func() { b.server.wrong = nil })
		ends(t, b, "it is back")
		b.server.remove(pods, name{"shop", "web-2"}) // and no watch says so
		b.clock.forward(wellFor)
		ended, reads := b.ends(t, web[1])
		if ended[0].Reason != refusal.PodGone || reads != 1 {
			t.Errorf("%v after %d reads", ended, reads)
		}
	})
	t.Run("liveness none", func(t *testing.T) {
		c, err := New(Config{Name: "prod", Mode: JWKS, Liveness: LivenessNone, Issuer: "i", Keys: KeysConfig{File: "/none"}}, Deps{})
		if err != nil {
			t.Fatal(err)
		}
		ends(t, &bench{Cluster: c}, "nobody can be asked")
	})
}

// A namespace of a thousand pods goes at once, by a question or two.
func TestANamespaceEndsAtOnce(t *testing.T) {
	b := newBench(t, Config{Mode: TokenReview})
	b.watching(t)
	var all []*attestor.Evidence
	for i := range 1000 {
		p := aPod(func(p *corev1.Pod) { p.Name = fmt.Sprint("web-", i); p.UID = types.UID(p.Name) })
		b.server.put(pods, p)
		all = append(all, holder(p.Name, p.Name))
	}
	await(t, func() error {
		if o, found := b.watched[pods].find(name{"shop", "web-999"}); !found {
			return fmt.Errorf("not all are known: %v", o)
		}
		return nil
	})
	n := &corev1.Namespace{ObjectMeta: meta("", "shop", "ns-uid")}
	n.DeletionTimestamp = deletedAt(time.Now())
	b.server.put(namespaces, n)
	if _, reads := b.ends(t, all...); reads > 2 { // a look can meet the news half-way
		t.Errorf("%d reads", reads)
	}
}

func TestBurials(t *testing.T) {
	var b burials
	now := time.Now()
	if b.has("") || b.has("x") {
		t.Error("an empty one has something")
	}
	b.add("x", now)
	b.add("y", now.Add(buriedFor))
	if b.add("z", now.Add(buriedFor+1)); !b.has("x") || !b.has("y") || !b.has("z") {
		t.Error("forgotten too soon")
	}
	if b.add("a", now.Add(2*buriedFor+2)); b.has("x") || b.has("y") || !b.has("z") {
		t.Error("never forgotten, or too soon")
	}
	for i := range maxBuried + 5 {
		b.add(fmt.Sprint(i), now.Add(2*buriedFor+2))
	}
	if len(b.young) != maxBuried {
		t.Errorf("%d are remembered", len(b.young))
	}
}

// BenchmarkEnded is one look at ten thousand that live.
func BenchmarkEnded(b *testing.B) {
	c := &Cluster{settings: settings{name: "prod"}, now: time.Now}
	for k := range kinds {
		c.watched = append(c.watched, &mirror{kind: k, objects: map[name]object{}})
	}
	c.watched[namespaces].objects[name{"", "shop"}] = object{uid: "ns-uid"}
	c.watched[serviceAccounts].objects[name{"shop", "web"}] = object{uid: "sa-uid"}
	c.watched[nodes].objects[name{"", "node-1"}] = object{uid: "node-uid"}
	var all []*attestor.Evidence
	for i := range 10_000 {
		n := fmt.Sprintf("web-%08d-abcde", i)
		c.watched[pods].objects[name{"shop", n}] = object{uid: n, node: "node-1"}
		all = append(all, holder(n, n))
	}
	for b.Loop() {
		if ended := c.Ended(b.Context(), all); len(ended) > 0 {
			b.Fatal(ended)
		}
	}
}
