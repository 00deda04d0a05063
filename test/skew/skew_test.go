package skew

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/test/parts"
)

// TestOneVersionApart upgrades an installation in both orders. The CA keeps its store, the agent what it holds, and what the
// one asks of the other is done while they differ: rotation, a denial, another root.
func TestOneVersionApart(t *testing.T) {
	old, now := previous(t), current(t)
	for name, middle := range map[string]struct{ ca, agent version }{
		"the CA first":     {now, old},
		"the agents first": {old, now},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, now)
			s.run(old, old)
			before := s.serial()
			s.run(middle.ca, middle.agent)
			s.rotates(before)
			s.denies()
			s.replacesItsRoot()
			last := s.serial()
			s.run(now, now)
			s.rotates(last)
		})
	}
}

const (
	workload = "spiffe://mesh.test/ns/shop/sa/web"
	ttl      = "8s"
	patience = 2 * time.Minute
)

// site is a CA and an agent on this machine, with a local issuer of tokens in a cluster's place.
type site struct {
	t         *testing.T
	dir       string
	certctl   string
	ca, agent *parts.Process
}

func newSite(t *testing.T, admin version) *site {
	t.Helper()
	dir, err := os.MkdirTemp("", "skew-") // short: sockets lie in it
	check(t, err)
	s := &site{t: t, dir: dir, certctl: admin.path("certctl")}
	t.Cleanup(func() {
		for name, p := range map[string]*parts.Process{"CA": s.ca, "agent": s.agent} {
			if p != nil {
				p.Stop(15 * time.Second)
				if t.Failed() {
					t.Logf("the %s printed last:\n%s", name, p.Output())
				}
			}
		}
		_ = os.RemoveAll(dir)
	})
	const issuer = "https://tokens.test"
	tokens, err := localissuer.Open(dir, issuer)
	check(t, err)
	keys, err := tokens.JWKS()
	check(t, err)
	s.write("jwks.json", string(keys))
	for file, subject := range map[string]localissuer.Subject{
		"meshca-agent": {Namespace: "meshca", ServiceAccount: "meshca-agent", ServiceAccountUID: "a", Pod: "agent", PodUID: "pa", Node: "node1", NodeUID: "n1"},
		"meshca":       {Namespace: "shop", ServiceAccount: "web", ServiceAccountUID: "w", Pod: "web", PodUID: "pw", Node: "node1", NodeUID: "n1"},
	} {
		token, err := tokens.Token(subject, file, time.Hour)
		check(t, err)
		s.write(file+".token", token)
	}
	api := address(t)
	s.write("ca.yaml", fmt.Sprintf(`
trustDomain: mesh.test
listen: %[1]s
opsAddress: %[2]s
adminSocket: %[3]s/ca.sock
stateDir: %[3]s/ca
bundleFile: %[3]s/bundle.json
svid: {ttl: %[4]s}
upstream: {disk: {}}
clusters: [{name: one, mode: jwks, issuer: "%[5]s", jwks: {file: %[3]s/jwks.json}, liveness: none}]
`, api, address(t), dir, ttl, issuer))
	s.write("agent.yaml", fmt.Sprintf(`
trustDomain: mesh.test
cluster: one
server: %[1]s
tokenFile: %[3]s/meshca-agent.token
bundleFile: %[3]s/bundle.json
runtimeDir: %[3]s/run
stateDir: %[3]s/agent
adminSocket: %[3]s/agent.sock
opsAddress: %[2]s
workloads: [{socket: %[3]s/web.sock, tokenFile: %[3]s/meshca.token}]
`, api, address(t), dir))
	if out, err := exec.Command(admin.path("meshca"), "root", "create", "--config", s.file("ca.yaml")).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return s
}

// run puts these versions in the place of those that run, the CA first.
func (s *site) run(ca, agent version) {
	s.t.Helper()
	s.t.Logf("CA %s, agent %s", ca.name, agent.name)
	s.ca = s.replace(s.ca, "ca.yaml", ca.path("meshca"), "serve")
	s.agent = s.replace(s.agent, "agent.yaml", agent.path("meshca-agent"), "run")
	s.eventually("the workload to be served", func() error { _, err := s.fetch(); return err })
}

func (s *site) replace(running *parts.Process, config, program, verb string) *parts.Process {
	s.t.Helper()
	if running != nil {
		running.Stop(15 * time.Second)
	}
	p, err := parts.Start(parts.Command{Path: program, Args: []string{verb, "--config", s.file(config)}})
	check(s.t, err)
	text, err := os.ReadFile(s.file(config))
	check(s.t, err)
	_, rest, _ := strings.Cut(string(text), "opsAddress: ")
	ops, _, _ := strings.Cut(rest, "\n")
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
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
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz: %s", answer.Status)
		}
		return nil
	}))
	return p
}

// rotates waits for certificates after the one with this serial.
func (s *site) rotates(before string) {
	s.t.Helper()
	for range 2 {
		s.eventually("a rotation", func() error {
			serial, err := s.fetch()
			if err == nil && serial == before {
				err = fmt.Errorf("it is still %s", serial)
			}
			if err == nil {
				before = serial
			}
			return err
		})
	}
}

// denies has the CA deny the identity, and allow it again: orders go to the agent over the stream between the two.
func (s *site) denies() {
	s.t.Helper()
	s.ask("svid", "deny", workload, "--why", "a test")
	s.eventually("the agent to drop a denied identity", func() error {
		if serial, err := s.fetch(); err == nil {
			return fmt.Errorf("%s is served", serial)
		}
		return nil
	})
	s.ask("svid", "allow", workload)
	s.eventually("an identity that is allowed again", func() error { _, err := s.fetch(); return err })
}

// replacesItsRoot takes a rollout through all its steps: each waits for what the agent says it has.
func (s *site) replacesItsRoot() {
	s.t.Helper()
	before := s.roots()
	s.ask("ca", "rotate", "root")
	s.eventually("the new root to be trusted alone", func() error {
		now := s.roots()
		if strings.Count(now, "\n") != strings.Count(before, "\n") || now == before {
			return fmt.Errorf("the agent trusts\n%s", now)
		}
		return nil
	})
	s.rotates(s.serial())
}

// roots are those that the agent trusts, a line each.
func (s *site) roots() string {
	s.t.Helper()
	out, err := s.call("--agent="+s.file("agent.sock"), "bundle", "show", "-o", "json")
	check(s.t, err)
	var bundle struct {
		X509Authorities []struct{ SHA256 string } `json:"x509Authorities"`
	}
	check(s.t, json.Unmarshal([]byte(out), &bundle))
	var lines strings.Builder
	for _, root := range bundle.X509Authorities {
		fmt.Fprintln(&lines, root.SHA256)
	}
	return lines.String()
}

func (s *site) serial() string {
	s.t.Helper()
	serial, err := s.fetch()
	check(s.t, err)
	return serial
}

// fetch asks the workload's socket as a proxy would, and returns what tells one certificate from another. An SVID that
// leads to no trusted root, or has ended, is an error.
func (s *site) fetch() (string, error) {
	out, err := s.call("svid", "fetch", s.file("web.sock"), "-o", "json")
	if err != nil {
		return "", err
	}
	var got struct{ PEM struct{ SVID string } }
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		return "", err
	}
	block, _ := pem.Decode([]byte(got.PEM.SVID))
	if block == nil {
		return "", fmt.Errorf("no certificate in %s", out)
	}
	return fmt.Sprintf("%x", block.Bytes[len(block.Bytes)-16:]), nil // the end of its signature
}

// ask orders the CA by its admin socket.
func (s *site) ask(args ...string) {
	s.t.Helper()
	_, err := s.call(append([]string{"--socket", s.file("ca.sock")}, args...)...)
	check(s.t, err)
}

func (s *site) call(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.certctl, args...)
	var problems strings.Builder
	cmd.Stderr = &problems
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("certctl %s: %w\n%s%s", strings.Join(args, " "), err, out, problems.String())
	}
	return string(out), err
}

func (s *site) file(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(name, text string) {
	s.t.Helper()
	check(s.t, os.WriteFile(s.file(name), []byte(text), 0o600))
}

func (s *site) eventually(what string, done func() error) {
	s.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		err := done()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			s.t.Fatalf("waited for %s in vain: %v", what, err)
		}
	}
}

func address(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	return l.Addr().String()
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
