package csi

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/node"
)

// TestUnderARealKubelet is one node's life. Its parts follow each other; what one changed for all it puts back.
func TestUnderARealKubelet(t *testing.T) {
	s := newSite(t)
	for _, part := range []struct {
		name string
		test func(*testing.T, *site)
	}{
		{"the identity is there before the first container", identityFirst},
		{"files for a user who is not root", filesForAGroup},
		{"proxies in pods", proxies},
		{"optional", optional},
		{"what policy refuses", refused},
		{"a pod that is terminating", terminating},
		{"the CA is away", withoutCA},
		{"the agent is restarted", agentRestarted},
		{"the kubelet is restarted", kubeletRestarted},
		{"containerd is restarted", containerdRestarted},
		{"pods that go while the agent is away", orphans},
		{"a reboot", reboot},
		{"nothing is left", allGone},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.test(t, s) }) {
			t.Fatal("what follows builds on it")
		}
	}
}

func idOf(pod *corev1.Pod) string {
	return "spiffe://mesh.test/ns/" + pod.Namespace + "/sa/" + pod.Spec.ServiceAccountName
}

func (s *site) get(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	return must(s.Clientset.CoreV1().Pods(pod.Namespace).Get(t.Context(), pod.Name, metav1.GetOptions{}))(t)
}

// The container asks once, on a connection that it tries once, and ends if that fails. The identity is its own, by its own
// token, whatever the pod's author wrote where the kubelet writes.
func identityFirst(t *testing.T, s *site) {
	web, forger := s.create(t, identified(podOf(namespace, "web", "first", socket))), podOf(namespace, "forger", "first", socket)
	stolen := must(s.Token(t.Context(), namespace, "web", web, "meshca", time.Hour))(t)
	tokens := string(must(json.Marshal(map[string]any{"meshca": map[string]string{"token": stolen}}))(t))
	forger = s.create(t, identified(forger, "csi.storage.k8s.io/pod.name", "web", "csi.storage.k8s.io/pod.uid", string(web.UID),
		"csi.storage.k8s.io/serviceAccount.name", "web", "csi.storage.k8s.io/serviceAccount.tokens", tokens))
	for _, pod := range []*corev1.Pod{web, forger} {
		if got := s.said(t, pod, "secret", 1)[0]; got.ID != idOf(pod) {
			t.Errorf("pod %s has the identity %s", pod.Name, got.ID)
		}
		s.runs(t, pod)
		v := s.stands(t, pod)
		claims := claimsOf(t, v)
		if claims.Cluster.Pod.UID != string(pod.UID) || len(claims.Audience) != 1 || claims.Audience[0] != "meshca" {
			t.Errorf("the token of pod %s (UID %s) says %+v", pod.Name, pod.UID, claims)
		}
		if mounted := s.mountsWith(t, v.target); len(mounted) != 1 || !strings.Contains(mounted[0], " ro,nosuid,nodev,noexec") {
			t.Errorf("mounted at the kubelet's target: %v", mounted)
		}
	}
	check(t, s.inSecrets(t, true))
	later := s.create(t, identified(podOf(namespace, "later", "first", socket)))
	s.said(t, later, "secret", 1)
	check(t, s.inSecrets(t, false))
	for _, pod := range []*corev1.Pod{web, forger, later} {
		s.delete(t, pod)
	}
}

// inSecrets has kubelets pass tokens in the field that is meant for secrets.
func (s *site) inSecrets(t *testing.T, so bool) error {
	_, err := s.Kubectl(t.Context(), "patch", "csidriver", "csi.meshca.io", "--type=merge", "-p", fmt.Sprintf(`{"spec":{"serviceAccountTokenInSecrets":%t}}`, so))
	return err
}

// claims of a token that a volume holds.
type claims struct {
	ID       string                             `json:"jti"`
	Audience []string                           `json:"aud"`
	Cluster  struct{ Pod struct{ UID string } } `json:"kubernetes.io"`
}

func claimsOf(t *testing.T, v volume) (c claims) {
	t.Helper()
	token := must(os.ReadFile(filepath.Join(v.dir, "token")))(t)
	parts := strings.Split(string(token), ".")
	if len(parts) != 3 {
		t.Fatalf("the token has %d parts", len(parts))
	}
	check(t, json.Unmarshal(must(base64.RawURLEncoding.DecodeString(parts[1]))(t), &c))
	return c
}

// The example of docs/csi.md, with an image that is here; and what a pod gets without an fsGroup.
func filesForAGroup(t *testing.T, s *site) {
	example := strings.NewReplacer(
		"image: registry.example/ledger:1\n", "image: "+tenant+"\n      imagePullPolicy: Never\n      command: [/tenant, read, /var/run/secrets/tls]\n",
		"  containers:", "  terminationGracePeriodSeconds: 1\n  restartPolicy: Never\n  containers:",
	).Replace(documented(t, "csi.md", "volumeAttributes: {files: tls}"))
	must(s.CreateServiceAccount(t.Context(), namespace, "ledger"))(t)
	check(t, s.Apply(t.Context(), example))
	ledger := must(s.Clientset.CoreV1().Pods(namespace).Get(t.Context(), "ledger", metav1.GetOptions{}))(t)
	bare := podOf(namespace, "bare", "read", mountPath)
	user := int64(1000)
	bare.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &user}
	bare = s.create(t, identified(bare, "files", "tls,istio"))
	for pod, want := range map[*corev1.Pod]string{ledger: "uid 1000, key -rw-r-----", bare: "uid 1000, key -rw-r--r--"} {
		if got := s.said(t, pod, "files", 1)[0]; got.ID != idOf(pod) || got.Text != want || got.Roots != 1 {
			t.Errorf("pod %s reads %+v, want %q", pod.Name, got, want)
		}
	}
	// A user who is in no group of the pod's has no way to the key.
	other := podOf(namespace, "other", "read", mountPath)
	group := int64(2000)
	other.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &user, FSGroup: &group}
	other = s.create(t, identified(other, "files", "tls", "filesMode", "0600"))
	if got := s.said(t, other, "fault", 1)[0]; !strings.Contains(got.Text, "tls.key: permission denied") {
		t.Errorf("with mode 0600 a user who is not root finds %q", got.Text)
	}
	s.renewed(t, ledger)
	for _, pod := range []*corev1.Pod{ledger, bare, other} {
		s.delete(t, pod)
	}
}

// renewed orders a renewal, and waits until a pod's files have it.
func (s *site) renewed(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	chain := filepath.Join(s.stands(t, pod).inside, "tls.crt")
	read := func() string { text, _ := os.ReadFile(chain); return string(text) }
	before := read()
	s.renew(t)
	s.eventually(t, "new files of pod "+pod.Name, func(context.Context) error {
		if now := read(); now == "" || now == before {
			return errors.New("the files are those of before")
		}
		return nil
	})
}

// renew orders new SVIDs for all.
func (s *site) renew(t *testing.T) {
	t.Helper()
	must(s.Inside(t.Context(), node.Inner+"/certctl", "svid", "renew", "--all", "--spread=0s"))(t)
}

// A pod that may do without starts though nobody answers, and has its identity when somebody does.
func optional(t *testing.T, s *site) {
	check(t, s.StopProgram(t.Context(), "meshca"))
	pod := s.create(t, identified(podOf(namespace, "optional", "idle"), "optional", "true"))
	s.said(t, pod, "started", 1)
	v := s.stands(t, pod)
	if info, err := os.Lstat(filepath.Join(v.inside, "socket")); err != nil || info.Mode().Type() != os.ModeSocket {
		t.Errorf("its socket: %v", err)
	}
	s.startCA(t)
	s.eventually(t, "its identity", func(context.Context) error {
		if w := s.held(t, pod); w.GetState() != "fresh" {
			return fmt.Errorf("it is %v", w)
		}
		return nil
	})
	s.delete(t, pod)
}

func refused(t *testing.T, s *site) {
	s.write(t, "ca/policy.yaml", policyOf("  - {name: shut, namespaces: [closed], deny: closed for the season}\n"))
	s.eventually(t, "the CA to read its policy", func(ctx context.Context) error {
		out, err := s.Inside(ctx, node.Inner+"/certctl", "policy", "test", "closed/web")
		if !strings.Contains(out, "shut") {
			return fmt.Errorf("it says %q (%w)", out, err)
		}
		return nil
	})
	pod := s.create(t, identified(podOf("closed", "web", "first", socket)))
	s.eventually(t, "an event", func(context.Context) error {
		for _, message := range s.events(pod) {
			if strings.Contains(message, "POLICY_DENIED") {
				return nil
			}
		}
		return fmt.Errorf("the events are %q", s.events(pod))
	})
	// The kubelet's own words are before it.
	want := `pod closed/web (service account web) gets no SVID: POLICY_DENIED: rule 1 "shut" denies service account closed/web of cluster one: closed for the season`
	for _, message := range s.events(pod) {
		t.Logf("the event: %s", message)
		if !strings.Contains(message, want) || strings.Contains(message, "\n") {
			t.Errorf("an event says %q, want %q in it", message, want)
		}
	}
	if is := s.get(t, pod); is.Status.Phase != corev1.PodPending {
		t.Errorf("the pod is %s", is.Status.Phase)
	}
	if v, ok := s.volumeOf(pod); ok {
		t.Errorf("a volume stands that was refused for good: %+v", v)
	}
	allowed := time.Now()
	s.write(t, "ca/policy.yaml", policyOf(""))
	if got := s.said(t, pod, "secret", 1)[0]; got.ID != idOf(pod) {
		t.Errorf("it has %s", got.ID)
	}
	if began := s.said(t, pod, "started", 1)[0]; began.At.Before(allowed) {
		t.Errorf("its container started at %v, policy let it at %v", began.At, allowed)
	}
	s.runs(t, pod)
	s.delete(t, pod)
}

// While the CA is away kubelets republish as before, and pods keep what they have. A pod that is new waits.
func withoutCA(t *testing.T, s *site) {
	web := s.create(t, identified(podOf(namespace, "web", "watch", socket)))
	serial := s.said(t, web, "secret", 2)[1].Serial
	check(t, s.StopProgram(t.Context(), "meshca"))
	s.republished(t, web)
	s.runs(t, web)
	waits := s.create(t, identified(podOf(namespace, "waits", "first", socket)))
	s.eventually(t, "its volume", func(context.Context) error {
		if _, ok := s.volumeOf(waits); !ok {
			return errors.New("the kubelet has not called")
		}
		return nil
	})
	s.republished(t, web) // and time enough for a container to start that should not
	if got := must(s.lines(web))(t); len(got) != 3 || got[2].Serial != serial {
		t.Errorf("a pod without a CA saw %v", got)
	}
	if events := s.events(web); len(events) > 0 {
		t.Errorf("events of a pod that runs: %q", events)
	}
	if is := s.get(t, waits); is.Status.Phase != corev1.PodPending {
		t.Errorf("a pod that is to wait is %s", is.Status.Phase)
	}
	back := time.Now()
	s.startCA(t)
	s.said(t, waits, "secret", 1)
	if began := s.said(t, waits, "started", 1)[0]; began.At.Before(back) {
		t.Errorf("the container of a pod without an SVID started at %v, the CA at %v", began.At, back)
	}
	s.runs(t, waits)
	ordered := time.Now()
	s.renew(t)
	if got := s.saidSince(t, web, "secret", ordered); got.Serial == serial || got.ID != idOf(web) {
		t.Errorf("after the CA came back there is %+v", got)
	}
	s.delete(t, web)
	s.delete(t, waits)
}

// A pod that ends still serves until it has: its stream stays, it has a renewal, and then all goes with it.
func terminating(t *testing.T, s *site) {
	pod := identified(podOf(namespace, "ending", "watch", socket))
	grace := int64(30)
	pod.Spec.TerminationGracePeriodSeconds = &grace
	pod.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 8}}}
	pod = s.create(t, pod)
	s.said(t, pod, "secret", 2)
	check(t, s.DeletePod(t.Context(), pod, 30*time.Second))
	began := time.Now()
	s.renew(t)
	s.saidSince(t, pod, "secret", began)
	if is := s.get(t, pod); is.DeletionTimestamp == nil || is.Status.Phase != corev1.PodRunning {
		t.Errorf("the pod was to be terminating, and is %s", is.Status.Phase)
	}
	s.nothingOf(t, pod)
}
