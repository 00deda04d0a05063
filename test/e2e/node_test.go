// Package e2e runs meshca as it is installed: the real binaries, against a real API server and real Envoys.
package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/meshca/meshca/test/kube"
	"github.com/meshca/meshca/test/parts"
	"github.com/meshca/meshca/test/vault"
)

const startLimit = 60 * time.Second

// binaries are built once a run.
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "meshca-e2e-")
	if err != nil {
		return "", err
	}
	parts.SeeSource()
	c := exec.Command("go", "build", "-o", dir+"/", "github.com/meshca/meshca/cmd/...")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		return dir, fmt.Errorf("go build: %w\n%s", err, out)
	}
	return dir, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, _ := binaries(); dir != "" {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

// site is a cluster with a CA beside it.
type site struct {
	t    *testing.T
	dir  string
	bin  string
	kube *kube.Cluster
	mode string
	ttl  time.Duration
	port int
	ca   *parts.Process
}

// agentNode is a node of the site, with the agent on it.
type agentNode struct {
	site      *site
	name, dir string
	pod       *corev1.Pod
	workloads []string // socket: token file, as the configuration has them
	agent     *parts.Process
}

// holder holds the root of a site.
type holder struct {
	// upstream is its piece of the CA's configuration.
	upstream string
	// create says that `meshca root create` makes the root.
	create bool
	// next returns the issuer to name when the root is to be replaced; empty where the upstream makes one by itself.
	next func() string
}

// onDisk has the root in files.
func onDisk() holder {
	return holder{upstream: "upstream: {disk: {}}\n", create: true, next: func() string { return "" }}
}

// inVault starts a Vault that was set up as deploy/vault tells.
func inVault(t *testing.T) holder {
	t.Helper()
	d, err := vault.SetUp(t.Context(), vault.Dev(t), filepath.Join(t.TempDir(), "setup"))
	check(t, err)
	made := 1
	return holder{upstream: d.Upstream, next: func() string {
		made++
		name := fmt.Sprintf("root-%d", made)
		check(t, d.NextRoot(t.Context(), name))
		return name
	}}
}

// newSite is a site with its root on disk.
func newSite(t *testing.T, mode string, ttl time.Duration) *site {
	t.Helper()
	return newSiteOf(t, onDisk(), mode, ttl)
}

func newSiteOf(t *testing.T, root holder, mode string, ttl time.Duration) *site {
	t.Helper()
	bin, err := binaries()
	check(t, err)
	// Not t.TempDir: a socket's path has 107 bytes at most, and test names are long.
	dir, err := os.MkdirTemp("", "e2e-")
	check(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &site{t: t, dir: dir, bin: bin, kube: kube.Start(t), mode: mode, ttl: ttl, port: freePort(t)}
	for _, ns := range []string{"meshca", "shop"} {
		_, err := s.kube.CreateNamespace(t.Context(), ns)
		check(t, err)
	}
	_, err = s.kube.CreateServiceAccount(t.Context(), "meshca", "meshca-agent")
	check(t, err)
	for _, sa := range []string{"web", "db"} {
		_, err := s.kube.CreateServiceAccount(t.Context(), "shop", sa)
		check(t, err)
	}
	s.write("ca.yaml", fmt.Sprintf(`
trustDomain: mesh.test
listen: 127.0.0.1:%d
opsAddress: 127.0.0.1:%d
adminSocket: %[3]s/admin.sock
stateDir: %[3]s/state
bundleFile: %[3]s/bundle.json
audit: {file: %[3]s/audit.log}
svid: {ttl: %[4]s}
clusters:
  - {name: one, mode: %[5]s, kubeconfig: %[6]s}
%[7]s`, s.port, freePort(t), dir, ttl, mode, s.kube.Kubeconfig, root.upstream))
	if root.create {
		out, err := exec.CommandContext(t.Context(), s.path("meshca"), "root", "create", "--config", s.file("ca.yaml")).CombinedOutput()
		if err != nil {
			t.Fatalf("root create: %v\n%s", err, out)
		}
	}
	t.Cleanup(func() {
		if s.ca != nil {
			s.ca.Stop(15 * time.Second)
		}
		if t.Failed() {
			if s.ca != nil {
				t.Logf("the CA printed last:\n%s", s.ca.Output())
			}
			audit, _ := os.ReadFile(s.file("audit.log"))
			t.Logf("the audit log ends:\n%s", audit[max(0, len(audit)-8<<10):])
		}
	})
	return s
}

func (s *site) path(binary string) string { return filepath.Join(s.bin, binary) }
func (s *site) file(name string) string   { return filepath.Join(s.dir, name) }

func (s *site) write(name, text string) {
	s.t.Helper()
	check(s.t, os.MkdirAll(filepath.Dir(s.file(name)), 0o755))
	check(s.t, os.WriteFile(s.file(name), []byte(text), 0o600))
}

// startCA starts the CA and waits until it can sign.
func (s *site) startCA() {
	s.t.Helper()
	var err error
	s.ca, err = parts.Start(parts.Command{Path: s.path("meshca"), Args: []string{"serve", "--config", s.file("ca.yaml")}})
	check(s.t, err)
	s.awaitReady(s.ca, s.opsAddress("ca.yaml"))
}

func (s *site) stopCA() {
	s.t.Helper()
	s.ca.Stop(15 * time.Second)
	s.ca = nil
}

func (s *site) opsAddress(config string) string {
	data, err := os.ReadFile(s.file(config))
	check(s.t, err)
	_, after, _ := strings.Cut(string(data), "opsAddress: ")
	address, _, _ := strings.Cut(after, "\n")
	return address
}

func (s *site) awaitReady(p *parts.Process, ops string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), startLimit)
	defer cancel()
	check(s.t, p.Await(ctx, func(ctx context.Context) error {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+ops+"/readyz", nil)
		if err != nil {
			return err
		}
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		var body bytes.Buffer
		_, _ = body.ReadFrom(answer.Body)
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz: %s", body.String())
		}
		return nil
	}))
}

// node makes a Node with an agent's pod on it.
func (s *site) node(name string) *agentNode {
	s.t.Helper()
	_, err := s.kube.CreateNode(s.t.Context(), name)
	check(s.t, err)
	pod, err := s.kube.CreatePod(s.t.Context(), "meshca", "agent-"+name, "meshca-agent", name)
	check(s.t, err)
	n := &agentNode{site: s, name: name, dir: s.file(name), pod: pod}
	s.write(name+"/token", s.token(pod, "meshca-agent"))
	s.t.Cleanup(func() {
		if n.agent != nil {
			n.agent.Stop(15 * time.Second)
			if s.t.Failed() {
				s.t.Logf("the agent on %s printed last:\n%s", name, n.agent.Output())
			}
		}
	})
	return n
}

// token is what kubelet would project into the pod.
func (s *site) token(pod *corev1.Pod, audience string) string {
	s.t.Helper()
	token, err := s.kube.Token(s.t.Context(), pod.Namespace, pod.Spec.ServiceAccountName, pod, audience, time.Hour)
	check(s.t, err)
	return token
}

// workload makes a pod on the node and a socket for it, and returns the pod.
func (n *agentNode) workload(account string) *corev1.Pod {
	n.site.t.Helper()
	pod, err := n.site.kube.CreatePod(n.site.t.Context(), "shop", account+"-on-"+n.name, account, n.name)
	check(n.site.t, err)
	n.serve(account, n.site.token(pod, "meshca"))
	return pod
}

// serve configures a socket for whoever the token is of.
func (n *agentNode) serve(name, token string) {
	n.site.t.Helper()
	n.site.write(filepath.Join(n.name, "tokens", name), token)
	n.workloads = append(n.workloads, fmt.Sprintf("  - {socket: %s, tokenFile: %s}", n.socket(name), filepath.Join(n.dir, "tokens", name)))
}

func (n *agentNode) socket(name string) string { return filepath.Join(n.dir, name+".sock") }

// start starts the agent; it does not wait.
func (n *agentNode) start() {
	n.site.t.Helper()
	ops := freePort(n.site.t)
	n.site.write(filepath.Join(n.name, "agent.yaml"), fmt.Sprintf(`
trustDomain: mesh.test
cluster: one
server: 127.0.0.1:%d
tokenFile: %[2]s/token
bundleFile: %[3]s/bundle.json
runtimeDir: %[2]s/run
stateDir: %[2]s/state
opsAddress: 127.0.0.1:%[4]d
workloads:
%[5]s
`, n.site.port, n.dir, n.site.dir, ops, strings.Join(n.workloads, "\n")))
	var err error
	n.agent, err = parts.Start(parts.Command{Path: n.site.path("meshca-agent"), Args: []string{"run", "--config", filepath.Join(n.dir, "agent.yaml")}})
	check(n.site.t, err)
}

func (n *agentNode) stop() {
	n.agent.Stop(15 * time.Second)
	n.agent = nil
}

// kill ends the agent as a node's OOM killer would.
func (n *agentNode) kill() {
	check(n.site.t, n.agent.Signal(syscall.SIGKILL))
	<-n.agent.Done()
	n.agent = nil
}

// certctl runs certctl against the agent's admin socket or the CA's, and returns its output and exit code.
func (s *site) certctl(args ...string) (string, int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	c := exec.CommandContext(ctx, s.path("certctl"), args...)
	out, err := c.CombinedOutput()
	if c.ProcessState == nil {
		s.t.Fatalf("certctl: %v", err)
	}
	return string(out), c.ProcessState.ExitCode()
}

func freePort(t *testing.T) int {
	t.Helper()
	port, err := parts.FreePort()
	check(t, err)
	return port
}

func eventually(t *testing.T, what string, limit time.Duration, done func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if done() {
			return
		}
	}
	t.Fatalf("waited %s in vain for %s", limit, what)
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
