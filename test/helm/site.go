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

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/test/chart"
	"github.com/meshca/meshca/test/node"
	"github.com/meshca/meshca/test/parts"
)

const (
	// Namespace is where the release is, and its name.
	Namespace = "meshca"
	// Registry is where the README has the images.
	Registry = "registry.example/meshca"
)

// patience is for what a person would wait for, on a machine that has other things to do.
const patience = 3 * time.Minute

// Site is a node with what an installation needs: images, a volume, and the files of this repository.
type Site struct {
	*node.Node
	// Root is the folder of this repository.
	Root string
}

// Prepare gives the node the images of this checkout, as a registry would, Envoy's by its public name, and a volume. It
// tells say what it does.
func Prepare(ctx context.Context, n *node.Node, say func(string)) (*Site, error) {
	root, err := parts.Root()
	if err != nil {
		return nil, err
	}
	version, err := chart.AppVersion()
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
	// As the chart and the example name them.
	ca.Name, agent.Name, envoy.Name = Registry+"/meshca:"+version, Registry+"/meshca-agent:"+version, "docker.io/envoyproxy/envoy:v1.40.0"
	say("giving them, and Envoy's, to the node")
	for _, image := range []node.Image{ca, agent, envoy} {
		if err := n.Import(ctx, image); err != nil {
			return nil, err
		}
	}
	return &Site{n, root}, n.Volume(ctx, "ca")
}

// Install installs the chart, with further arguments of Helm's if need be, and waits until the CA and the agent are ready. The
// README's test does the same by the README's own words.
func (s *Site) Install(ctx context.Context, args ...string) error {
	if err := s.Begin(ctx, args...); err != nil {
		return err
	}
	return s.RolledOut(ctx)
}

// Begin is Install without the wait.
func (s *Site) Begin(ctx context.Context, args ...string) error {
	args = append([]string{"--create-namespace", "--set", "image.registry=" + Registry}, args...)
	_, err := s.Helm(ctx, s.release("install", args...)...)
	return err
}

// Upgrade changes values; those of before stay.
func (s *Site) Upgrade(ctx context.Context, args ...string) error {
	if _, err := s.Helm(ctx, s.release("upgrade", append([]string{"--reuse-values"}, args...)...)...); err != nil {
		return err
	}
	return s.RolledOut(ctx)
}

func (s *Site) release(verb string, args ...string) []string {
	return append([]string{verb, Namespace, filepath.Join(s.Root, chart.Dir), "--namespace", Namespace}, args...)
}

// Live has SVIDs live for ttl from now on, by policy: waits until the CA has heard of it, and has agents renew what they hold at
// once. By themselves they would within ten minutes.
func (s *Site) Live(ctx context.Context, ttl time.Duration) error {
	if err := s.Upgrade(ctx, "--set", "ca.policy.rules[0].name=all", "--set", "ca.policy.rules[0].ttl="+ttl.String()); err != nil {
		return err
	}
	err := s.Await(ctx, "the policy to be in force", func(ctx context.Context) error {
		answer, err := s.Certctl(ctx, "policy", "test", "demo/visitor")
		if err == nil && !strings.Contains(answer, ttl.String()) {
			err = fmt.Errorf("the CA says\n%s", answer)
		}
		return err
	})
	if err != nil {
		return err
	}
	_, err = s.Certctl(ctx, "svid", "renew", "--all", "--spread", "0s")
	return err
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
	files, err := filepath.Glob(filepath.Join(s.Root, "deploy", "examples", "*.yaml"))
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

// ApplyExample applies the example, or what was made of it, and waits until its pods are those, and the only ones: to one
// that is going requests may still be sent.
func (s *Site) ApplyExample(ctx context.Context, manifest string) error {
	if err := s.Apply(ctx, manifest); err != nil {
		return err
	}
	deployments, err := s.Clientset.AppsV1().Deployments("demo").List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, d := range deployments.Items {
		if err := s.rolledOut(ctx, "demo", "deployment/"+d.Name); err != nil {
			return err
		}
	}
	return s.Await(ctx, "the pods of before to be gone", func(ctx context.Context) error {
		pods, err := s.Clientset.CoreV1().Pods("demo").List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, pod := range pods.Items {
			if pod.DeletionTimestamp != nil {
				return fmt.Errorf("%s is going", pod.Name)
			}
		}
		return nil
	})
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
