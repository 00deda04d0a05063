// Package issuance measures issuance against the floor of the machine that it runs on: see floor/main.go for what the
// floor does. The servers are processes of their own; the same 32 warm connections drive one after the other, no server
// sees a token twice.
package issuance

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.step.sm/crypto/pemutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	corev1 "k8s.io/api/core/v1"

	"github.com/meshca/meshca/api/issuance/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/test/kube"
)

const connections = 32

// turns are how the servers alternate. Short ones even out what else the machine does; long ones make little of a
// turn's first and last calls, which find the server's caches cold and do not keep all connections busy.
type turns struct {
	rounds int
	time   time.Duration
	tokens int // in a round; a round ends early when a server has used them up
}

func BenchmarkIssueOneCSRACall(b *testing.B) {
	compare(b, 1, turns{rounds: 12, time: 1500 * time.Millisecond, tokens: 7_000})
}

func BenchmarkIssueBatchesOf100CSRs(b *testing.B) {
	compare(b, 100, turns{rounds: 6, time: 2 * time.Second, tokens: 12_000})
}

// compare runs the servers in turns and reports the ratio of their rates over all rounds: to the floor as Go runs any
// program, and to one whose collector is tuned as the CA's is, which tells what of the ratio is that tuning.
func compare(b *testing.B, batch int, turns turns) {
	w := prepare(b)
	meshca, floor, tuned := w.startCA(b), w.startFloor(b, "plain"), w.startFloor(b, "tuned")
	servers := []*peer{floor, meshca, tuned}
	// A first turn that does not count: then no server's heap grows any more, nor are its pages touched for the first
	// time, and all are what they are after a minute's work.
	requests := w.requests(b, w.mint(b, turns.tokens), batch)
	for _, p := range servers {
		p.drive(b, requests, batch, turns.time)
		p.forget()
	}
	requests = w.requests(b, w.mint(b, turns.tokens), batch)
	b.ResetTimer()
	for range b.N {
		for _, p := range servers {
			p.rates = 0
		}
		for round := range turns.rounds {
			// New tokens for each round; each server sees each of them once. They begin in turns.
			for i := range servers {
				if round%2 == 1 { // and in both orders: each has each of the others before it
					i = len(servers) - 1 - i
				}
				p := servers[(round/2+i)%len(servers)]
				p.rates += p.drive(b, requests, batch, turns.time)
			}
			b.StopTimer()
			requests = w.requests(b, w.mint(b, turns.tokens), batch)
			b.StartTimer()
		}
		b.ReportMetric(meshca.rates/float64(turns.rounds), "svids/s")
		b.ReportMetric(floor.rates/float64(turns.rounds), "floor/s")
		b.ReportMetric(meshca.rates/floor.rates, "of-floor")
		b.ReportMetric(meshca.rates/tuned.rates, "of-tuned-floor")
		// What the machine's other work cannot blur: the CPU time that each server spent on an SVID.
		b.ReportMetric(meshca.cpuEach(), "cpu-us/svid")
		b.ReportMetric(floor.cpuEach(), "floor-cpu-us/svid")
		b.ReportMetric(tuned.cpuEach(), "tuned-floor-cpu-us/svid")
	}
	b.ReportMetric(0, "ns/op")
}

// setup is a directory with a CA's configuration, and the real API server whose pods it serves.
type setup struct {
	dir     string
	cluster *kube.Cluster
	tokens  *localissuer.Issuer // by the API server's key: nobody could ask it for as many
	meshca  string
	held    [][]byte // digests of the CA's intermediates, which an agent names in its calls

	agent, workload localissuer.Subject
}

func prepare(b *testing.B) *setup {
	b.Helper()
	dir, cluster := b.TempDir(), kube.Start(b)
	file, err := os.ReadFile(cluster.TokenKey())
	check(b, err)
	key, err := pemutil.ParseKey(file)
	check(b, err)
	tokens, err := localissuer.New(key.(*rsa.PrivateKey), kube.Issuer)
	check(b, err)
	w := &setup{dir: dir, cluster: cluster, tokens: tokens, meshca: build(b, dir, "github.com/meshca/meshca/cmd/meshca")}
	node, err := cluster.CreateNode(b.Context(), "node1")
	check(b, err)
	w.agent, w.workload = w.subject(b, node, "meshca", "meshca-agent"), w.subject(b, node, "shop", "web")
	config := fmt.Sprintf(`
trustDomain: mesh.test
listen: 127.0.0.1:%d
opsAddress: 127.0.0.1:0
adminSocket: %[2]s/admin.sock
stateDir: %[2]s/state
audit: {file: %[2]s/audit.log}
upstream: {disk: {}}
limits: {callsPerSecond: 1000000, requestsPerSecond: 1000000, bytesPerSecond: 1000000000, openCalls: 128, openRequests: 10000, openMessages: 1000, svidsPerPod: 1000000000}
logLevel: warn
clusters:
  - {name: one, mode: jwks, kubeconfig: %[3]s}
`, freePort(b), dir, cluster.Kubeconfig)
	check(b, os.WriteFile(w.config(), []byte(config), 0o600))
	out, err := exec.CommandContext(b.Context(), w.meshca, "root", "create", "--config", w.config()).CombinedOutput()
	if err != nil {
		b.Fatalf("root create: %v: %s", err, out)
	}
	return w
}

// subject makes a pod with its namespace and service account.
func (w *setup) subject(b *testing.B, node *corev1.Node, namespace, account string) localissuer.Subject {
	b.Helper()
	_, err := w.cluster.CreateNamespace(b.Context(), namespace)
	check(b, err)
	sa, err := w.cluster.CreateServiceAccount(b.Context(), namespace, account)
	check(b, err)
	pod, err := w.cluster.CreatePod(b.Context(), namespace, account+"-1", account, node.Name)
	check(b, err)
	return localissuer.Subject{
		Namespace: namespace, ServiceAccount: account, ServiceAccountUID: string(sa.UID), Pod: pod.Name, PodUID: string(pod.UID), Node: node.Name, NodeUID: string(node.UID),
	}
}

func (w *setup) config() string { return filepath.Join(w.dir, "meshca.yaml") }

func (w *setup) mint(b *testing.B, n int) []string {
	b.Helper()
	tokens := make([]string, n)
	var next atomic.Int64
	var g sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		g.Go(func() {
			for i := int(next.Add(1) - 1); i < n; i = int(next.Add(1) - 1) {
				token, err := w.tokens.Token(w.workload, "meshca", time.Hour)
				if err != nil {
					b.Error(err)
					return
				}
				tokens[i] = token
			}
		})
	}
	g.Wait()
	return tokens
}

// requests deals the tokens out in calls, with CSRs of a thousand keys.
func (w *setup) requests(b *testing.B, tokens []string, batch int) []*meshcav1.IssueX509SVIDsRequest {
	b.Helper()
	csrs := make([][]byte, 1000)
	for i := range csrs {
		_, csrs[i] = newCSR(b)
	}
	var calls []*meshcav1.IssueX509SVIDsRequest
	for len(tokens) >= batch {
		call := &meshcav1.IssueX509SVIDsRequest{Cluster: "one", HeldIntermediates: w.held}
		for i, token := range tokens[:batch] {
			call.Requests = append(call.Requests, &meshcav1.X509SVIDRequest{Token: token, Csr: csrs[(len(calls)*batch+i)%len(csrs)]})
		}
		calls, tokens = append(calls, call), tokens[batch:]
	}
	return calls
}

// peer is a server under load.
type peer struct {
	clients []meshcav1.IssuanceServiceClient
	pid     int
	issued  int64
	cpu     time.Duration
	rates   float64 // the sum of its rounds'
}

// cpuEach is the server's CPU time for an SVID over all rounds, in microseconds.
func (p *peer) cpuEach() float64 { return float64(p.cpu.Microseconds()) / float64(max(p.issued, 1)) }

func (w *setup) startCA(b *testing.B) *peer {
	b.Helper()
	_, pid := start(b, w.meshca, "serve", "--config", w.config())
	address := w.address(b)
	// The CA's certificate is not what is measured; its identity is verified in the agent's own tests.
	config := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	key, csr := newCSR(b)
	token, err := w.tokens.Token(w.agent, "meshca-agent", time.Hour)
	check(b, err)
	var attested *meshcav1.AttestAgentResponse
	for range 100 { // until it serves
		first := dial(b, address, config)
		if attested, err = first.AttestAgent(b.Context(), &meshcav1.AttestAgentRequest{Cluster: "one", Token: token, Csr: csr}); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	check(b, err)
	for _, der := range attested.GetSvid().GetChain()[1:] {
		digest := sha256.Sum256(der)
		w.held = append(w.held, digest[:])
	}
	config = config.Clone()
	config.Certificates = []tls.Certificate{{Certificate: attested.GetSvid().GetChain(), PrivateKey: key}}
	return connect(b, address, config, pid)
}

// startFloor gives the floor the same kinds of keys: a P-256 issuer, the same token key.
func (w *setup) startFloor(b *testing.B, tuning string) *peer {
	b.Helper()
	program := build(b, w.dir, "github.com/meshca/meshca/test/bench/issuance/floor")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(b, err)
	cert := w.selfSigned(b, key)
	certFile, keyFile := filepath.Join(w.dir, "floor.crt"), filepath.Join(w.dir, "floor.key")
	der, err := x509.MarshalPKCS8PrivateKey(key)
	check(b, err)
	check(b, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600))
	check(b, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	out, pid := start(b, program, certFile, keyFile, certFile, w.cluster.TokenKey(), tuning)
	address, err := bufio.NewReader(out).ReadString('\n')
	check(b, err)
	return connect(b, address[:len(address)-1], &tls.Config{
		InsecureSkipVerify: true, MinVersion: tls.VersionTLS13,
		Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}},
	}, pid)
}

func connect(b *testing.B, address string, config *tls.Config, pid int) *peer {
	p := &peer{pid: pid}
	for range connections {
		p.clients = append(p.clients, dial(b, address, config))
	}
	return p
}

// forget leaves what a server did until now out of cpuEach.
func (p *peer) forget() { p.issued, p.cpu = 0, 0 }

// drive sends calls over all connections for a round's time, and returns the rate of SVIDs.
func (p *peer) drive(b *testing.B, calls []*meshcav1.IssueX509SVIDsRequest, batch int, turn time.Duration) float64 {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	var next, done atomic.Int64
	began, spent := time.Now(), cpuOf(b, p.pid)
	var g sync.WaitGroup
	for _, client := range p.clients {
		g.Go(func() {
			for time.Since(began) < turn {
				i := int(next.Add(1) - 1)
				if i >= len(calls) {
					return
				}
				r, err := client.IssueX509SVIDs(ctx, calls[i])
				if err != nil {
					b.Errorf("a call failed: %v", err)
					return
				}
				for _, result := range r.GetResults() {
					if result.GetSvid() == nil {
						b.Errorf("a request was refused: %v", result.GetRefusal())
						return
					}
				}
				done.Add(int64(batch))
			}
		})
	}
	g.Wait()
	p.issued += done.Load()
	p.cpu += cpuOf(b, p.pid) - spent
	return float64(done.Load()) / time.Since(began).Seconds()
}

func dial(b *testing.B, address string, config *tls.Config) meshcav1.IssuanceServiceClient {
	b.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithStaticStreamWindowSize(client.FlowWindow), grpc.WithStaticConnWindowSize(client.FlowWindow)) // as agents do
	check(b, err)
	b.Cleanup(func() { _ = conn.Close() })
	return meshcav1.NewIssuanceServiceClient(conn)
}

// start runs a program until the benchmark ends, or this process does.
func start(b *testing.B, program string, args ...string) (stdout *os.File, pid int) {
	b.Helper()
	read, write, err := os.Pipe()
	check(b, err)
	c := exec.CommandContext(b.Context(), program, args...)
	c.Stdout, c.Stderr = write, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdin, err := c.StdinPipe()
	check(b, err)
	check(b, c.Start())
	check(b, write.Close())
	b.Cleanup(func() {
		_ = stdin.Close()
		_ = c.Process.Signal(syscall.SIGTERM)
		_ = c.Wait()
		_ = read.Close()
	})
	return read, c.Process.Pid
}

func build(b *testing.B, dir, pkg string) string {
	b.Helper()
	out := filepath.Join(dir, filepath.Base(pkg))
	c := exec.CommandContext(b.Context(), "go", "build", "-o", out, pkg)
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := c.CombinedOutput(); err != nil {
		b.Fatalf("go build %s: %v\n%s", pkg, err, text)
	}
	return out
}
