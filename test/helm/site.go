// Package helm installs meshca on a real Kubernetes node as a user would: the chart by Helm, the example by kubectl.
package helm

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/meshca/meshca/test/chart"
	"github.com/meshca/meshca/test/node"
	"github.com/meshca/meshca/test/parts"
)

// Namespace is where the release is, and its name.
const Namespace = "meshca"

// patience is for what a person would wait for, on a machine that has other things to do.
const patience = 3 * time.Minute

// Site is a node with what an installation needs: images, a volume, and the files of this repository.
type Site struct {
	*node.Node
	root string
}

// Prepare gives the node the images of this checkout, as a registry would, Envoy's by its public name, and a volume. It
// tells say what it does.
func Prepare(ctx context.Context, n *node.Node, say func(string)) (*Site, error) {
	root, err := parts.Root()
	if err != nil {
		return nil, err
	}
	say("building the images of the CA and of the agent")
	ca, err := node.CA(ctx, n.Dir())
	if err != nil {
		return nil, err
	}
	agent, err := node.Agent(ctx, n.Dir())
	if err != nil {
		return nil, err
	}
	envoy, err := node.Envoy(ctx)
	if err != nil {
		return nil, err
	}
	envoy.Name = "docker.io/envoyproxy/envoy:v1.40.0" // that of the example
	say("giving them, and Envoy's, to the node")
	for _, image := range []node.Image{ca, agent, envoy} {
		if err := n.Import(ctx, image); err != nil {
			return nil, err
		}
	}
	return &Site{n, root}, n.Volume(ctx, "ca")
}

// images are the values that name them: on a real cluster they come from a registry.
var images = []string{"image.registry=localhost", "image.tag=test", "image.pullPolicy=Never"}

// Install installs the chart, and waits until the CA and the agent are ready. Values are as for --set.
func (s *Site) Install(ctx context.Context, values ...string) error {
	if _, err := s.Helm(ctx, s.release("install", append([]string{"--create-namespace"}, sets(values)...)...)...); err != nil {
		return err
	}
	return s.RolledOut(ctx)
}

// Upgrade changes values; those of before stay.
func (s *Site) Upgrade(ctx context.Context, args ...string) error {
	if _, err := s.Helm(ctx, s.release("upgrade", append([]string{"--reuse-values"}, args...)...)...); err != nil {
		return err
	}
	return s.RolledOut(ctx)
}

func (s *Site) release(verb string, args ...string) []string {
	return append([]string{verb, Namespace, filepath.Join(s.root, chart.Dir), "--namespace", Namespace}, args...)
}

func sets(values []string) (args []string) {
	for _, v := range append(images, values...) {
		args = append(args, "--set", v)
	}
	return args
}

// Uninstall takes the release away, and the namespace, which Helm leaves.
func (s *Site) Uninstall(ctx context.Context) error {
	if _, err := s.Helm(ctx, "uninstall", Namespace, "--namespace", Namespace, "--wait", "--timeout", patience.String()); err != nil {
		return err
	}
	_, err := s.Kubectl(ctx, "delete", "namespace", Namespace, "--timeout", patience.String())
	return err
}

// RolledOut waits until CA and agents run as they should by now.
func (s *Site) RolledOut(ctx context.Context) error {
	for _, what := range []string{"statefulset/meshca", "daemonset/meshca-agent"} {
		if err := s.rolledOut(ctx, Namespace, what); err != nil {
			return err
		}
	}
	return nil
}

func (s *Site) rolledOut(ctx context.Context, namespace, what string) error {
	_, err := s.Kubectl(ctx, "--namespace", namespace, "rollout", "status", what, "--timeout", patience.String())
	if err == nil {
		return nil
	}
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	defer cancel()
	events, _ := s.Kubectl(after, "events", "--all-namespaces", "--types=Warning")
	return fmt.Errorf("%w\n%s", err, events)
}

// Example is what `kubectl apply -f deploy/examples` applies.
func (s *Site) Example() (string, error) {
	files, err := filepath.Glob(filepath.Join(s.root, "deploy", "examples", "*.yaml"))
	if err != nil {
		return "", err
	}
	var docs []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		docs = append(docs, string(text))
	}
	return strings.Join(docs, "---\n"), nil
}

// ApplyExample applies the example, or what was made of it, and waits until the visitor has got an answer.
func (s *Site) ApplyExample(ctx context.Context, manifest string) error {
	if err := s.Apply(ctx, manifest); err != nil {
		return err
	}
	for _, what := range []string{"deployment/greeter", "deployment/visitor"} {
		if err := s.rolledOut(ctx, "demo", what); err != nil {
			return err
		}
	}
	return nil
}

// Visit asks the visitor's Service, through the API server, as the README tells.
func (s *Site) Visit(ctx context.Context) (string, error) {
	return s.Kubectl(ctx, "get", "--raw", "/api/v1/namespaces/demo/services/visitor/proxy/")
}

// Certctl runs certctl in the CA's pod.
func (s *Site) Certctl(ctx context.Context, args ...string) (string, error) {
	return s.Kubectl(ctx, append([]string{"--namespace", Namespace, "exec", "meshca-0", "--", "certctl"}, args...)...)
}

// AgentCertctl runs certctl in the agent's pod.
func (s *Site) AgentCertctl(ctx context.Context, args ...string) (string, error) {
	return s.Kubectl(ctx, append([]string{"--namespace", Namespace, "exec", "daemonset/meshca-agent", "--", "certctl"}, args...)...)
}

// Issued is how many SVIDs a service account of the example has got.
func (s *Site) Issued(ctx context.Context, account string) (int, error) {
	text, err := s.Certctl(ctx, "svid", "list", "--all", "-n", "demo", "--service-account", account, "-o", "json")
	if err != nil {
		return 0, err
	}
	var list struct{ Entries []json.RawMessage }
	err = json.Unmarshal([]byte(text), &list)
	return len(list.Entries), err
}

// Tally is what came of traffic: see test/node/inpod.
type Tally struct {
	OK, Failed int64
	Last       string
	Answers    int
	Answer     string
}

// Send sends requests to a Service of the namespace demo from a pod called name, until the pod is deleted.
func (s *Site) Send(ctx context.Context, name, service string, perSecond int) error {
	return s.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: demo, labels: {app: %[1]s}}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: inpod
      image: localhost/inpod:test
      imagePullPolicy: Never
      command: [/inpod, traffic, "http://%[2]s.demo.svc/", "%[3]d", ":9999"]
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
`, name, service, perSecond))
}

// Sent is what came of it so far.
func (s *Site) Sent(ctx context.Context, name string) (Tally, error) {
	var t Tally
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	text, err := s.Clientset.CoreV1().Pods("demo").ProxyGet("http", name, "9999", "/", nil).DoRaw(ctx)
	if err != nil {
		return t, err
	}
	return t, json.Unmarshal(text, &t)
}
