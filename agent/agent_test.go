package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/test/fakeca"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// node is a directory with what an agent finds on its node, and a CA.
type node struct {
	t      *testing.T
	ca     *fakeca.CA
	dir    string
	config Config
	log    *logBook
}

// logBook gives the log to the test if it fails.
type logBook struct {
	mu   sync.Mutex
	text []byte
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text = append(b.text, p...)
	return len(p), nil
}

func (b *logBook) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.text)
}

// newNode has a CA that runs and an agent's files, and no workload.
func newNode(t *testing.T) *node {
	t.Helper()
	ca, err := fakeca.New("mesh.test")
	if err != nil {
		t.Fatal(err)
	}
	address, err := ca.Start()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "ag") // short: sockets lie in it
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, ca: ca, dir: dir, log: &logBook{}}
	t.Cleanup(func() {
		ca.Stop()
		for _, v := range ca.Seen().Violations {
			t.Errorf("the agent broke the contract: %s", v)
		}
		if t.Failed() {
			t.Log(n.log)
		}
		_ = os.RemoveAll(dir)
	})
	ca.Agent("agent-token", "node-1")
	n.write("agent.token", "agent-token\n")
	n.write("bundle.json", string(ca.Bundle()))
	n.config = Config{
		TrustDomain: ca.Domain(), Cluster: "test", Server: address, TokenFile: n.path("agent.token"), BundleFile: n.path("bundle.json"),
		RuntimeDir: n.path("run"), StateDir: n.path("state"), OpsAddress: "127.0.0.1:0", Version: "v0-test",
		Log: slog.New(slog.NewTextHandler(n.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

func (n *node) write(name, content string) {
	n.t.Helper()
	if err := os.WriteFile(n.path(name), []byte(content), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// workload adds one, with its token.
func (n *node) workload(name string) string {
	n.t.Helper()
	id := n.ca.Workload(name+"-token", "/ns/test/sa/"+name)
	n.write(name+".token", name+"-token")
	n.config.Workloads = append(n.config.Workloads, Workload{Socket: n.path(name + ".sock"), TokenFile: n.path(name + ".token")})
	return id.String()
}

// freeAddress is a loopback address that nobody listens at.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().String()
}

// running is an agent that runs.
type running struct {
	*Agent
	n    *node
	stop func() error
}

// start runs an agent until the test ends or stop is called.
func (n *node) start() *running {
	n.t.Helper()
	a, err := New(n.config)
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	stop := sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			return fmt.Errorf("the agent does not stop")
		}
	})
	n.t.Cleanup(func() {
		if err := stop(); err != nil {
			n.t.Errorf("Run: %v", err)
		}
	})
	return &running{Agent: a, n: n, stop: stop}
}

// status asks the admin socket.
func (r *running) status() *meshcav1.GetAgentStatusResponse {
	r.n.t.Helper()
	c, done := r.admin()
	defer done()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	st, err := c.GetAgentStatus(ctx, &meshcav1.GetAgentStatusRequest{}, grpc.WaitForReady(true))
	if err != nil {
		r.n.t.Fatal(err)
	}
	return st
}

func (r *running) admin() (meshcav1.AgentAdminServiceClient, func()) {
	conn := dial(r.n.t, filepath.Join(r.n.config.RuntimeDir, "admin.sock"))
	return meshcav1.NewAgentAdminServiceClient(conn), func() { _ = conn.Close() }
}

func (r *running) state(i int) string { return r.status().GetWorkloads()[i].GetState() }

func dial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// eventually waits for what must come true.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

// fetch asks a socket for secrets over SDS; those that are not served are missing.
func fetch(t *testing.T, socket string, names ...string) map[string]*tlsv3.Secret {
	t.Helper()
	conn := dial(t, socket)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	answer, err := secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{
		Node: &corev3.Node{Id: "test"}, ResourceNames: names, TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
	}, grpc.WaitForReady(true))
	if err != nil {
		t.Logf("fetch: %v", err)
		return nil
	}
	secrets := make(map[string]*tlsv3.Secret)
	for _, r := range answer.GetResources() {
		s := &tlsv3.Secret{}
		if err := r.UnmarshalTo(s); err != nil {
			t.Fatal(err)
		}
		secrets[s.GetName()] = s
	}
	return secrets
}

func TestAgentServesWhatTokensProve(t *testing.T) {
	n := newNode(t)
	id := n.workload("web")
	other := n.workload("db")
	a := n.start()
	got := fetch(t, n.path("web.sock"), "default", id, "ROOTCA", other)
	if got["default"] == nil || got[id] == nil || got["ROOTCA"] == nil {
		t.Fatalf("got %v", got)
	}
	if got[other] != nil {
		t.Error("a socket serves another workload's identity")
	}
	st := a.status()
	if !st.GetReady() || !st.GetConnected() && st.GetSelf().GetSpiffeId() != "spiffe://mesh.test/meshca/agent/test/node-1" {
		t.Errorf("status %v", st)
	}
	if len(st.GetWorkloads()) != 2 || st.GetWorkloads()[0].GetSvid().GetSpiffeId() != id || st.GetWorkloads()[0].GetState() != "fresh" {
		t.Errorf("workloads %v", st.GetWorkloads())
	}
	eventually(t, "the bundle is acknowledged", func() bool { return len(n.ca.Seen().Acks) > 0 })
	if err := a.stop(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(n.path("web.sock")); err == nil {
		t.Error("the socket is left behind")
	}
}

// secretNames are those of an answer.
func secretNames(t *testing.T, r *discoveryv3.DiscoveryResponse) (names []string) {
	t.Helper()
	for _, resource := range r.GetResources() {
		s := &tlsv3.Secret{}
		must(t, resource.UnmarshalTo(s))
		names = append(names, s.GetName())
	}
	return names
}
