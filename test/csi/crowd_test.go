package csi

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/figures"
)

// crowdSize is how many pods come at once; a kubelet has room for 110 by default.
const crowdSize = 100

// A hundred pods are created at once, with the volume and without. How long it took each from its creation until its
// container ran, and until that had its first secret, is told.
func crowd(t *testing.T, s *site) {
	must(s.CreateServiceAccount(t.Context(), namespace, "crowd"))(t)
	plain := s.together(t, "started", func(name string) *corev1.Pod { return podOf(namespace, name, "idle") })
	with := s.together(t, "secret", func(name string) *corev1.Pod { return identified(podOf(namespace, name, "first", socket)) })
	f := figures.For(t)
	f.Add("from creation to the first container, without the volume: %s", plain.started)
	f.Add("from creation to the first container, with the volume:    %s", with.started)
	f.Add("from creation to the first secret:                        %s", with.reached)
	f.Add("from the first container to the first secret:             %s", with.after)
}

// times are how long things took, one for each pod.
type times []time.Duration

func (d times) String() string {
	slices.Sort(d)
	at := func(percent int) time.Duration { return d[(len(d)*percent+99)/100-1].Round(time.Millisecond) }
	return fmt.Sprintf("p50 %v, p99 %v, of %d", at(50), at(99), len(d))
}

// measured is how it went for all pods: until their container ran, until that printed what was waited for, and between.
type measured struct{ started, reached, after times }

func (s *site) together(t *testing.T, what string, single func(name string) *corev1.Pod) (m measured) {
	t.Helper()
	pods, created := [crowdSize]*corev1.Pod{}, [crowdSize]time.Time{}
	var calls sync.WaitGroup
	for i := range pods {
		calls.Go(func() {
			pod := single(fmt.Sprintf("crowd-%s-%d", what, i))
			pod.Spec.ServiceAccountName = "crowd"
			created[i] = time.Now()
			var err error
			if pods[i], err = s.Clientset.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	if calls.Wait(); t.Failed() {
		t.FailNow()
	}
	// One question for all, seldom: the machine is theirs.
	s.eventually(t, "all pods to run", func(ctx context.Context) error {
		time.Sleep(time.Second)
		list, err := s.Clientset.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{FieldSelector: "status.phase=Running"})
		if err == nil && len(list.Items) < len(pods) {
			err = fmt.Errorf("%d run", len(list.Items))
		}
		return err
	})
	for i, pod := range pods {
		reached := s.said(t, pod, what, 1)[0]
		started := s.said(t, pod, "started", 1)[0]
		m.started = append(m.started, started.At.Sub(created[i]))
		m.reached = append(m.reached, reached.At.Sub(created[i]))
		m.after = append(m.after, reached.At.Sub(started.At))
		if what == "secret" && reached.ID != idOf(pod) {
			t.Errorf("pod %s has the identity %s", pod.Name, reached.ID)
		}
	}
	for _, pod := range pods {
		check(t, s.DeletePod(t.Context(), pod, time.Second))
	}
	for _, pod := range pods {
		s.nothingOf(t, pod)
	}
	return m
}
