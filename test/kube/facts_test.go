package kube_test

import (
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// Labels and annotations of real objects come with an identity as soon as they are wanted, and follow their changes.
func TestFacts(t *testing.T) {
	inBothModes(t, func(t *testing.T, w *world) {
		pod := w.newPod("web-1", w.node)
		token := w.token(pod, audience)
		label := func(value string) {
			t.Helper()
			p := must(w.Clientset.CoreV1().Pods(w.namespace).Get(t.Context(), pod.Name, metav1.GetOptions{}))(t)
			p.Labels, p.Annotations = map[string]string{"tier": value}, map[string]string{"note": "n-" + value}
			must(w.Clientset.CoreV1().Pods(w.namespace).Update(t.Context(), p, metav1.UpdateOptions{}))(t)
		}
		w.attestor.Want(attestor.Wants{PodLabels: true, PodAnnotations: true, NamespaceLabels: true})
		for _, value := range []string{"gold", "tin"} {
			label(value)
			eventually(t, 20*time.Second, func() error {
				ev := must(w.attestor.Attest(t.Context(), token, audience))(t)
				f := ev.Facts
				if f == nil || f.PodLabels["tier"] != value || f.PodAnnotations["note"] != "n-"+value || f.NamespaceLabels["kubernetes.io/metadata.name"] != w.namespace {
					return fmt.Errorf("got %+v", f)
				}
				return nil
			})
		}
	})
}

// A pod is vouched for by what the API server knows of it, without a token.
func TestVouch(t *testing.T) {
	inBothModes(t, func(t *testing.T, w *world) {
		pod := w.newPod("web-1", w.node)
		ref := attestor.PodRef{Namespace: w.namespace, Name: pod.Name, UID: string(pod.UID)}
		ev := must(w.attestor.Vouch(t.Context(), ref))(t)
		if !ev.Proven || !ev.Vouched || ev.Identity.ServiceAccount() != "web" || ev.ServiceAccountUID != string(w.account.UID) ||
			ev.NodeName != w.node.Name || ev.NodeUID != string(w.node.UID) || ev.PodUID != string(pod.UID) {
			t.Errorf("got %+v", ev)
		}
		if _, err := w.attestor.Vouch(t.Context(), attestor.PodRef{Namespace: w.namespace, Name: pod.Name, UID: "another"}); refusal.Of(err) != refusal.PodRecreated {
			t.Errorf("another UID: %v", err)
		}
		// By its UID alone, also before any watch has heard of it, and on its own node alone.
		for i := range 10 {
			young := w.newPod(fmt.Sprintf("young-%d", i), w.node)
			ev := must(w.attestor.Vouch(t.Context(), attestor.PodRef{UID: string(young.UID), Node: w.node.Name}))(t)
			if ev.PodName != young.Name || ev.Identity.Namespace() != w.namespace || ev.NodeUID != string(w.node.UID) {
				t.Errorf("by UID: got %+v", ev)
			}
		}
		if _, err := w.attestor.Vouch(t.Context(), attestor.PodRef{UID: "0f0e0d0c-1111-4222-8333-444455556666", Node: w.node.Name}); refusal.Of(err) != refusal.PodGone {
			t.Errorf("a UID that no pod has: %v", err)
		}
		// The account that the pod was made for is deleted and made again: its successor is somebody else.
		time.Sleep(1100 * time.Millisecond) // an object's creation has whole seconds
		if err := w.Clientset.CoreV1().ServiceAccounts(w.namespace).Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		must(w.CreateServiceAccount(t.Context(), w.namespace, "web"))(t)
		eventually(t, 20*time.Second, func() error {
			if _, err := w.attestor.Vouch(t.Context(), ref); refusal.Of(err) != refusal.ServiceAccountGone {
				return fmt.Errorf("got %v", err)
			}
			return nil
		})
	})
}
