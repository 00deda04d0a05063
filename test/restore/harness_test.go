// Package restore backs the real CA up, loses what it has, and brings it back, with a real agent beside it; and kills that
// agent, too.
package restore

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/test/parts"
)

// limit is how long anything may take on a busy machine.
const limit = 60 * time.Second

// binaries are built once a run.
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "meshca-restore-")
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

// site is a CA, and an agent with two workloads, without a cluster: tokens come from a local issuer.
type site struct {
	t         *testing.T
	dir, bin  string
	ops       string
	ca, agent *parts.Process
	first     uint64 // the sequence of the CA's first bundle
}

func newSite(t *testing.T) *site {
	t.Helper()
	bin, err := binaries()
	check(t, err)
	dir, err := os.MkdirTemp("", "restore-") // not t.TempDir: a socket's path has 107 bytes at most
	check(t, err)
	s := &site{t: t, dir: dir, bin: bin, ops: fmt.Sprintf("127.0.0.1:%d", freePort(t))}
	t.Cleanup(s.end)
	tokens, err := localissuer.Open(dir, "https://tokens.test")
	check(t, err)
	jwks, err := tokens.JWKS()
	check(t, err)
	s.write("jwks.json", string(jwks))
	for name, audience := range map[string]string{"meshca-agent": "meshca-agent", "web": "meshca", "db": "meshca"} {
		namespace := "shop"
		if name == "meshca-agent" {
			namespace = "meshca"
		}
		token, err := tokens.Token(localissuer.Subject{
			Namespace: namespace, ServiceAccount: name, ServiceAccountUID: "sa-" + name, Pod: name + "-0", PodUID: "pod-" + name, Node: "node1", NodeUID: "uid-node1",
		}, audience, time.Hour)
		check(t, err)
		s.write("tokens/"+name, token)
	}
	port := freePort(t)
	s.write("ca.yaml", fmt.Sprintf(`
trustDomain: mesh.test
listen: 127.0.0.1:%d
opsAddress: %s
adminSocket: %[3]s/admin.sock
stateDir: %[3]s/state
bundleFile: %[3]s/bundle.json
audit: {file: %[3]s/audit.log}
upstream: {disk: {certFile: %[3]s/root/root.crt, keyFile: %[3]s/root/root.key}}
svid: {ttl: 10s}
clusters:
  - {name: one, mode: jwks, issuer: "https://tokens.test", jwks: {file: %[3]s/jwks.json}, liveness: none}
`, port, s.ops, dir))
	s.write("agent.yaml", fmt.Sprintf(`
trustDomain: mesh.test
cluster: one
server: 127.0.0.1:%d
tokenFile: %[2]s/tokens/meshca-agent
bundleFile: %[2]s/bundle.json
runtimeDir: %[2]s/run
stateDir: %[2]s/agent
opsAddress: 127.0.0.1:%[3]d
workloads:
  - {socket: %[2]s/web.sock, tokenFile: %[2]s/tokens/web}
  - {socket: %[2]s/db.sock, tokenFile: %[2]s/tokens/db}
`, port, dir, freePort(t)))
	check(t, os.Mkdir(s.file("root"), 0o700))
	s.must("meshca", "root", "create", "--config", s.file("ca.yaml"))
	return s
}

func (s *site) end() {
	for _, p := range []*parts.Process{s.ca, s.agent} {
		if p == nil {
			continue
		}
		p.Stop(15 * time.Second)
		if s.t.Failed() {
			s.t.Logf("it printed last:\n%s", p.Output())
		}
	}
	_ = os.RemoveAll(s.dir)
}

func (s *site) file(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(name, text string) {
	s.t.Helper()
	check(s.t, os.MkdirAll(filepath.Dir(s.file(name)), 0o755))
	check(s.t, os.WriteFile(s.file(name), []byte(text), 0o600))
}

func (s *site) startCA() {
	s.t.Helper()
	var err error
	s.ca, err = parts.Start(parts.Command{Path: filepath.Join(s.bin, "meshca"), Args: []string{"serve", "--config", s.file("ca.yaml")}})
	check(s.t, err)
	s.until("the CA answers", func() error { _, _, err := s.readyz(); return err })
	if s.first != 0 {
		return
	}
	s.until("the CA has written its bundle", func() error {
		var bundle struct {
			Sequence uint64 `json:"spiffe_sequence"`
		}
		data, err := os.ReadFile(s.file("bundle.json"))
		if err == nil {
			err = json.Unmarshal(data, &bundle)
		}
		s.first = bundle.Sequence
		return err
	})
}

func (s *site) killCA() { s.ca.Kill() }

func (s *site) startAgent() {
	s.t.Helper()
	var err error
	s.agent, err = parts.Start(parts.Command{Path: filepath.Join(s.bin, "meshca-agent"), Args: []string{"run", "--config", s.file("agent.yaml")}})
	check(s.t, err)
}

func (s *site) readyz() (code int, says string, err error) {
	resp, err := http.Get("http://" + s.ops + "/readyz")
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

// ready waits until /readyz has this code and says this.
func (s *site) ready(code int, says string) {
	s.t.Helper()
	s.until(fmt.Sprintf("/readyz is %d", code), func() error {
		got, body, err := s.readyz()
		if err == nil && (got != code || !strings.Contains(body, says)) {
			err = fmt.Errorf("%d %s", got, body)
		}
		return err
	})
}

func (s *site) until(what string, try func() error) {
	s.t.Helper()
	err := try()
	for end := time.Now().Add(limit); err != nil; err = try() {
		if time.Now().After(end) {
			s.t.Fatalf("waited %s in vain: %s: %v", limit, what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// run runs one of the binaries; meshca's and certctl's sockets are the site's.
func (s *site) run(binary string, args ...string) (out string, code int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), limit)
	defer cancel()
	c := exec.CommandContext(ctx, filepath.Join(s.bin, binary), args...)
	b, err := c.CombinedOutput()
	if c.ProcessState == nil {
		s.t.Fatalf("%s: %v", binary, err)
	}
	return string(b), c.ProcessState.ExitCode()
}

func (s *site) must(binary string, args ...string) string {
	s.t.Helper()
	out, code := s.run(binary, args...)
	if code != 0 {
		s.t.Fatalf("%s %s: exit code %d\n%s", binary, strings.Join(args, " "), code, out)
	}
	return out
}

// order has certctl order the CA.
func (s *site) order(args ...string) string {
	s.t.Helper()
	return s.must("certctl", append([]string{"--socket", s.file("admin.sock")}, args...)...)
}

func (s *site) restore(args ...string) (string, int) {
	s.t.Helper()
	return s.run("meshca", append([]string{"restore", "--config", s.file("ca.yaml")}, args...)...)
}

// refused wants a restore to end with 1, and to say all this.
func (s *site) refused(args []string, says ...string) {
	s.t.Helper()
	out, code := s.restore(args...)
	if code != 1 {
		s.t.Errorf("restore %v: exit code %d\n%s", args, code, out)
	}
	for _, want := range says {
		if !strings.Contains(out, want) {
			s.t.Errorf("restore %v does not say %q:\n%s", args, want, out)
		}
	}
}

// agentStatus is what the agent says of itself.
type agentStatus struct {
	BundleSequence uint64 `json:",string"`
	Workloads      []struct {
		Socket, State string
		LastRefusal   struct{ Reason string }
		Svid          struct{ Serial string }
	}
}

func (s *site) agentSays() (agentStatus, error) {
	s.t.Helper()
	out, code := s.run("certctl", "--agent="+s.file("run/admin.sock"), "status", "-o", "json")
	var all struct{ Agent agentStatus }
	if code != 0 {
		return all.Agent, fmt.Errorf("certctl status: %s", out)
	}
	return all.Agent, json.Unmarshal([]byte(out), &all)
}

// workload waits until the agent says that it is in this state and was last refused for this reason, if one is given.
func (s *site) workload(name, state, reason string) (serial string) {
	s.t.Helper()
	s.until(name+" is "+state+" "+reason, func() error {
		a, err := s.agentSays()
		if err != nil {
			return err
		}
		for _, w := range a.Workloads {
			if w.Socket != s.file(name+".sock") {
				continue
			}
			if serial = w.Svid.Serial; w.State != state || reason != "" && w.LastRefusal.Reason != reason {
				return fmt.Errorf("it is %s %s", w.State, w.LastRefusal.Reason)
			}
		}
		return nil
	})
	return serial
}

// bundle waits until the agent has the CA's n-th bundle, or a later one. The sequence of the first tells when the store was made.
func (s *site) bundle(n uint64) {
	s.t.Helper()
	s.until(fmt.Sprintf("the agent has bundle %d", n), func() error {
		a, err := s.agentSays()
		if least := s.first + n - 1; err == nil && a.BundleSequence < least {
			err = fmt.Errorf("it has %d, and is to have %d", a.BundleSequence, least)
		}
		return err
	})
}

func freePort(t *testing.T) int {
	t.Helper()
	port, err := parts.FreePort()
	check(t, err)
	return port
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
