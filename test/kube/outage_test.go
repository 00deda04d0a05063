package kube_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/test/kube"
	"github.com/meshca/meshca/test/parts"
)

// documented are the rights that the documentation gives to the CA's account; nothing more is given to it here. The first
// is for token reviews, the last for keys.
func documented(t *testing.T) []rbacv1.PolicyRule {
	t.Helper()
	root := must(parts.Root())(t)
	text := must(os.ReadFile(filepath.Join(root, "docs", "examples", "kubernetes-rights.yaml")))(t)
	role, _, _ := strings.Cut(string(text), "\n---\n")
	var r rbacv1.ClusterRole
	if err := yaml.UnmarshalStrict([]byte(role), &r); err != nil {
		t.Fatal(err)
	}
	if r.Kind != "ClusterRole" || len(r.Rules) != 3 {
		t.Fatalf("a %s with %d rules", r.Kind, len(r.Rules))
	}
	return r.Rules
}

func TestRightsAreEnoughAndEachIsNeeded(t *testing.T) {
	rights := documented(t)
	enough := must(shared.KubeconfigFor("meshca"))(t)
	if err := shared.Allow(t.Context(), "meshca", rights...); err != nil {
		t.Fatal(err)
	}
	few := must(shared.KubeconfigFor("few"))(t)
	if err := shared.Allow(t.Context(), "few", rights[0], rights[2]); err != nil {
		t.Fatal(err)
	}
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			w := newWorld(t, shared, kubernetes.Config{Name: "prod", Mode: mode, Kubeconfig: enough})
			token := w.token(w.newPod("web-1", w.node), audience)
			if err := w.attest(token); err != nil {
				t.Errorf("with the rights that the documentation names: %v", err)
			}
			poor := must(kubernetes.New(kubernetes.Config{Name: "prod", Mode: mode, Kubeconfig: few}, kubernetes.Deps{}))(t)
			if _, err := poor.Attest(t.Context(), token, audience); refusal.Of(err) != refusal.KubernetesForbidden {
				t.Errorf("without the right to read pods: got %v, want KUBERNETES_FORBIDDEN", err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() { defer close(ended); _ = poor.Run(ctx) }()
			defer func() { cancel(); <-ended }()
			eventually(t, 10*time.Second, func() error {
				if err := poor.Ready(); refusal.Of(err) != refusal.KubernetesForbidden {
					return fmt.Errorf("ready: got %v, want KUBERNETES_FORBIDDEN", err)
				}
				return nil
			})
		})
	}
}

func TestServerGoneAndBack(t *testing.T) {
	c := kube.Start(t)
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			w := newWorld(t, c, kubernetes.Config{Name: "prod", Mode: mode, Kubeconfig: c.Kubeconfig})
			pod := w.newPod("web-1", w.node)
			token := w.token(pod, audience)
			ev := must(w.attestor.Attest(t.Context(), token, audience))(t)
			if mode == kubernetes.JWKS {
				w.untilWatched(token)
			}
			c.Stop()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			_, err := w.attestor.Attest(ctx, token, audience)
			switch want := refusal.KubernetesUnavailable; {
			case mode == kubernetes.TokenReview && refusal.Of(err) != want:
				t.Errorf("with the API server gone: got %v, want %s", err, want)
			case mode == kubernetes.JWKS && err != nil:
				t.Errorf("a known pod's token can be verified with the API server gone, got %v", err)
			}
			if err := w.attestor.Alive(ctx, ev); mode == kubernetes.JWKS && err != nil {
				t.Errorf("alive: %v", err)
			}
			start := time.Now()
			if err := c.StartAgain(t.Context()); err != nil {
				t.Fatal(err)
			}
			eventually(t, 90*time.Second, func() error { return w.attest(token) })
			eventually(t, 90*time.Second, w.attestor.Ready)
			t.Logf("well again %v after the API server was started", time.Since(start).Round(time.Millisecond))
			if err := w.attest(w.token(w.newPod("web-2", w.node), audience)); err != nil {
				t.Errorf("a new pod after the outage: %v", err)
			}
			if err := c.DeletePod(t.Context(), pod, 0); err != nil {
				t.Fatal(err)
			}
			eventually(t, 60*time.Second, func() error {
				if err := w.attest(token); refusal.Of(err) != refusal.PodGone {
					return fmt.Errorf("a pod deleted after the outage: got %v, want POD_GONE", err)
				}
				return nil
			})
		})
	}
}

// A server that accepts and says nothing must not hold anybody for long.
func TestServerThatHangs(t *testing.T) {
	c := kube.Start(t)
	for _, mode := range modes {
		t.Run(string(mode), func(t *testing.T) {
			cfg := kubernetes.Config{Name: "prod", Mode: mode, Kubeconfig: c.Kubeconfig}
			cfg.CallTimeout.Duration = time.Second
			w := newWorld(t, c, cfg)
			token := w.token(w.newPod("web-1", w.node), audience)
			if mode == kubernetes.JWKS { // another attestor that has not heard of the pod, nor will
				w.attestor = must(kubernetes.New(cfg, kubernetes.Deps{}))(t)
				if err := w.attest(token); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.Freeze(); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			err := w.attest(token)
			took := time.Since(start)
			if err := c.Thaw(); err != nil {
				t.Fatal(err)
			}
			if refusal.Of(err) != refusal.KubernetesUnavailable || took > 3*time.Second {
				t.Errorf("got %v after %v, want KUBERNETES_UNAVAILABLE within 3s", err, took)
			}
			eventually(t, 30*time.Second, func() error { return w.attest(token) })
		})
	}
}

func TestStatus(t *testing.T) {
	inBothModes(t, func(t *testing.T, w *world) {
		s := w.attestor.Status()
		if !s.Healthy || s.LastError != "" {
			t.Errorf("it is ready, but not healthy: %q", s.LastError)
		}
		if s.SkewMeasured.IsZero() || s.ClockSkew != 0 {
			t.Errorf("the clock of the same machine: skew %v, measured %v", s.ClockSkew, s.SkewMeasured)
		}
		if s.Mode == kubernetes.JWKS && (len(s.KeyIDs) != 1 || s.Issuer != kube.Issuer) {
			t.Errorf("keys %v of issuer %q", s.KeyIDs, s.Issuer)
		}
	})
}
