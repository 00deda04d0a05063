package kube_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/test/kube"
)

func TestEvidence(t *testing.T) {
	inBothModes(t, func(t *testing.T, w *world) {
		pod := w.newPod("web-1", w.node)
		ev, err := w.attestor.Attest(t.Context(), w.token(pod, audience), audience)
		if err != nil {
			t.Fatal(err)
		}
		id := must(attestor.NewIdentity("prod", w.namespace, "web"))(t)
		want := attestor.Evidence{
			Proven: true, Identity: id, Method: "kubernetes/" + string(w.attestor.Status().Mode),
			ServiceAccountUID: string(w.account.UID), PodName: pod.Name, PodUID: string(pod.UID),
			NodeName: w.node.Name, NodeUID: string(w.node.UID),
			CredentialID: ev.CredentialID, IssuedAt: ev.IssuedAt, ExpiresAt: ev.ExpiresAt,
		}
		if ev != want {
			t.Errorf("got  %+v\nwant %+v", ev, want)
		}
		if len(ev.CredentialID) != 36 || strings.Contains(ev.CredentialID, "=") {
			t.Errorf("the credential id is no jti: %q", ev.CredentialID)
		}
		if life := ev.ExpiresAt.Sub(ev.IssuedAt); life != time.Hour {
			t.Errorf("the token's life: got %v, want 1h", life)
		}
		if err := w.attestor.Alive(t.Context(), ev); err != nil {
			t.Errorf("it was attested a moment ago: %v", err)
		}
	})
}

func TestTokensThatAreForSomethingElse(t *testing.T) {
	inBothModes(t, func(t *testing.T, w *world) {
		pod := w.newPod("web-1", w.node)
		for name, test := range map[string]struct {
			token attestor.Token
			want  refusal.Reason
		}{
			"an agent's audience":      {w.token(pod, "meshca-agent"), refusal.TokenAudience},
			"the API server's":         {w.token(pod, ""), refusal.TokenAudience},
			"a prefix of the audience": {w.token(pod, "mesh"), refusal.TokenAudience},
			"more than the audience":   {w.token(pod, "meshca2"), refusal.TokenAudience},
			"bound to nothing":         {w.token(nil, audience), refusal.TokenUnbound},
			"the right one":            {w.token(pod, audience), ""},
		} {
			if err := w.attest(test.token); refusal.Of(err) != test.want {
				t.Errorf("%s: got %v, want %q", name, err, test.want)
			}
		}
		if _, err := w.attestor.Attest(t.Context(), w.token(pod, audience), "meshca-agent"); refusal.Of(err) != refusal.TokenAudience {
			t.Errorf("a workload's token as an agent's: got %v", err)
		}
	})
}

func TestAlteredSignature(t *testing.T) {
	inBothModes(t, func(t *testing.T, w *world) {
		token := w.token(w.newPod("web-1", w.node), audience).Secret()
		head, signature, _ := cutLast(token, ".")
		altered := head + "." + strings.Repeat("A", len(signature))
		want := map[string]refusal.Reason{"jwks": refusal.TokenSignature, "tokenReview": refusal.TokenRejected}[string(w.attestor.Status().Mode)]
		ev, err := w.attestor.Attest(t.Context(), attestor.NewToken(altered), audience)
		if refusal.Of(err) != want {
			t.Errorf("got %v, want %s", err, want)
		}
		if ev.Proven {
			t.Error("evidence of an altered token counts as proven")
		}
		if strings.Contains(err.Error(), head) {
			t.Error("the refusal holds the token")
		}
	})
}

func TestWhatTheTokenStandsOnGoes(t *testing.T) {
	inBothModes(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		core := w.Clientset.CoreV1()

		deleted := w.newPod("deleted", w.node)
		token := w.token(deleted, audience)
		ev := must(w.attestor.Attest(ctx, token, audience))(t)
		if err := w.DeletePod(ctx, deleted, 0); err != nil {
			t.Fatal(err)
		}
		w.refused(token, refusal.PodGone)
		eventually(t, 10*time.Second, func() error {
			if err := w.attestor.Alive(ctx, ev); refusal.Of(err) != refusal.PodGone {
				return fmt.Errorf("alive: got %v, want POD_GONE", err)
			}
			return nil
		})
		again := w.newPod("deleted", w.node)
		w.refused(token, refusal.PodRecreated)
		if err := w.attest(w.token(again, audience)); err != nil {
			t.Errorf("the new pod's own token: %v", err)
		}

		finished := w.newPod("finished", w.node)
		token = w.token(finished, audience)
		if err := w.SetPodPhase(ctx, finished, corev1.PodSucceeded); err != nil {
			t.Fatal(err)
		}
		w.refused(token, refusal.PodFinished)

		terminating := w.newPod("terminating", w.node)
		token = w.token(terminating, audience)
		if err := w.DeletePod(ctx, terminating, 4*time.Second); err != nil {
			t.Fatal(err)
		}
		if err := w.attest(token); err != nil {
			t.Errorf("a pod that terminates still serves: %v", err)
		}
		w.refused(token, refusal.PodFinished) // nobody ends it here: its grace runs out

		second := w.newNode("second")
		elsewhere := w.newPod("elsewhere", second)
		token = w.token(elsewhere, audience)
		if ev := must(w.attestor.Attest(ctx, token, audience))(t); ev.NodeName != second.Name || ev.NodeUID != string(second.UID) {
			t.Errorf("a pod on %s (%s) is shown on %s (%s)", second.Name, second.UID, ev.NodeName, ev.NodeUID)
		}
		if err := core.Nodes().Delete(ctx, second.Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		w.refused(token, refusal.NodeGone)
		must(w.CreateNode(ctx, second.Name))(t)
		w.refused(token, refusal.NodeGone)

		token = w.token(again, audience)
		if err := core.ServiceAccounts(w.namespace).Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		w.refused(token, refusal.ServiceAccountGone)
		must(w.CreateServiceAccount(ctx, w.namespace, "web"))(t)
		w.refused(token, refusal.ServiceAccountGone)
		token = w.token(again, audience)
		if err := w.attest(token); err != nil {
			t.Errorf("a token of the new account: %v", err)
		}

		if err := core.Namespaces().Delete(ctx, w.namespace, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		w.refused(token, refusal.NamespaceGone)
	})
}

// A kubelet has a new pod's token before any watch has heard of the pod.
func TestNewPodOutrunsTheWatch(t *testing.T) {
	inBothModes(t, func(t *testing.T, w *world) {
		for i := range 30 {
			if err := w.attest(w.token(w.newPod(fmt.Sprintf("pod-%d", i), w.node), audience)); err != nil {
				t.Fatalf("pod %d: %v", i, err)
			}
		}
	})
}

// Another cluster with the same names, and the same issuer as most clusters have, is told apart by its keys.
func TestAnotherClustersToken(t *testing.T) {
	other := kube.Start(t)
	foreign := &world{Cluster: other, t: t, namespace: "same"}
	must(other.CreateNamespace(t.Context(), "same"))(t)
	must(other.CreateServiceAccount(t.Context(), "same", "web"))(t)
	node := must(other.CreateNode(t.Context(), "same"))(t)
	token := foreign.token(foreign.newPod("same", node), audience)

	must(shared.CreateNamespace(t.Context(), "same"))(t)
	must(shared.CreateServiceAccount(t.Context(), "same", "web"))(t)
	must(shared.CreateNode(t.Context(), "same"))(t)
	must(shared.CreatePod(t.Context(), "same", "same", "web", "same"))(t)
	inBothModes(t, func(t *testing.T, w *world) {
		want := map[string]refusal.Reason{"jwks": refusal.TokenKeyUnknown, "tokenReview": refusal.TokenRejected}[string(w.attestor.Status().Mode)]
		eventually(t, 10*time.Second, func() error { // just after a reading of keys the answer is "not yet"
			if err := w.attest(token); refusal.Of(err) != want {
				return fmt.Errorf("got %v, want %s", err, want)
			}
			return nil
		})
	})
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}
