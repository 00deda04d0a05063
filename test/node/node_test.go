package node_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/node"
)

// TestNode is one node's life: what it can do, and that it leaves nothing when it goes. Another one starts after it.
func TestNode(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir()) // in which there is no other test's node
	before := machine(t)
	var dir string
	t.Run("first", func(t *testing.T) {
		n := node.Start(t)
		dir = n.Dir()
		if after := machine(t); !slices.Equal(after.mounts, before.mounts) || !slices.Equal(after.interfaces, before.interfaces) {
			t.Errorf("the node is to be seen on the machine:\n%v\nbefore it:\n%v", after, before)
		}
		for name, test := range map[string]func(*testing.T, *node.Node){
			"a Service is found by its name":    serviceAnswers,
			"a pod's token is for its audience": tokenOfAPod,
			"mounts go both ways":               mountsGoBothWays,
			"programs come back":                programsComeBack,
			"what meshca builds on is served":   served,
			"a node that runs nothing":          secondNode,
			"our own images run":                ownImages,
		} {
			t.Run(name, func(t *testing.T) { test(t, n) })
		}
	})
	gone(t, before, dir)
	t.Run("second", func(t *testing.T) {
		n := node.Start(t)
		dir = n.Dir()
		apply(t, n, pod("web", "", `["/inpod", "pause"]`))
		ready(t, n, "web")
	})
	gone(t, before, dir)
}

func serviceAnswers(t *testing.T, n *node.Node) {
	apply(t, n, pod("server", "", `["/inpod", "serve", ":8080"]`)+`
apiVersion: v1
kind: Service
metadata: {name: greeter}
spec: {selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}
---
`+pod("client", "", `["/inpod", "pause"]`))
	ready(t, n, "server")
	ready(t, n, "client")
	for _, host := range []string{"greeter", "greeter.default.svc.cluster.local"} {
		eventually(t, n, func(ctx context.Context) error {
			got, err := n.Exec(ctx, "default", "client", "/inpod", "fetch", "http://"+host)
			if err == nil && got != "server" {
				err = fmt.Errorf("the Service answers %q", got)
			}
			return err
		})
	}
	if rules, err := n.Inside(t.Context(), "nft", "list", "table", "ip", "kube-proxy"); err != nil || !strings.Contains(rules, "greeter") {
		t.Errorf("the node's own rules do not name the Service: %v\n%s", err, rules)
	}
}

func tokenOfAPod(t *testing.T, n *node.Node) {
	apply(t, n, pod("bearer", `
  volumes:
  - name: token
    projected: {sources: [{serviceAccountToken: {audience: meshca, path: token, expirationSeconds: 600}}]}
`, `["/inpod", "pause"]`, "{name: token, mountPath: /tokens}"))
	ready(t, n, "bearer")
	token := must(n.Exec(t.Context(), "default", "bearer", "/inpod", "cat", "/tokens/token"))(t)
	var claims struct {
		Audience []string `json:"aud"`
		Cluster  struct {
			Node struct{ Name string }
			Pod  struct{ Name, UID string }
		} `json:"kubernetes.io"`
	}
	body := must(base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1]))(t)
	if err := json.Unmarshal(body, &claims); err != nil {
		t.Fatal(err)
	}
	is := must(n.Clientset.CoreV1().Pods("default").Get(t.Context(), "bearer", metav1.GetOptions{}))(t)
	if !slices.Equal(claims.Audience, []string{"meshca"}) || claims.Cluster.Pod.UID != string(is.UID) || claims.Cluster.Node.Name != node.Name {
		t.Errorf("the token says %+v, the pod's UID is %s", claims, is.UID)
	}
}

// A CSI driver is a pod; what it mounts is seen by kubelet and by the pods that use it, also by those that are there
// already. Kubelet sees to that in its own folder, so the test takes one where the node has to.
func mountsGoBothWays(t *testing.T, n *node.Node) {
	const folder = "/run/mounts.test"
	volumes := `
  volumes: [{name: v, hostPath: {path: ` + folder + `, type: DirectoryOrCreate}}]
`
	apply(t, n, pod("watcher", volumes, `["/inpod", "pause"]`, "{name: v, mountPath: /v, mountPropagation: HostToContainer}"))
	ready(t, n, "watcher")
	driver := strings.Replace(pod("driver", volumes, `["/inpod", "mount", "/v"]`, "{name: v, mountPath: /v, mountPropagation: Bidirectional}"),
		"imagePullPolicy:", "securityContext: {privileged: true}\n    imagePullPolicy:", 1)
	apply(t, n, driver)
	ready(t, n, "driver")
	eventually(t, n, func(ctx context.Context) error {
		text, err := n.Exec(ctx, "default", "watcher", "/inpod", "cat", "/v/mounted")
		if err == nil && text != "by a pod" {
			err = fmt.Errorf("the other pod reads %q", text)
		}
		return err
	})
	if text, err := os.ReadFile(n.Path(folder + "/mounted")); err != nil || string(text) != "by a pod" {
		t.Errorf("the node itself reads %q (%v)", text, err)
	}
	if text, err := os.ReadFile(filepath.Join(folder, "mounted")); err == nil {
		t.Errorf("the machine around the node sees the mount: %q", text)
	}
}

func programsComeBack(t *testing.T, n *node.Node) {
	ctx := t.Context()
	apply(t, n, pod("survivor", "", `["/inpod", "pause"]`))
	ready(t, n, "survivor")
	for _, program := range []string{"kubelet", "containerd"} {
		if err := n.StopProgram(ctx, program); err != nil {
			t.Fatal(err)
		}
		if err := n.StopProgram(ctx, program); err == nil {
			t.Errorf("%s was stopped twice", program)
		}
	}
	if text, err := n.Exec(ctx, "default", "survivor", "/inpod", "cat", "/etc/hostname"); err == nil {
		t.Errorf("without a kubelet something ran in a pod: %q", text)
	}
	for _, program := range []string{"containerd", "kubelet"} {
		if err := n.StartProgram(ctx, program); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, n, func(ctx context.Context) error {
		_, err := n.Exec(ctx, "default", "survivor", "/inpod", "cat", "/etc/hostname")
		return err
	})
	is := must(n.Clientset.CoreV1().Pods("default").Get(ctx, "survivor", metav1.GetOptions{}))(t)
	if restarts := is.Status.ContainerStatuses[0].RestartCount; restarts != 0 {
		t.Errorf("the pod did not live through it: %d restarts", restarts)
	}
	apply(t, n, pod("later", "", `["/inpod", "pause"]`))
	ready(t, n, "later")
}

func served(t *testing.T, n *node.Node) {
	resources := must(n.Kubectl(t.Context(), "api-resources", "--api-group=certificates.k8s.io", "-o", "name"))(t)
	for _, want := range []string{"certificatesigningrequests", "podcertificaterequests", "clustertrustbundles"} {
		if !strings.Contains(resources, want) {
			t.Errorf("the API server does not serve %s: %s", want, resources)
		}
	}
	apply(t, n, `
apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata: {name: driver.test}
spec: {attachRequired: false, podInfoOnMount: true, requiresRepublish: true, volumeLifecycleModes: [Ephemeral], tokenRequests: [{audience: meshca}]}
`)
	if releases := must(n.Helm(t.Context(), "list", "--all-namespaces", "--output=json"))(t); strings.TrimSpace(releases) != "[]" {
		t.Errorf("Helm finds releases on a new node: %q", releases)
	}
	if info, err := os.Stat(n.Path("/var/lib/kubelet/plugins_registry")); err != nil || !info.IsDir() {
		t.Errorf("kubelet has no folder in which drivers register: %v", err)
	}
}

// A second Node object has pods, and tokens for them, that stand for another machine.
func secondNode(t *testing.T, n *node.Node) {
	ctx := t.Context()
	must(n.CreateNode(ctx, "elsewhere"))(t)
	bound := must(n.CreatePod(ctx, "default", "absent", "default", "elsewhere"))(t)
	if token := must(n.Token(ctx, "default", "default", bound, "meshca", 10*time.Minute))(t); strings.Count(token, ".") != 2 {
		t.Errorf("no token for a pod on the second node: %d bytes", len(token))
	}
	if is := must(n.Clientset.CoreV1().Pods("default").Get(ctx, "absent", metav1.GetOptions{}))(t); is.Status.Phase != corev1.PodPending {
		t.Errorf("a pod of a node that is an object only is %s", is.Status.Phase)
	}
	if err := n.DeletePod(ctx, bound, 0); err != nil {
		t.Error(err)
	}
	if err := n.Clientset.CoreV1().Nodes().Delete(ctx, "elsewhere", metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}

func ownImages(t *testing.T, n *node.Node) {
	ctx := t.Context()
	for _, image := range []node.Image{must(node.CA(ctx, n.Dir()))(t), must(node.Agent(ctx, n.Dir()))(t), must(node.Envoy(ctx))(t)} {
		if err := n.Import(ctx, image); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]struct{ image, command, want string }{
		"ca":       {"localhost/meshca:test", `["/meshca", "version"]`, "meshca"},
		"certctl":  {"localhost/meshca:test", `["/certctl", "version"]`, "certctl"},
		"agent":    {"localhost/meshca-agent:test", `["/meshca-agent", "version"]`, "meshca-agent"},
		"sidecar":  {"localhost/envoy:test", `["/envoy", "--version"]`, "1.40.0"},
		"unlinked": {"localhost/inpod:test", `["/inpod", "fetch", "http://10.96.0.1:443"]`, "400"},
	} {
		apply(t, n, strings.Replace(pod(name, "\n  restartPolicy: Never", test.command), "localhost/inpod:test", test.image, 1))
		eventually(t, n, func(ctx context.Context) error {
			is, err := n.Clientset.CoreV1().Pods("default").Get(ctx, name, metav1.GetOptions{})
			if err == nil && is.Status.Phase != corev1.PodSucceeded && is.Status.Phase != corev1.PodFailed {
				err = fmt.Errorf("%s is %s", name, is.Status.Phase)
			}
			return err
		})
		if text := must(n.PodLogs(ctx, "default", name))(t); !strings.Contains(text, test.want) {
			t.Errorf("%s printed %q, want %q in it", name, text, test.want)
		}
	}
}

// pod is a pod's manifest. more is put in front of its containers: lines of the spec.
func pod(name, more, command string, mounts ...string) string {
	return `
apiVersion: v1
kind: Pod
metadata: {name: ` + name + `, labels: {app: ` + name + `}}
spec:
  terminationGracePeriodSeconds: 1` + more + `
  containers:
  - name: c
    image: localhost/inpod:test
    imagePullPolicy: Never
    command: ` + command + `
    volumeMounts: [` + strings.Join(mounts, ", ") + `]
---
`
}

func apply(t *testing.T, n *node.Node, manifest string) {
	t.Helper()
	if err := n.Apply(t.Context(), manifest); err != nil {
		t.Fatal(err)
	}
}

func ready(t *testing.T, n *node.Node, pod string) {
	t.Helper()
	if err := n.PodReady(t.Context(), "default", pod); err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, n *node.Node, condition func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := n.Await(ctx, t.Name(), condition); err != nil {
		t.Fatal(err)
	}
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
