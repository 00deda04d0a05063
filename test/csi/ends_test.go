package csi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/figures"
	"github.com/meshca/meshca/test/helm"
)

// accountsDeleted takes service accounts away from under pods whose proxies have a stream at their volume's socket. Each stream
// is closed for that reason; how long after the API server's word, which a watch hears, is told, and how long after it the CA
// had ended the identity. Half of them must have been closed within the time that is promised: a machine that stops for a
// moment does not hold up so many. Their SVIDs live for hours, so that nothing but that word ends them.
func accountsDeleted(t *testing.T, s *site) {
	const count, aim = 7, 5 * time.Second
	var pods [count]*corev1.Pod
	for i := range pods {
		pods[i] = s.create(t, identified(podOf(namespace, fmt.Sprintf("ends-%d", i), "watch", socket)))
	}
	for _, pod := range pods {
		s.said(t, pod, "secret", 2)
	}
	var closed, byCA []time.Duration
	for _, pod := range pods {
		time.Sleep(rand.N(time.Second)) // the CA looks once a second
		began, word := time.Now(), s.deletes(t, pod.Spec.ServiceAccountName)
		end := s.saidSince(t, pod, "closed", began)
		if !strings.HasPrefix(end.Text, "SERVICE_ACCOUNT_GONE") {
			t.Errorf("the stream of pod %s ended with %q", pod.Name, end.Text)
		}
		closed, byCA = append(closed, end.At.Sub(word)), append(byCA, s.endedAt(t, pod).Sub(word))
		check(t, s.DeletePod(t.Context(), pod, time.Second)) // it comes back for more all the time
	}
	slices.Sort(closed)
	slices.Sort(byCA)
	figures.For(t).Add("the stream of a volume whose service account was deleted ended, after the API server's word: p50 %v, max %v, of %d; by the CA's audit log its identity did after p50 %v, max %v",
		closed[count/2].Round(time.Millisecond), closed[count-1].Round(time.Millisecond), count, byCA[count/2].Round(time.Millisecond), byCA[count-1].Round(time.Millisecond))
	if closed[count/2] > aim {
		t.Errorf("half of the streams were open for %v and more after their service account was deleted; %v is promised", closed[count/2], aim)
	}
	for _, pod := range pods {
		s.nothingOf(t, pod)
	}
}

// deletes deletes a service account, and returns when a watch told so.
func (s *site) deletes(t *testing.T, account string) time.Time {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	accounts := s.Clientset.CoreV1().ServiceAccounts(namespace)
	list := must(accounts.List(ctx, metav1.ListOptions{}))(t)
	events := must(accounts.Watch(ctx, metav1.ListOptions{ResourceVersion: list.ResourceVersion, FieldSelector: "metadata.name=" + account}))(t)
	defer events.Stop()
	check(t, accounts.Delete(ctx, account, metav1.DeleteOptions{}))
	for event := range events.ResultChan() {
		if event.Type == "DELETED" {
			return time.Now()
		}
	}
	t.Fatalf("no watch tells that service account %s was deleted", account)
	return time.Time{}
}

// endedAt is when the CA ended a pod's identity, by its audit log.
func (s *site) endedAt(t *testing.T, pod *corev1.Pod) (at time.Time) {
	t.Helper()
	s.eventually(t, "the audit log to say that the CA ended the identity of pod "+pod.Name, func(ctx context.Context) error {
		log, err := s.PodLogs(ctx, helm.Namespace, "meshca-0")
		for raw := range strings.Lines(log) {
			var l struct {
				Time                 time.Time
				Msg, Outcome, PodUID string
			}
			if json.Unmarshal([]byte(raw), &l) == nil && l.Msg == "end" && l.PodUID == string(pod.UID) && l.Outcome == "SERVICE_ACCOUNT_GONE" {
				at = l.Time
			}
		}
		if err == nil && at.IsZero() {
			err = errors.New("it does not")
		}
		return err
	})
	return at
}
