package kill

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/api/admin/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/rotation"
	"github.com/meshca/meshca/test/parts"
)

var domain = spiffeid.RequireTrustDomainFromString("mesh.test")

const (
	tokenIssuer = "https://tokens.test"
	// share is that of a canary, in percent.
	share = 50
)

// accounts are two workloads' service accounts: a canary signs for the first of them and not for the second.
var accounts = func() []string {
	var in, out string
	for i := 0; in == "" || out == ""; i++ {
		name := fmt.Sprintf("w%d", i)
		if rotation.InShare(idOf(name), share) {
			in = name
		} else {
			out = name
		}
	}
	return []string{in, out}
}()

func idOf(account string) string { return domain.IDString() + "/ns/shop/sa/" + account }

// site is a CA as a process, with a folder, and an agent with two workloads that lives through the CA's deaths.
type site struct {
	dir                    string
	root                   string // the ID of the one that signs at first
	api, failpoints, admin string
	ca                     *parts.Process
	conn                   *client.Conn
	meshca                 string
	http                   *http.Client
	stop                   func()
}

// settings are what differs between runs.
type settings struct {
	ttl time.Duration
	// published is how long a root is held published at least: a reader's refresh time.
	published time.Duration
	// keys is where intermediates' keys are; empty: in memory.
	keys string
}

// kept are settings with intermediates that outlive a process.
func kept(o settings) settings {
	o.keys = "disk"
	return o
}

// newSite makes the CA's root and its configuration, and starts it.
func newSite(b built, dir string, o settings, armed map[string]string) (_ *site, err error) {
	ports, err := freePorts(3)
	if err != nil {
		return nil, err
	}
	s := &site{dir: dir, meshca: b.meshca, api: ports[0], failpoints: ports[1], admin: filepath.Join(dir, "admin.sock"),
		http: &http.Client{Timeout: 30 * time.Second}, stop: func() {}}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	jwks, err := b.tokens.JWKS()
	if err != nil {
		return nil, err
	}
	further := ""
	if o.published > 0 {
		further = fmt.Sprintf("readers: [{name: mirror, refresh: %s}]\n", o.published)
	}
	if o.keys != "" {
		further += fmt.Sprintf("intermediate: {key: {in: %s}}\n", o.keys)
	}
	if err := s.write("jwks.json", string(jwks)); err != nil {
		return nil, err
	}
	if err := s.write("ca.yaml", fmt.Sprintf(`
trustDomain: %s
listen: %s
opsAddress: %s
adminSocket: %s
stateDir: %[5]s/state
bundleFile: %[5]s/bundle.json
audit: {file: %[5]s/audit.log}
upstream: {disk: {}}
svid: {ttl: %[6]s}
rememberedDecisions: 10
clusters:
  - {name: one, mode: jwks, issuer: %[7]q, jwks: {file: %[5]s/jwks.json}, liveness: none}
%[8]s`, domain.Name(), s.api, ports[2], s.admin, dir, o.ttl, tokenIssuer, further)); err != nil {
		return nil, err
	}
	root := disk.Files{Cert: filepath.Join(dir, "state", "root.crt"), Key: filepath.Join(dir, "state", "root.key")}
	made, err := disk.Create(root, disk.CreateOptions{TrustDomain: domain})
	if err != nil {
		return nil, err
	}
	s.root = ca.RootID(made)
	return s, s.start(armed)
}

func (s *site) write(name, text string) error {
	return os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600)
}

// start starts the CA. armed are failpoints that are set from its first moment on.
func (s *site) start(armed map[string]string) error {
	var terms []string
	for name, term := range armed {
		terms = append(terms, name+"="+term)
	}
	var err error
	s.ca, err = parts.Start(parts.Command{Path: s.meshca, Args: []string{"serve", "--config", filepath.Join(s.dir, "ca.yaml")},
		Env: append(os.Environ(), "GOFAIL_HTTP="+s.failpoints, "GOFAIL_FAILPOINTS="+strings.Join(terms, ";"))})
	return err
}

// kill ends the CA as kill -9 does.
func (s *site) kill() {
	s.hangUp()
	s.ca.Kill()
}

func (s *site) bundleFile() string { return filepath.Join(s.dir, "bundle.json") }

// startAgent starts an agent in this process: the one that meshca-agent runs.
func (s *site) startAgent(ctx context.Context, tokens *localissuer.Issuer) (err error) {
	token := func(namespace, account, audience string) (string, error) {
		text, err := tokens.Token(localissuer.Subject{
			Namespace: namespace, ServiceAccount: account, ServiceAccountUID: "sa-" + account, Pod: account, PodUID: "pod-" + account, Node: "node1", NodeUID: "node-1",
		}, audience, time.Hour)
		if err != nil {
			return "", err
		}
		return filepath.Join(s.dir, account+".token"), s.write(account+".token", text)
	}
	c := agent.Config{TrustDomain: domain, Cluster: "one", Server: s.api, BundleFile: s.bundleFile(), RuntimeDir: filepath.Join(s.dir, "agent"), PlainValidation: true, Log: slog.New(slog.DiscardHandler)}
	if c.TokenFile, err = token("meshca", "meshca-agent", registration.AgentAudience); err != nil {
		return err
	}
	for _, account := range accounts {
		file, err := token("shop", account, registration.WorkloadAudience)
		if err != nil {
			return err
		}
		c.Workloads = append(c.Workloads, agent.Workload{Socket: s.socket(account), TokenFile: file})
	}
	a, err := agent.New(c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { _ = a.Run(ctx) })
	s.stop = func() { cancel(); running.Wait() }
	return nil
}

func (s *site) socket(account string) string { return filepath.Join(s.dir, account+".sock") }

// startPeers starts a peer for each workload, which tells the witness. Where it is said how slow they are, they are.
func (s *site) startPeers(ctx context.Context, w *witness, slow []time.Duration) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	for i, account := range accounts {
		p := &peer{account: account, socket: s.socket(account), witness: w}
		if i < len(slow) {
			p.slow = slow[i]
		}
		running.Go(func() { p.run(ctx, sds.NameDefault, p.certificate) })
		running.Go(func() { p.run(ctx, sds.NameRootCA, p.trust) })
	}
	stop := s.stop
	s.stop = func() { cancel(); running.Wait(); stop() }
}

// close ends everything.
func (s *site) close() {
	s.stop()
	s.hangUp()
	if s.ca != nil {
		s.ca.Kill()
	}
	s.http.CloseIdleConnections()
}

func (s *site) hangUp() {
	if s.conn != nil {
		_ = s.conn.Close()
		s.conn = nil
	}
}

// authorities asks the CA how its roots are. A CA that is away, or stands at a failpoint, gives an error soon.
func (s *site) authorities(ctx context.Context) (*meshcav1.GetAuthoritiesResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if s.conn == nil {
		conn, err := client.Open(ctx, s.admin)
		if err != nil {
			return nil, err
		}
		s.conn = conn
	}
	return s.conn.Authorities.GetAuthorities(ctx, &meshcav1.GetAuthoritiesRequest{})
}

// arm sets a failpoint of the running CA.
func (s *site) arm(ctx context.Context, name, term string) error {
	_, err := s.failpoint(ctx, http.MethodPut, name, term)
	return err
}

// passed is how often a failpoint that is set was passed; the one that a process stands at counts.
func (s *site) passed(ctx context.Context, name string) (int, error) {
	text, err := s.failpoint(ctx, http.MethodGet, name+"/count", "")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(text)
}

func (s *site) failpoint(ctx context.Context, method, path, body string) (string, error) {
	r, err := http.NewRequestWithContext(ctx, method, "http://"+s.failpoints+"/"+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	answer, err := s.http.Do(r)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode/100 != 2 {
		err = fmt.Errorf("failpoint %s: %s: %s", path, answer.Status, text)
	}
	return string(text), err
}

// freePorts are those for a CA, which is to find its own free again when it was killed.
func freePorts(n int) ([]string, error) {
	var all []string
	for range n {
		port, err := parts.FreePort()
		if err != nil {
			return nil, err
		}
		all = append(all, fmt.Sprintf("127.0.0.1:%d", port))
	}
	return all, nil
}
