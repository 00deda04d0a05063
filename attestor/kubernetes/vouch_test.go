package kubernetes

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

var made = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func accountMade(at time.Time, uid string) *corev1.ServiceAccount {
	sa := &corev1.ServiceAccount{ObjectMeta: meta("shop", "web", uid)}
	sa.CreationTimestamp = metav1.NewTime(at)
	return sa
}

func vouchable(change func(*corev1.Pod)) *corev1.Pod {
	return aPod(func(p *corev1.Pod) {
		p.Spec.ServiceAccountName, p.CreationTimestamp = "web", metav1.NewTime(made)
		if change != nil {
			change(p)
		}
	})
}

func TestVouch(t *testing.T) {
	web := attestor.PodRef{Namespace: "shop", Name: "web-1", UID: "pod-uid"}
	for _, mode := range []Mode{TokenReview, JWKS} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t, Config{Mode: mode})
			b.server.put(serviceAccounts, accountMade(made, "sa-uid"))
			b.server.put(pods, vouchable(nil))
			b.Want(attestor.Wants{PodLabels: true})
			id, _ := attestor.NewIdentity("prod", "shop", "web")
			want := attestor.Evidence{
				Proven: true, Vouched: true, Identity: id, Method: "kubernetes/nodeVouched", ServiceAccountUID: "sa-uid", PodName: "web-1", PodUID: "pod-uid", NodeName: "node-1", NodeUID: "node-uid",
			}
			ev, err := b.Vouch(t.Context(), web)
			facts := ev.Facts
			ev.Facts = nil
			if err != nil || ev != want || facts == nil || facts.PodLabels == nil {
				t.Fatalf("got  %+v, %+v, %v\nwant %+v", ev, facts, err, want)
			}
			if err := b.Alive(t.Context(), ev); err != nil {
				t.Errorf("what was vouched for is not alive: %v", err)
			}
			if mode == JWKS {
				await(t, func() error { // the watches know it all by now or soon
					before := b.liveReads()
					if _, err := b.Vouch(t.Context(), web); err != nil {
						t.Fatal(err)
					}
					if n := b.liveReads() - before; n > 0 {
						return fmt.Errorf("%d reads", n)
					}
					return nil
				})
			}
			for name, c := range map[string]struct {
				pod  attestor.PodRef
				want refusal.Reason
			}{
				"another UID":             {attestor.PodRef{Namespace: "shop", Name: "web-1", UID: "pod-uid-of-old"}, refusal.PodRecreated},
				"no such pod":             {attestor.PodRef{Namespace: "shop", Name: "web-9", UID: "pod-uid"}, refusal.PodGone},
				"another namespace":       {attestor.PodRef{Namespace: "bank", Name: "web-1", UID: "pod-uid"}, refusal.PodGone},
				"no UID":                  {attestor.PodRef{Namespace: "shop", Name: "web-1"}, refusal.RequestMalformed},
				"no name":                 {attestor.PodRef{Namespace: "shop", UID: "pod-uid"}, refusal.RequestMalformed},
				"a name that is a path":   {attestor.PodRef{Namespace: "shop", Name: "../secrets/x", UID: "pod-uid"}, refusal.RequestMalformed},
				"a namespace of a path":   {attestor.PodRef{Namespace: "shop/../bank", Name: "web-1", UID: "pod-uid"}, refusal.RequestMalformed},
				"a name of a megabyte":    {attestor.PodRef{Namespace: "shop", Name: strings.Repeat("a", 1<<20), UID: "pod-uid"}, refusal.RequestMalformed},
				"a UID of control bytes":  {attestor.PodRef{Namespace: "shop", Name: "web-1", UID: "\x00"}, refusal.RequestMalformed},
				"a UID that is the empty": {attestor.PodRef{Namespace: "shop", Name: "web-1", UID: " "}, refusal.RequestMalformed},
			} {
				ev, err := b.Vouch(t.Context(), c.pod)
				if refusal.Of(err) != c.want || ev.Proven || !ev.Identity.IsZero() || len(fmt.Sprint(err)) > 2000 {
					t.Errorf("%s: %+v, %.300v; want %s", name, ev, err, c.want)
				}
			}
		})
	}
}

func TestVouchForWhatDoesNotLive(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*fakeServer)
		want   refusal.Reason
	}{
		"a finished pod":                  {func(f *fakeServer) { f.put(pods, vouchable(func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed })) }, refusal.PodFinished},
		"a pod on no node":                {func(f *fakeServer) { f.put(pods, vouchable(func(p *corev1.Pod) { p.Spec.NodeName = "" })) }, refusal.NodeUnknown},
		"a pod on a node that is gone":    {func(f *fakeServer) { f.remove(nodes, name1("node-1")) }, refusal.NodeGone},
		"a pod without an account":        {func(f *fakeServer) { f.put(pods, vouchable(func(p *corev1.Pod) { p.Spec.ServiceAccountName = "" })) }, refusal.ServiceAccountGone},
		"an account that is gone":         {func(f *fakeServer) { f.remove(serviceAccounts, name{"shop", "web"}) }, refusal.ServiceAccountGone},
		"an account made after the pod":   {func(f *fakeServer) { f.put(serviceAccounts, accountMade(made.Add(time.Second), "sa-2")) }, refusal.ServiceAccountGone},
		"a namespace that is terminating": {func(f *fakeServer) { f.put(namespaces, terminating()) }, refusal.NamespaceGone},
	} {
		for _, mode := range []Mode{TokenReview, JWKS} {
			b := newBench(t, Config{Mode: mode})
			b.server.put(serviceAccounts, accountMade(made, "sa-uid"))
			b.server.put(pods, vouchable(nil))
			c.change(b.server)
			await(t, func() error {
				ev, err := b.Vouch(t.Context(), attestor.PodRef{Namespace: "shop", Name: "web-1", UID: "pod-uid"})
				if refusal.Of(err) != c.want || ev.Proven {
					return fmt.Errorf("%s, %s: %+v, %v; want %s", mode, name, ev, err, c.want)
				}
				return nil
			})
		}
	}
}

func name1(n string) name { return name{"", n} }

func terminating() *corev1.Namespace {
	n := &corev1.Namespace{ObjectMeta: meta("", "shop", "ns-uid")}
	n.DeletionTimestamp = deletedAt(time.Now())
	return n
}

// Strangers' tokens take the strangers' part of the calls; agents' workloads keep theirs.
func TestDirectTokensAreStrangers(t *testing.T) {
	b := newBench(t, Config{Mode: TokenReview, MaxCalls: 4, CallTimeout: metav1.Duration{Duration: 300 * time.Millisecond}})
	token := usual(b.now()).rs256(t)
	if ev, err := b.AttestDirect(t.Context(), token); err != nil || ev.Identity.ServiceAccount() != "web" {
		t.Fatalf("%+v, %v", ev, err)
	}
	leave, err := b.api.enter(t.Context(), laneStrangers) // the one place that strangers have of four
	if err != nil {
		t.Fatal(err)
	}
	defer leave()
	if _, err := b.AttestDirect(t.Context(), token); refusal.Of(err) != refusal.Overloaded {
		t.Errorf("a second stranger: %v, want OVERLOADED", err)
	}
	if _, err := b.Attest(t.Context(), token, attestor.WorkloadAudience); err != nil {
		t.Errorf("an agent's workload: %v", err)
	}
}

// An agent that looks at a process finds a UID and no name. The watch knows it; what the watch does not know yet is listed
// after it was asked for, so that a new pod is never taken for none, and for all who ask meanwhile at once.
func TestVouchByUID(t *testing.T) {
	for _, mode := range []Mode{TokenReview, JWKS} {
		b := newBench(t, Config{Mode: mode})
		b.server.put(serviceAccounts, accountMade(made, "sa-uid"))
		b.server.put(pods, vouchable(nil))
		b.watching(t)
		ref := attestor.PodRef{UID: "pod-uid", Node: "node-1"}
		by := func(ref attestor.PodRef) (attestor.Evidence, refusal.Reason) {
			t.Helper()
			ev, err := b.Vouch(t.Context(), ref)
			if err != nil && ev.Proven {
				t.Errorf("%s: refused, and proven", mode)
			}
			return ev, refusal.Of(err)
		}
		listed := b.server.count("list pods")
		await(t, func() error {
			if ev, no := by(ref); no != "" || !ev.Proven || ev.PodName != "web-1" || ev.Identity.Namespace() != "shop" || ev.Identity.ServiceAccount() != "web" || ev.NodeUID != "node-uid" {
				return fmt.Errorf("%s: %+v, %s", mode, ev, no)
			}
			return nil
		})
		if more := b.server.count("list pods") - listed; more > 1 {
			t.Errorf("%s: what the watch knows took %d lists", mode, more)
		}
		b.server.do(func() { b.server.mute[pods] = true })
		b.server.put(pods, vouchable(func(p *corev1.Pod) { p.Name, p.UID = "web-2", "pod-2" }))
		b.server.put(pods, vouchable(func(p *corev1.Pod) { p.Name, p.UID, p.Spec.NodeName = "web-3", "pod-3", "node-9" }))
		if ev, no := by(attestor.PodRef{UID: "pod-2", Node: "node-1"}); no != "" || ev.PodName != "web-2" {
			t.Errorf("%s: a new pod: %+v, %s", mode, ev, no)
		}
		for name, c := range map[string]struct {
			ref  attestor.PodRef
			want refusal.Reason
		}{
			"no such pod":             {attestor.PodRef{UID: "pod-9", Node: "node-1"}, refusal.PodGone},
			"a pod elsewhere":         {attestor.PodRef{UID: "pod-3", Node: "node-1"}, refusal.PodGone},
			"no UID":                  {attestor.PodRef{Node: "node-1"}, refusal.RequestMalformed},
			"a UID of control bytes":  {attestor.PodRef{UID: "\x00", Node: "node-1"}, refusal.RequestMalformed},
			"a name without the rest": {attestor.PodRef{Name: "web-1", UID: "pod-uid", Node: "node-1"}, refusal.RequestMalformed},
			"a node of a selector":    {attestor.PodRef{UID: "pod-9", Node: "node-1,metadata.name=x"}, refusal.NodeUnknown},
			"no node":                 {attestor.PodRef{UID: "pod-9"}, refusal.NodeUnknown},
		} {
			if _, no := by(c.ref); no != c.want {
				t.Errorf("%s: %s: got %q, want %q", mode, name, no, c.want)
			}
		}
		for i := range 3 { // a list of a moment ago is no word against a pod that came since
			uid := fmt.Sprint("young-", i)
			b.server.put(pods, vouchable(func(p *corev1.Pod) { p.Name, p.UID = uid, types.UID(uid) }))
			if ev, no := by(attestor.PodRef{UID: uid, Node: "node-1"}); no != "" || ev.PodName != uid {
				t.Errorf("%s: a young pod: %+v, %s", mode, ev, no)
			}
		}
		listed = b.server.count("list pods")
		began := time.Now()
		var all sync.WaitGroup
		for i := range 200 { // a list each would be the API server's trouble
			all.Go(func() { by(attestor.PodRef{UID: fmt.Sprint("none-", i), Node: "node-1"}) })
		}
		all.Wait()
		if more, most := b.server.count("list pods")-listed, 2+int(time.Since(began)/listEvery); more > most {
			t.Errorf("%s: %d lists within %v", mode, more, time.Since(began))
		}
		b.server.do(func() { clear(b.server.mute) })
		b.server.remove(pods, name{"shop", "web-1"})
		await(t, func() error {
			if _, no := by(ref); no != refusal.PodGone {
				return fmt.Errorf("%s: a deleted pod: %q", mode, no)
			}
			return nil
		})
	}
}
