// Package files runs the real CA and the real agent, and beside them what reads an agent's files: a stock nginx, a stock
// HAProxy and gRPC's own file_watcher, with the configurations of docs/examples/files.
package files

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/meshca/meshca/api/admin/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/test/parts"
)

// spiffeMaps makes gRPC take spiffe_trust_bundle_map_file (gRFC A87); it is read when the program starts.
const spiffeMaps = "GRPC_EXPERIMENTAL_XDS_MTLS_SPIFFE"

func TestMain(m *testing.M) {
	if os.Getenv(spiffeMaps) == "" {
		self, err := os.Executable()
		if err == nil {
			err = syscall.Exec(self, os.Args, append(os.Environ(), spiffeMaps+"=true"))
		}
		fmt.Fprintln(os.Stderr, "the tests cannot be started with", spiffeMaps, "set:", err)
		os.Exit(1)
	}
	code := m.Run()
	if dir, _ := binaries(); dir != "" {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

// binaries are built once a run.
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "meshca-files-")
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

const (
	ttl        = 12 * time.Second
	startLimit = 60 * time.Second
	// refresh is how often gRPC looks at the files.
	refresh = 200 * time.Millisecond
)

// site is a CA and an agent with the workloads of the example.
type site struct {
	t        *testing.T
	dir, bin string
	paths    *strings.Replacer // of the examples, to those here
	ports    map[string]string
}

func newSite(t *testing.T) *site {
	t.Helper()
	bin, err := binaries()
	check(t, err)
	dir, err := os.MkdirTemp("", "fs-") // short: sockets lie in it
	check(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &site{t: t, dir: dir, bin: bin, ports: map[string]string{}}
	for _, name := range []string{"ca", "caops", "agentops", "nginx", "haproxy"} {
		s.ports[name] = freePort(t)
	}
	s.paths = strings.NewReplacer(
		"mesh.example\n", "mesh.test\n", "ca.mesh.example:8443", "127.0.0.1:"+s.ports["ca"],
		"/var/run/secrets/", dir+"/tokens/", "/etc/meshca/", dir+"/", "/run/meshca-agent/", dir+"/",
		"/usr/sbin/nginx, -s", s.daemon("nginx")+", -c, "+dir+"/nginx-main.conf, -s", "/run/haproxy.pid", dir+"/haproxy.pid",
		"/etc/", dir+"/", "127.0.0.1:8444", "127.0.0.1:"+s.ports["nginx"], "127.0.0.1:8445", "127.0.0.1:"+s.ports["haproxy"],
		`"600s"`, fmt.Sprintf("%q", fmt.Sprint(refresh.Seconds(), "s")),
	)
	s.startCA()
	s.startAgent()
	return s
}

// daemon finds Debian's nginx or HAProxy; "" where it is not installed.
func (s *site) daemon(name string) string {
	for _, path := range []string{"/usr/sbin/" + name, name} {
		if found, err := exec.LookPath(path); err == nil {
			return found
		}
	}
	return ""
}

func (s *site) file(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(name, text string) string {
	s.t.Helper()
	check(s.t, os.MkdirAll(filepath.Dir(s.file(name)), 0o755))
	check(s.t, os.WriteFile(s.file(name), []byte(text), 0o600))
	return s.file(name)
}

// example is a file of docs/examples/files with the paths of here.
func (s *site) example(name string) string {
	s.t.Helper()
	root, err := parts.Root()
	check(s.t, err)
	text, err := os.ReadFile(filepath.Join(root, "docs", "examples", "files", name))
	check(s.t, err)
	return s.paths.Replace(string(text))
}

// run starts a process that ends with the test, which shows what it printed when it fails.
func (s *site) run(path string, args ...string) *parts.Process {
	s.t.Helper()
	p, err := parts.Start(parts.Command{Path: path, Args: args})
	check(s.t, err)
	s.t.Cleanup(func() {
		p.Stop(15 * time.Second)
		if s.t.Failed() {
			s.t.Logf("%s printed last:\n%s", path, p.Output())
		}
	})
	return p
}

func (s *site) await(p *parts.Process, ready func(context.Context) error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), startLimit)
	defer cancel()
	check(s.t, p.Await(ctx, ready))
}

func readyz(port string) func(context.Context) error {
	return func(ctx context.Context) error {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:"+port+"/readyz", nil)
		if err != nil {
			return err
		}
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz: %s", answer.Status)
		}
		return nil
	}
}

func (s *site) startCA() {
	s.t.Helper()
	tokens, err := localissuer.Open(s.dir, "https://tokens.test")
	check(s.t, err)
	jwks, err := tokens.JWKS()
	check(s.t, err)
	s.write("jwks.json", string(jwks))
	token := func(audience, ns, account string) {
		text, err := tokens.Token(localissuer.Subject{
			Namespace: ns, ServiceAccount: account, ServiceAccountUID: "sa-" + account, Pod: account + "-1", PodUID: "pod-" + account, Node: "node1", NodeUID: "uid-node1",
		}, audience, time.Hour)
		check(s.t, err)
		name := account
		if ns == "meshca" {
			name = "meshca"
		}
		s.write("tokens/"+name+"/token", text)
	}
	token("meshca-agent", "meshca", "meshca-agent")
	for _, account := range []string{"nginx", "haproxy", "greeter", "web"} {
		token("meshca", "shop", account)
	}
	config := s.write("ca.yaml", fmt.Sprintf(`
trustDomain: mesh.test
listen: 127.0.0.1:%s
opsAddress: 127.0.0.1:%s
adminSocket: %[3]s/ca.sock
stateDir: %[3]s/ca
bundleFile: %[3]s/bundle.json
audit: {file: %[3]s/audit.log}
upstream: {disk: {}}
svid: {ttl: %[4]s}
readers: [{name: gRPC looks at its files by itself, refresh: 2s}]
clusters:
  - {name: prod, mode: jwks, issuer: "https://tokens.test", jwks: {file: %[3]s/jwks.json}, liveness: none}
`, s.ports["ca"], s.ports["caops"], s.dir, ttl))
	out, err := exec.CommandContext(s.t.Context(), filepath.Join(s.bin, "meshca"), "root", "create", "--config", config).CombinedOutput()
	if err != nil {
		s.t.Fatalf("root create: %v\n%s", err, out)
	}
	s.await(s.run(filepath.Join(s.bin, "meshca"), "serve", "--config", config), readyz(s.ports["caops"]))
}

// startAgent runs the agent with the example's configuration.
func (s *site) startAgent() {
	s.t.Helper()
	config := s.write("agent.yaml", s.example("agent.yaml")+fmt.Sprintf("runtimeDir: %s/agent\nstateDir: %[1]s/agent\nopsAddress: 127.0.0.1:%[2]s\n", s.dir, s.ports["agentops"]))
	p := s.run(filepath.Join(s.bin, "meshca-agent"), "run", "--config", config)
	s.await(p, readyz(s.ports["agentops"]))
	s.await(p, func(context.Context) error {
		for _, name := range []string{"nginx/tls/tls.key", "haproxy/tls/credentialbundle.pem", "greeter/tls/private_key.pem", "web/tls/tls.key"} {
			if _, err := os.Stat(s.file(name)); err != nil {
				return err
			}
		}
		return nil
	})
}

// rotateRoot replaces the root, and returns when the old one is trusted no more.
func (s *site) rotateRoot() {
	s.t.Helper()
	conn, err := client.Open(s.t.Context(), s.file("ca.sock"))
	check(s.t, err)
	defer conn.Close()
	_, err = conn.Authorities.RotateRoot(s.t.Context(), &meshcav1.RotateRootRequest{})
	check(s.t, err)
	var last *meshcav1.RolloutStatus
	for end := time.Now().Add(10 * ttl); last.GetStep() != "out"; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("the rollout did not come to its end: %v", last)
		}
		all, err := conn.Authorities.GetAuthorities(s.t.Context(), &meshcav1.GetAuthoritiesRequest{})
		check(s.t, err)
		last = all.GetRollout()
	}
}

// deliveries is what the agent says of its files.
func (s *site) deliveries() []*meshcav1.DeliveryStatus {
	s.t.Helper()
	conn, err := client.Open(s.t.Context(), s.file("agent/admin.sock"))
	check(s.t, err)
	defer conn.Close()
	status, err := conn.Agent.GetAgentStatus(s.t.Context(), &meshcav1.GetAgentStatusRequest{})
	check(s.t, err)
	return status.GetDeliveries()
}

func freePort(t *testing.T) string {
	t.Helper()
	port, err := parts.FreePort()
	check(t, err)
	return strconv.Itoa(port)
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
