// Package csi runs the agent's CSI driver under a real kubelet: real pods, a real CA beside them, the CSIDriver object of
// docs/csi.md.
package csi

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/api/admin/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/test/node"
	"github.com/meshca/meshca/test/parts"
)

const (
	runtimeDir = "/run/meshca-agent"
	// mountPath is where pods have their volume, and socket where that has its socket.
	mountPath = "/var/run/secrets/workload-spiffe-uds"
	socket    = mountPath + "/socket"
	tenant    = "localhost/tenant:test"
	namespace = "shop"
	// patience is for what a busy machine may take long for; a kubelet pauses for up to two minutes after failures.
	patience = 3 * time.Minute
)

// site is a node with a CA and an agent, as programs of its own: what stands here of them is the same for a pod of a
// DaemonSet, whose mounts test/node has tested.
type site struct {
	*node.Node
	t *testing.T
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{Node: node.Start(t), t: t}
	ctx := t.Context()
	check(t, os.Mkdir(filepath.Join(s.Dir(), "ca"), 0o700))
	check(t, os.Mkdir(s.Path("/run/meshca"), 0o700))
	for _, build := range []func(context.Context, string) (node.Image, error){node.CA, node.Agent} {
		must(build(ctx, s.Dir()))(t) // for their binaries
	}
	for _, image := range []node.Image{must(node.Programs(ctx, tenant, s.Dir(), "./test/csi/tenant"))(t), must(node.Envoy(ctx))(t)} {
		check(t, s.Import(ctx, image))
	}
	for _, ns := range []string{"meshca", namespace, "closed"} {
		must(s.CreateNamespace(ctx, ns))(t)
	}
	must(s.CreateServiceAccount(ctx, "meshca", "meshca-agent"))(t)
	check(t, s.Apply(ctx, documented(t, "csi.md", "kind: CSIDriver")))
	s.addCA(t)
	s.addAgent(t)
	s.startCA(t)
	check(t, s.StartProgram(ctx, "meshca-agent"))
	s.eventually(t, "the kubelet to register the driver", func(ctx context.Context) error {
		is, err := s.Clientset.StorageV1().CSINodes().Get(ctx, node.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		// The node's name is that in the agent's own token: what stands here has another's.
		if len(is.Spec.Drivers) != 1 || is.Spec.Drivers[0].Name != "csi.meshca.io" || is.Spec.Drivers[0].NodeID != node.Name {
			return fmt.Errorf("the CSINode has %+v", is.Spec.Drivers)
		}
		return nil
	})
	return s
}

// startCA starts the CA, and returns when it answers.
func (s *site) startCA(t *testing.T) {
	t.Helper()
	check(t, s.StartProgram(t.Context(), "meshca"))
	s.eventually(t, "the CA", func(ctx context.Context) error {
		_, err := s.Inside(ctx, node.Inner+"/certctl", "status")
		return err
	})
}

// addCA makes the CA's root and configuration.
func (s *site) addCA(t *testing.T) {
	t.Helper()
	kubeconfig, err := os.ReadFile(s.Kubeconfig)
	check(t, err)
	_, door, _ := strings.Cut(string(kubeconfig), "server: ")
	door, _, _ = strings.Cut(door, "\n")
	s.write(t, "ca/kubeconfig", strings.Replace(string(kubeconfig), door, "https://10.99.0.1", 1))
	s.write(t, "ca/policy.yaml", policyOf(""))
	s.write(t, "ca/ca.yaml", strings.ReplaceAll(`
trustDomain: mesh.test
listen: 127.0.0.1:8443
stateDir: DIR/state
bundleFile: DIR/bundle.json
policyFile: DIR/policy.yaml
audit: {file: DIR/audit.log}
svid: {ttl: 10m}
upstream: {disk: {}}
clusters:
  - {name: one, mode: jwks, kubeconfig: DIR/kubeconfig}
`, "DIR", node.Inner+"/ca"))
	must(s.Inside(t.Context(), node.Inner+"/meshca", "root", "create", "--config", node.Inner+"/ca/ca.yaml"))(t)
	check(t, s.AddProgram(t.Context(), "meshca", node.Inner+"/meshca", "serve", "--config", node.Inner+"/ca/ca.yaml"))
}

// policyOf grants to all to whom the rules before do not apply.
func policyOf(before string) string {
	return "rules:\n" + before + "  - {name: everyone-else}\n"
}

// addAgent makes the agent's pod, whose token it has, and its configuration.
func (s *site) addAgent(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	pod := podOf("meshca", "meshca-agent", "idle")
	pod.Spec.RestartPolicy = corev1.RestartPolicyAlways // a pod that has ended has no agent
	pod = s.create(t, pod)
	token := must(s.Token(ctx, "meshca", "meshca-agent", pod, "meshca-agent", 2*time.Hour))(t)
	s.write(t, "agent.token", token)
	s.write(t, "agent.yaml", strings.ReplaceAll(`
trustDomain: mesh.test
cluster: one
server: 127.0.0.1:8443
tokenFile: DIR/agent.token
bundleFile: DIR/ca/bundle.json
csi: {enabled: true}
`, "DIR", node.Inner))
	check(t, s.AddProgram(ctx, "meshca-agent", node.Inner+"/meshca-agent", "run", "--config", node.Inner+"/agent.yaml"))
}

func (s *site) write(t *testing.T, name, text string) {
	t.Helper()
	// By a rename, as editors and kubelets do: who reads it meanwhile finds the old one or the new.
	path := filepath.Join(s.Dir(), name)
	check(t, os.WriteFile(path+".new", []byte(text), 0o600))
	check(t, os.Rename(path+".new", path))
}

// documented is the one YAML block of a page in docs that holds a text.
func documented(t *testing.T, page, holding string) string {
	t.Helper()
	root := must(parts.Root())(t)
	text := must(os.ReadFile(filepath.Join(root, "docs", page)))(t)
	var found []string
	for _, block := range strings.Split(string(text), "```yaml\n")[1:] {
		if block, _, _ = strings.Cut(block, "```"); strings.Contains(block, holding) {
			found = append(found, block)
		}
	}
	if len(found) != 1 {
		t.Fatalf("docs/%s has %d blocks with %q, want one", page, len(found), holding)
	}
	return found[0]
}

// podOf is a pod with one container, of the tenant's image, without a volume.
func podOf(ns, name string, command ...string) *corev1.Pod {
	grace := int64(1)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			ServiceAccountName: name, NodeName: node.Name, TerminationGracePeriodSeconds: &grace, RestartPolicy: corev1.RestartPolicyNever,
			Containers: []corev1.Container{{Name: "c", Image: tenant, ImagePullPolicy: corev1.PullNever, Command: append([]string{"/tenant"}, command...)}},
		},
	}
}

// identified gives the pod's first container the volume, with attributes as key and value in turn.
func identified(pod *corev1.Pod, attributes ...string) *corev1.Pod {
	readOnly := true
	source := &corev1.CSIVolumeSource{Driver: "csi.meshca.io", ReadOnly: &readOnly, VolumeAttributes: map[string]string{}}
	for i := 0; i < len(attributes); i += 2 {
		source.VolumeAttributes[attributes[i]] = attributes[i+1]
	}
	pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: "identity", VolumeSource: corev1.VolumeSource{CSI: source}})
	pod.Spec.Containers[0].VolumeMounts = append(pod.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: "identity", MountPath: mountPath})
	return pod
}

// create creates the pod, and its service account where that is missing.
func (s *site) create(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	accounts := s.Clientset.CoreV1().ServiceAccounts(pod.Namespace)
	if _, err := accounts.Get(t.Context(), pod.Spec.ServiceAccountName, metav1.GetOptions{}); err != nil {
		must(s.CreateServiceAccount(t.Context(), pod.Namespace, pod.Spec.ServiceAccountName))(t)
	}
	return must(s.Clientset.CoreV1().Pods(pod.Namespace).Create(t.Context(), pod, metav1.CreateOptions{}))(t)
}

// line is what a tenant prints.
type line struct {
	At                     time.Time
	What, ID, Serial, Text string
	Roots                  int
}

// lines are what a pod has printed.
func (s *site) lines(pod *corev1.Pod) (all []line, err error) {
	text, err := s.Clientset.CoreV1().Pods(pod.Namespace).GetLogs(pod.Name, &corev1.PodLogOptions{Container: pod.Spec.Containers[0].Name}).DoRaw(s.t.Context())
	for raw := range strings.Lines(string(text)) {
		var l line
		if json.Unmarshal([]byte(raw), &l) == nil {
			all = append(all, l)
		}
	}
	return all, err
}

// said waits until a pod has printed n lines of a kind, and returns them. A pod that has failed says no more.
func (s *site) said(t *testing.T, pod *corev1.Pod, what string, n int) (found []line) {
	t.Helper()
	s.eventually(t, fmt.Sprintf("%d × %q from pod %s", n, what, pod.Name), func(ctx context.Context) error {
		all, err := s.lines(pod)
		if err != nil {
			return err
		}
		found = nil
		for _, l := range all {
			if l.What == what {
				found = append(found, l)
			}
		}
		if last := len(all) - 1; len(found) < n && last >= 0 && all[last].What == "fault" {
			t.Fatalf("pod %s ended: %v", pod.Name, all)
		}
		if len(found) < n {
			return fmt.Errorf("it has printed %v; its events: %v", all, s.events(pod))
		}
		return nil
	})
	return found
}

// saidSince waits for a line of a kind that a pod printed after a moment.
func (s *site) saidSince(t *testing.T, pod *corev1.Pod, what string, since time.Time) (found line) {
	t.Helper()
	s.eventually(t, fmt.Sprintf("%q from pod %s", what, pod.Name), func(context.Context) error {
		all, err := s.lines(pod)
		if err != nil {
			return err
		}
		for _, l := range all {
			if l.What == what && l.At.After(since) {
				found = l
				return nil
			}
		}
		return fmt.Errorf("since %v it has printed %v", since, all)
	})
	return found
}

// events are what the kubelet says of a pod's volume.
func (s *site) events(pod *corev1.Pod) (messages []string) {
	list, err := s.Clientset.CoreV1().Events(pod.Namespace).List(s.t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.uid=" + string(pod.UID) + ",reason=FailedMount"})
	if err != nil {
		return []string{err.Error()}
	}
	for _, e := range list.Items {
		messages = append(messages, e.Message)
	}
	return messages
}

// delete deletes a pod, and waits until its kubelet says that nothing is left of it.
func (s *site) delete(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	check(t, s.DeletePod(t.Context(), pod, time.Second))
	s.eventually(t, "the end of pod "+pod.Name, func(ctx context.Context) error {
		is, err := s.Clientset.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
		if err == nil && is.UID == pod.UID {
			return fmt.Errorf("it is there, %s", is.Status.Phase)
		}
		return nil
	})
	s.nothingOf(t, pod)
}

func (s *site) eventually(t *testing.T, what string, condition func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var last error
	err := s.Await(ctx, what, func(ctx context.Context) error {
		err := condition(ctx)
		if ctx.Err() == nil {
			last = err
		}
		return err
	})
	if err != nil {
		t.Fatalf("%v; before that: %v", err, last)
	}
}

// held is what the agent says of a pod; nil: nothing.
func (s *site) held(t *testing.T, pod *corev1.Pod) *meshcav1.WorkloadStatus {
	t.Helper()
	conn, err := client.Open(t.Context(), s.Path(runtimeDir+"/admin.sock"))
	if err != nil {
		return nil // it is starting
	}
	defer conn.Close()
	status, err := conn.Agent.GetAgentStatus(t.Context(), &meshcav1.GetAgentStatusRequest{})
	if err != nil {
		return nil
	}
	for _, w := range status.GetWorkloads() {
		if w.GetNamespace() == pod.Namespace && w.GetPod() == pod.Name {
			return w
		}
	}
	return nil
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		check(t, err)
		return v
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
