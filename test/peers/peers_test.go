// Package peers meets the shared socket on a real node: the agent in a pod of its own, real pods at the other end.
package peers

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/node"
	"github.com/meshca/meshca/test/parts"
)

const meshca = `
apiVersion: v1
kind: Namespace
metadata: {name: meshca}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: meshca, namespace: meshca}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: meshca-agent, namespace: meshca}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: meshca}
rules:
- {apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}
- {apiGroups: [""], resources: [pods, nodes, serviceaccounts, namespaces], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: meshca}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: meshca}
subjects: [{kind: ServiceAccount, name: meshca, namespace: meshca}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: meshca, namespace: meshca}
data:
  meshca.yaml: |
    trustDomain: mesh.test
    stateDir: /state
    bundleFile: /trust/bundle.json
    policyFile: /config/policy.yaml
    upstream: {disk: {}}
    clusters: [{name: one}]
  policy.yaml: |
    rules: [{namespaces: [shop], nodeVouched: true}, {}]
  agent.yaml: |
    trustDomain: mesh.test
    cluster: one
    server: meshca.meshca.svc.cluster.local:8443
    bundleFile: /trust/bundle.json
    sharedSocket: {enabled: true}
---
apiVersion: v1
kind: Service
metadata: {name: meshca, namespace: meshca}
spec: {selector: {app: meshca}, ports: [{port: 8443}]}
---
apiVersion: v1
kind: Pod
metadata: {name: meshca, namespace: meshca, labels: {app: meshca}}
spec:
  serviceAccountName: meshca
  securityContext: {runAsUser: 0} # the trust folder is the node's
  terminationGracePeriodSeconds: 5
  volumes:
  - {name: config, configMap: {name: meshca}}
  - {name: state, emptyDir: {}}
  - {name: run, hostPath: {path: /run/meshca, type: DirectoryOrCreate}}
  - {name: trust, hostPath: {path: /run/meshca-trust, type: DirectoryOrCreate}}
  initContainers:
  - name: root
    image: localhost/meshca:test
    imagePullPolicy: Never
    command: [/meshca, root, create, --config, /config/meshca.yaml]
    volumeMounts: [{name: config, mountPath: /config}, {name: state, mountPath: /state}, {name: trust, mountPath: /trust}]
  containers:
  - name: ca
    image: localhost/meshca:test
    imagePullPolicy: Never
    command: [/meshca, serve, --config, /config/meshca.yaml]
    volumeMounts: [{name: config, mountPath: /config}, {name: state, mountPath: /state}, {name: run, mountPath: /run/meshca}, {name: trust, mountPath: /trust}]
---
`

const agent = `
apiVersion: v1
kind: Pod
metadata: {name: agent, namespace: meshca}
spec:
  serviceAccountName: meshca-agent
  hostPID: true
  terminationGracePeriodSeconds: 5
  volumes:
  - {name: config, configMap: {name: meshca}}
  - {name: run, hostPath: {path: /run/meshca-agent, type: DirectoryOrCreate}}
  - {name: state, hostPath: {path: /var/lib/meshca-agent, type: DirectoryOrCreate}}
  - {name: trust, hostPath: {path: /run/meshca-trust, type: DirectoryOrCreate}}
  - {name: token, projected: {sources: [{serviceAccountToken: {audience: meshca-agent, path: token}}]}}
  containers:
  - name: agent
    image: localhost/meshca-agent:test
    imagePullPolicy: Never
    command: [/meshca-agent, run, --config, /config/agent.yaml]
    securityContext: {privileged: true}
    volumeMounts:
    - {name: config, mountPath: /config}
    - {name: run, mountPath: /run/meshca-agent}
    - {name: state, mountPath: /var/lib/meshca-agent}
    - {name: trust, mountPath: /trust, readOnly: true}
    - {name: token, mountPath: /var/run/secrets/meshca}
---
`

// client is a pod of the shared socket. more are lines of its container.
func client(namespace, name, more string, args ...string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: ServiceAccount
metadata: {name: %[2]s, namespace: %[1]s}
---
apiVersion: v1
kind: Pod
metadata: {name: %[2]s, namespace: %[1]s}
spec:
  serviceAccountName: %[2]s
  terminationGracePeriodSeconds: 1
  volumes: [{name: meshca, hostPath: {path: /run/meshca-agent/shared, type: DirectoryOrCreate}}]
  containers:
  - name: c
    image: localhost/client:test
    imagePullPolicy: Never
    command: [/client, /run/meshca-agent/agent.sock%[3]s]
    volumeMounts: [{name: meshca, mountPath: /run/meshca-agent, readOnly: true}]%[4]s
---
`, namespace, name, strings.Join(append([]string{""}, args...), ", "), more)
}

// site is a node with meshca on it.
type site struct {
	*node.Node
	t *testing.T
}

func newSite(t *testing.T) *site {
	s := &site{node.Start(t), t}
	dir := t.TempDir()
	ca, err := node.CA(t.Context(), dir)
	s.must(err)
	agentImage, err := node.Agent(t.Context(), dir)
	s.must(err)
	root, err := parts.Root()
	s.must(err)
	binary := filepath.Join(s.Dir(), "client") // the node sees it, too
	build := exec.CommandContext(t.Context(), "go", "build", "-ldflags=-s -w", "-o", binary, "./test/peers/client")
	build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath -buildvcs=false")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, image := range []node.Image{ca, agentImage, {Name: "localhost/client:test", Entrypoint: []string{"/client"}, Files: map[string]string{"/client": binary}}} {
		s.must(s.Import(t.Context(), image))
	}
	s.apply(meshca)
	s.must(s.PodReady(t.Context(), "meshca", "meshca"))
	s.apply(agent)
	s.must(s.PodReady(t.Context(), "meshca", "agent"))
	for _, ns := range []string{"shop", "bank"} {
		_, err := s.CreateNamespace(t.Context(), ns)
		s.must(err)
	}
	return s
}

func (s *site) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) apply(manifest string) { s.t.Helper(); s.must(s.Apply(s.t.Context(), manifest)) }

// prints waits until the pod has printed this, and returns all that it printed.
func (s *site) prints(namespace, pod, want string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	var text string
	s.must(s.Await(ctx, namespace+"/"+pod+" to print "+want, func(ctx context.Context) (err error) {
		if text, err = s.PodLogs(ctx, namespace, pod); err == nil && !strings.Contains(text, want) {
			err = fmt.Errorf("it printed %q", text[max(0, len(text)-2000):])
		}
		return err
	}))
	return text
}

func TestTheSharedSocket(t *testing.T) {
	s := newSite(t)
	const id = "served spiffe://mesh.test/ns/shop/sa/"
	s.apply(client("shop", "web", ""))
	s.prints("shop", "web", id+"web")
	web, err := s.Clientset.CoreV1().Pods("shop").Get(t.Context(), "web", metav1.GetOptions{})
	s.must(err)

	// An attacker with all power over control groups that a container can have takes a name below its own: it is itself.
	s.apply(client("shop", "attacker", "\n    securityContext: {privileged: true}", string(web.UID)))
	if text := s.prints("shop", "attacker", id); !strings.Contains(text, id+"attacker") || strings.Contains(text, id+"web") || !strings.Contains(text, string(web.UID)) {
		t.Errorf("the attacker printed %s", text)
	}

	// Policy opens the way by namespace: beside it nothing is served.
	s.apply(client("bank", "teller", ""))
	s.prints("bank", "teller", "connected")
	s.prints("meshca", "agent", "NODE_VOUCHED_NOT_ALLOWED")
	if text, err := s.PodLogs(t.Context(), "bank", "teller"); err != nil || strings.Contains(text, "served") {
		t.Errorf("a pod that policy does not open is served: %s, %v", text, err)
	}

	// A process of the node's own is none of a pod's.
	if out, _ := s.Inside(t.Context(), "timeout", "3", filepath.Join(s.Dir(), "client"), "/run/meshca-agent/shared/agent.sock"); strings.Contains(out, "served") {
		t.Errorf("a process of the node's own was served: %s", out)
	}
	s.prints("meshca", "agent", "a peer of the shared socket was sent away")

	// The agent's pod is replaced: the socket is there again, in the same directory, and pods come back by themselves.
	s.must(s.Delete(t.Context(), agent))
	s.apply(agent)
	s.must(s.PodReady(t.Context(), "meshca", "agent"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s.must(s.Await(ctx, "the pod to be served again", func(ctx context.Context) error {
		text, err := s.PodLogs(ctx, "shop", "web")
		if err == nil && strings.Count(text, id+"web") < 2 {
			err = fmt.Errorf("it printed %s", text)
		}
		return err
	}))

	// The stream ends with what the identity stands on.
	s.must(s.Clientset.CoreV1().ServiceAccounts("shop").Delete(t.Context(), "web", metav1.DeleteOptions{}))
	began := time.Now()
	s.prints("shop", "web", "ended SERVICE_ACCOUNT_GONE")
	t.Logf("service account deleted: the stream had ended %v later (as kubectl logs shows it)", time.Since(began).Round(time.Millisecond))

	// And with the pod; what is kept of it goes too.
	s.must(s.Delete(t.Context(), client("shop", "attacker", "")))
	s.must(s.Await(ctx, "the keys of pods that are gone to be removed", func(context.Context) error {
		keys, err := filepath.Glob(s.Path("/run/meshca-agent/keys/svid-*"))
		if err == nil && len(keys) > 0 {
			err = fmt.Errorf("there are %v", keys)
		}
		return err
	}))
	if beside, err := os.ReadDir(s.Path("/run/meshca-agent/shared")); err != nil || len(beside) != 1 {
		t.Errorf("beside the socket lies %v, %v", beside, err)
	}
}
