package kubernetes

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

func claimed(change func(*attestor.Evidence)) attestor.Evidence {
	id, _ := attestor.NewIdentity("prod", "shop", "web")
	ev := attestor.Evidence{
		Identity: id, Method: attestor.MethodPodCertificate, ServiceAccountUID: "sa-uid",
		PodName: "web-1", PodUID: "pod-uid", NodeName: "node-1", NodeUID: "node-uid",
	}
	if change != nil {
		change(&ev)
	}
	return ev
}

func TestConfirm(t *testing.T) {
	for _, mode := range []Mode{TokenReview, JWKS} {
		t.Run(string(mode), func(t *testing.T) {
			b := newBench(t, Config{Mode: mode})
			b.server.put(serviceAccounts, accountMade(made, "sa-uid"))
			b.server.put(pods, vouchable(nil))
			b.Want(attestor.Wants{PodLabels: true})
			want := claimed(func(ev *attestor.Evidence) { ev.Proven = true })
			got, err := b.Confirm(t.Context(), claimed(func(ev *attestor.Evidence) { ev.Vouched = true }))
			facts := got.Facts
			got.Facts = nil
			if err != nil || got != want || facts == nil || facts.PodLabels == nil {
				t.Fatalf("got  %+v, %+v, %v\nwant %+v", got, facts, err, want)
			}
			if mode == JWKS {
				await(t, func() error { // the watches know it all by now or soon
					before := b.liveReads()
					if _, err := b.Confirm(t.Context(), claimed(nil)); err != nil {
						t.Fatal(err)
					}
					if n := b.liveReads() - before; n > 0 {
						return fmt.Errorf("%d reads", n)
					}
					return nil
				})
			}
			identity := func(cluster, ns, sa string) func(*attestor.Evidence) {
				return func(ev *attestor.Evidence) { ev.Identity, _ = attestor.NewIdentity(cluster, ns, sa) }
			}
			for name, c := range map[string]struct {
				change func(*attestor.Evidence)
				want   refusal.Reason
			}{
				"another's account":         {identity("prod", "shop", "admin"), refusal.ClaimUntrue},
				"an account made again":     {func(ev *attestor.Evidence) { ev.ServiceAccountUID = "sa-uid-of-old" }, refusal.ServiceAccountGone},
				"another namespace":         {identity("prod", "bank", "web"), refusal.PodGone},
				"another cluster":           {identity("lab", "shop", "web"), refusal.ClusterMismatch},
				"a pod made again":          {func(ev *attestor.Evidence) { ev.PodUID = "pod-uid-of-old" }, refusal.PodRecreated},
				"no such pod":               {func(ev *attestor.Evidence) { ev.PodName = "web-9" }, refusal.PodGone},
				"another node":              {func(ev *attestor.Evidence) { ev.NodeName = "node-2" }, refusal.PodNotOnNode},
				"a node made again":         {func(ev *attestor.Evidence) { ev.NodeUID = "node-uid-of-old" }, refusal.NodeGone},
				"no identity":               {func(ev *attestor.Evidence) { ev.Identity = attestor.Identity{} }, refusal.RequestMalformed},
				"no account's UID":          {func(ev *attestor.Evidence) { ev.ServiceAccountUID = "" }, refusal.RequestMalformed},
				"no pod's UID":              {func(ev *attestor.Evidence) { ev.PodUID = "" }, refusal.RequestMalformed},
				"no node":                   {func(ev *attestor.Evidence) { ev.NodeName = "" }, refusal.RequestMalformed},
				"no node's UID":             {func(ev *attestor.Evidence) { ev.NodeUID = "" }, refusal.RequestMalformed},
				"a pod's name that is none": {func(ev *attestor.Evidence) { ev.PodName = "../x" }, refusal.RequestMalformed},
				"a UID of control bytes":    {func(ev *attestor.Evidence) { ev.PodUID = "\x00" }, refusal.RequestMalformed},
			} {
				ev, err := b.Confirm(t.Context(), claimed(func(ev *attestor.Evidence) { ev.Proven = true; c.change(ev) }))
				if refusal.Of(err) != c.want || ev.Proven {
					t.Errorf("%s: %+v, %v; want %s", name, ev, err, c.want)
				}
			}
		})
	}
}

// A watch that is behind refuses nobody: what it does not bear out is read live.
func TestConfirmWhatTheWatchDoesNotKnowYet(t *testing.T) {
	b := newBench(t, Config{Mode: JWKS})
	b.server.put(serviceAccounts, accountMade(made, "sa-uid"))
	b.server.put(pods, vouchable(nil))
	await(t, func() error { _, err := b.Confirm(t.Context(), claimed(nil)); return err })
	for range 20 { // made again, and asked for before the watches can have told
		b.server.put(serviceAccounts, accountMade(made, "sa-2"))
		b.server.put(pods, vouchable(func(p *corev1.Pod) { p.UID = "pod-2" }))
		_, err := b.Confirm(t.Context(), claimed(func(ev *attestor.Evidence) { ev.ServiceAccountUID, ev.PodUID = "sa-2", "pod-2" }))
		if err != nil {
			t.Fatal(err)
		}
		b.server.put(serviceAccounts, accountMade(made, "sa-uid"))
		b.server.put(pods, vouchable(nil))
		if _, err := b.Confirm(t.Context(), claimed(nil)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestConfirmWithoutLiveness(t *testing.T) {
	c := &Cluster{settings: settings{name: "prod"}}
	if ev, err := c.Confirm(t.Context(), claimed(nil)); refusal.Of(err) != refusal.KubernetesForbidden || ev.Proven {
		t.Errorf("%+v, %v", ev, err)
	}
}
