package kubernetes

import (
	"fmt"
	"maps"
	"net/http"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

var everything = attestor.Wants{PodLabels: true, PodAnnotations: true, NamespaceLabels: true}

func labelled(labels, annotations map[string]string) *corev1.Pod {
	return aPod(func(p *corev1.Pod) { p.Labels, p.Annotations = labels, annotations })
}

func (b *bench) facts(t *testing.T) *attestor.Facts {
	t.Helper()
	ev, err := b.Attest(t.Context(), usual(b.now()).rs256(t), attestor.WorkloadAudience)
	if err != nil {
		t.Fatal(err)
	}
	return ev.Facts
}

// Labels and annotations come with an identity where they are wanted, in either mode, from the first moment on.
func TestFacts(t *testing.T) {
	for _, mode := range []Mode{TokenReview, JWKS} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t, Config{Mode: mode})
			b.server.put(pods, labelled(map[string]string{"app": "web"}, map[string]string{"team": "a"}))
			b.server.put(namespaces, func() *corev1.Namespace {
				n := &corev1.Namespace{ObjectMeta: meta("", "shop", "ns-uid")}
				n.Labels = map[string]string{"env": "live"}
				return n
			}())
			if f := b.facts(t); f != nil {
				t.Fatalf("nobody wants them: got %+v", f)
			}
			b.Want(everything)
			// The watches do not have them yet, or have them just now: either way they are there, and never empty for that.
			for range 20 {
				f := b.facts(t)
				if f == nil || !maps.Equal(f.PodLabels, map[string]string{"app": "web"}) || !maps.Equal(f.PodAnnotations, map[string]string{"team": "a"}) ||
					!maps.Equal(f.NamespaceLabels, map[string]string{"env": "live"}) || f.TooLarge != (attestor.Wants{}) {
					t.Fatalf("got %+v", f)
				}
			}
			b.Want(attestor.Wants{PodLabels: true})
			if f := b.facts(t); f == nil || f.PodLabels == nil || f.PodAnnotations != nil || f.NamespaceLabels != nil {
				t.Errorf("labels alone: got %+v", f)
			}
			// An agent's own evidence needs none.
			ev, err := b.Attest(t.Context(), usual(b.now()).with(body{"aud": "meshca-agent"}).rs256(t), attestor.AgentAudience)
			if err != nil || ev.Facts != nil {
				t.Errorf("an agent's: %+v, %v", ev.Facts, err)
			}
		})
	}
}

// The watch lists anew for what is wanted newly, and then has it without a call.
func TestTheWatchGathersWhatIsWantedNewly(t *testing.T) {
	b := newBench(t, Config{Mode: JWKS})
	b.server.put(pods, labelled(map[string]string{"app": "web"}, nil))
	b.Want(attestor.Wants{PodLabels: true})
	await(t, func() error {
		before := b.liveReads()
		if f := b.facts(t); f.PodLabels["app"] != "web" {
			t.Fatalf("got %+v", f)
		}
		if n := b.liveReads() - before; n > 0 {
			return fmt.Errorf("%d reads", n)
		}
		return nil
	})
	if n := b.server.count("list nodes"); n != 1 {
		t.Errorf("nodes, of which nothing is wanted, were listed %d times", n)
	}
	await(t, func() error {
		if b.server.count("watch pods") < 2 {
			return fmt.Errorf("pods are not watched again")
		}
		return nil
	})
	b.server.put(pods, labelled(map[string]string{"app": "other"}, nil))
	await(t, func() error {
		if f := b.facts(t); f.PodLabels["app"] != "other" {
			return fmt.Errorf("got %+v", f)
		}
		return nil
	})
	b.server.put(pods, labelled(nil, nil))
	await(t, func() error {
		if f := b.facts(t); f.PodLabels == nil || len(f.PodLabels) != 0 {
			return fmt.Errorf("a pod without labels: got %+v", f)
		}
		return nil
	})
}

// A pod that cannot be read has no facts, and is not attested: it does not count as one without labels.
func TestFactsThatCannotBeRead(t *testing.T) {
	for _, mode := range []Mode{TokenReview, JWKS} {
		b := newBench(t, Config{Mode: mode})
		fail := func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasPrefix(r.URL.Path, "/api/v1") {
				return false
			}
			w.WriteHeader(http.StatusInternalServerError)
			return true
		}
		b.server.do(func() { b.server.wrong = fail })
		b.Want(everything)
		ev, err := b.Attest(t.Context(), usual(b.now()).rs256(t), attestor.WorkloadAudience)
		if refusal.Of(err) != refusal.KubernetesUnavailable {
			t.Errorf("%s: %+v, %v", mode, ev, err)
		}
		b.server.do(func() { b.server.wrong = nil })
	}
}

func TestFactsTooLarge(t *testing.T) {
	many := map[string]string{}
	for i := range attestor.MaxEntries + 1 {
		many[fmt.Sprintf("k%d", i)] = ""
	}
	long := map[string]string{"k": strings.Repeat("x", attestor.MaxEntryBytes)}
	for _, mode := range []Mode{TokenReview, JWKS} {
		b := newBench(t, Config{Mode: mode})
		b.Want(everything)
		b.server.put(pods, labelled(many, long))
		await(t, func() error {
			f := b.facts(t)
			if f.PodLabels != nil || f.PodAnnotations != nil || f.TooLarge != (attestor.Wants{PodLabels: true, PodAnnotations: true}) {
				return fmt.Errorf("%s: got %d labels, %d annotations, too large %+v", mode, len(f.PodLabels), len(f.PodAnnotations), f.TooLarge)
			}
			return nil
		})
	}
}
