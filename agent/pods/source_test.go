package pods

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshca/meshca/agent"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/fakeca"
)

const (
	uidA = "0f0e0d0c-1111-4222-8333-444455556666"
	uidB = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
)

// saying is Peers whose word is a test's: each connection begins with the UID of its pod, or with a dash for none.
type saying struct {
	l       *net.UnixListener
	refused func(error)
}

func (s saying) Accept() (net.Conn, string, error) {
	for {
		conn, err := s.l.AcceptUnix()
		if err != nil {
			return nil, "", err
		}
		uid := make([]byte, len(uidA))
		if _, err := conn.Read(uid); err == nil && uid[0] != '-' {
			return conn, string(uid), nil
		}
		_ = conn.Close()
		if string(uid[:2]) == "-?" {
			s.refused(refusal.New(refusal.PeerUnknown, "the test does not see it").On(Invisible))
			continue
		}
		s.refused(refusal.New(refusal.PeerNotInPod, "the test says so"))
	}
}

// node is an agent with a shared socket, and a CA.
type node struct {
	t     *testing.T
	ca    *fakeca.CA
	dir   string
	idle  time.Duration
	label func(string) error
	// mounted says that pods have the directory mounted.
	mounted bool
	config  agent.Config
	source  *Source
	stop    func()
}

func newNode(t *testing.T) *node {
	t.Helper()
	ca, err := fakeca.New("mesh.test")
	must(t, err)
	address, err := ca.Start()
	must(t, err)
	dir, err := os.MkdirTemp("", "po") // short: sockets lie in it
	must(t, err)
	t.Cleanup(func() { ca.Stop(); _ = os.RemoveAll(dir) })
	n := &node{t: t, ca: ca, dir: dir}
	ca.Agent("agent-token", "node-1")
	for name, content := range map[string]string{"agent.token": "agent-token", "bundle.json": string(ca.Bundle())} {
		must(t, os.WriteFile(n.path(name), []byte(content), 0o600))
	}
	n.config = agent.Config{
		TrustDomain: ca.Domain(), Cluster: "test", Server: address, TokenFile: n.path("agent.token"), BundleFile: n.path("bundle.json"),
		RuntimeDir: n.path("run"), Log: slog.New(slog.DiscardHandler), ConnectionsPerPod: 4,
	}
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }
func (n *node) socket() string          { return n.path("run/shared/agent.sock") }

// start runs the agent until the test ends, or n.stop.
func (n *node) start() {
	n.t.Helper()
	n.begin()
	n.eventually("the socket is open", func() bool { return n.source.Standing().NotReady == nil })
}

// begin is start that does not wait for the socket.
func (n *node) begin() {
	n.t.Helper()
	n.source = New(Config{
		Socket: n.socket(), StateFile: n.path("run/shared.json"), Idle: n.idle, Log: n.config.Log, label: n.label,
		CleanUp: n.config.CleanUp, mounted: func(string) bool { return n.mounted },
		Attest: func(l *net.UnixListener, refused func(error)) (Peers, error) { return saying{l, refused}, nil },
	})
	n.run(n.source)
}

// run runs the agent with a source until the test ends, or n.stop.
func (n *node) run(s agent.Source) {
	n.t.Helper()
	n.config.Sources = []agent.Source{s}
	a, err := agent.New(n.config)
	must(n.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	stopped := false
	n.stop = func() {
		n.t.Helper()
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			n.t.Error(err)
		}
	}
	n.t.Cleanup(n.stop)
}

func (n *node) eventually(what string, met func() bool) {
	n.t.Helper()
	for end := time.Now().Add(30 * time.Second); !met(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("waited in vain until %s", what)
		}
	}
}

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// proxy is a stream of a process in a pod.
type proxy struct {
	t      *testing.T
	conn   *grpc.ClientConn
	stream grpc.BidiStreamingClient[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]
}

func (n *node) connect(uid string) *proxy {
	n.t.Helper()
	conn, err := grpc.NewClient("passthrough:shared", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "unix", n.socket())
			if err == nil {
				_, err = c.Write([]byte(uid))
			}
			return c, err
		}))
	must(n.t, err)
	n.t.Cleanup(func() { _ = conn.Close() })
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	n.t.Cleanup(cancel)
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx, grpc.WaitForReady(true))
	must(n.t, err)
	err = stream.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "test"}, ResourceNames: []string{"default"}, TypeUrl: secretType})
	if !errors.Is(err, io.EOF) { // the stream has ended already: what comes next says why
		must(n.t, err)
	}
	return &proxy{n.t, conn, stream}
}

// leaf is the certificate that the stream is served next, PEM.
func (p *proxy) leaf() (string, error) {
	r, err := p.stream.Recv()
	if err != nil {
		return "", err
	}
	var s tlsv3.Secret
	if len(r.GetResources()) == 0 {
		return "", nil
	}
	must(p.t, r.GetResources()[0].UnmarshalTo(&s))
	return string(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes()), nil
}

func (p *proxy) served() string {
	p.t.Helper()
	leaf, err := p.leaf()
	if err != nil || leaf == "" {
		p.t.Fatalf("served %q, %v", leaf, err)
	}
	return leaf
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (n *node) keys() []string {
	n.t.Helper()
	list, err := filepath.Glob(n.path("run/keys/svid-*"))
	must(n.t, err)
	return list
}

// Each pod gets its own identity at the one socket, all of its processes the same one.
func TestPodsShareASocket(t *testing.T) {
	n := newNode(t)
	a, b := n.ca.Pod(uidA, "/ns/shop/sa/a"), n.ca.Pod(uidB, "/ns/shop/sa/b")
	n.start()
	first, again, other := n.connect(uidA).served(), n.connect(uidA).served(), n.connect(uidB).served()
	if first != again || first == other {
		t.Error("a pod's processes are served different SVIDs, or two pods the same one")
	}
	if seen := n.ca.Seen(); seen.Issued[a] != 1 || seen.Issued[b] != 1 || len(seen.Violations) > 0 {
		t.Errorf("the CA saw %+v", seen)
	}
	if mode := must2(os.Stat(n.socket()))(t).Mode(); mode.Perm() != 0o666 {
		t.Errorf("the socket has mode %v", mode)
	}
	if len(must2(os.ReadDir(filepath.Dir(n.socket())))(t)) != 1 {
		t.Error("something lies beside the socket")
	}
}

func must2[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T { t.Helper(); must(t, err); return v }
}

// Who is in no pod is sent away, and shown; a pod has so many connections and no more.
func TestWhoIsSentAway(t *testing.T) {
	n := newNode(t)
	n.ca.Pod(uidA, "/ns/shop/sa/a")
	n.start()
	dial := func(uid string) net.Conn {
		c, err := net.Dial("unix", n.socket())
		must(t, err)
		t.Cleanup(func() { _ = c.Close() })
		_, err = c.Write([]byte(uid))
		must(t, err)
		return c
	}
	gone := func(c net.Conn) {
		t.Helper()
		must(t, c.SetReadDeadline(time.Now().Add(20*time.Second)))
		for b := make([]byte, 1024); ; {
			if _, err := c.Read(b); err != nil {
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error("the connection stays open")
				}
				return
			}
		}
	}
	shown := func(reason refusal.Reason) { // a moment after the connection was closed
		t.Helper()
		n.eventually("the fault is shown: "+string(reason), func() bool {
			f := n.source.Standing().Faults
			return len(f) == 1 && refusal.Of(f[0]) == reason
		})
	}
	gone(dial(strings.Repeat("-", len(uidA))))
	shown(refusal.PeerNotInPod)
	for range 4 {
		dial(uidA)
	}
	gone(dial(uidA))
	shown(refusal.PeerLimit)
	n.ca.Pod(uidB, "/ns/shop/sa/b")
	n.connect(uidB).served() // others have theirs
}

// The stream ends when the pod does, by the CA's word; its key goes, and soon so does the workload, with its connections.
func TestTheStreamEndsWithThePod(t *testing.T) {
	n := newNode(t)
	id := n.ca.Pod(uidA, "/ns/shop/sa/a")
	n.start()
	p := n.connect(uidA)
	p.served()
	k := n.source.served[uidA].kept
	m, _ := k.Materials()
	n.ca.Refuse(func(asked spiffeid.ID) error {
		if asked == id {
			return refusal.New(refusal.PodGone, "as the test says")
		}
		return nil
	})
	n.ca.Order(fakeca.State{Ended: []*meshcav1.Ending{{Serials: [][]byte{m.SVID.Certificates[0].SerialNumber.Bytes()}, Reason: "POD_GONE", Message: "as the test says"}}})
	if _, err := p.leaf(); refusal.Of(err) != refusal.PodGone {
		t.Errorf("the stream ended with %v", err)
	}
	n.eventually("the key is gone", func() bool { return len(n.keys()) == 0 })
	again := n.connect(uidA) // on a connection of its own, and on the old one nothing comes either
	if _, err := again.leaf(); refusal.Of(err) != refusal.PodGone {
		t.Errorf("a new stream ended with %v", err)
	}
	// Both connections stay open at the other end: whoever holds them keeps no place.
	n.eventually("it is forgotten", func() bool { n.source.mu.Lock(); defer n.source.mu.Unlock(); return len(n.source.served) == 0 })
	n.eventually("nothing is left of it on the node", func() bool {
		_, err := os.Stat(n.path("run/shared.json"))
		return errors.Is(err, fs.ErrNotExist)
	})
}

// Who has not been there for a while is forgotten, with the key; who is there is not.
func TestTheIdleAreForgotten(t *testing.T) {
	n := newNode(t)
	n.idle = time.Second
	n.ca.Pod(uidA, "/ns/shop/sa/a")
	b := n.ca.Pod(uidB, "/ns/shop/sa/b")
	n.start()
	stays, goes := n.connect(uidA), n.connect(uidB)
	stays.served()
	goes.served()
	must(t, goes.conn.Close())
	n.eventually("one key is gone", func() bool { return len(n.keys()) == 1 })
	n.eventually("who comes again is served", func() bool { // and not sent away by what goes at that moment
		leaf, err := n.connect(uidB).leaf()
		return err == nil && leaf != ""
	})
	if got := n.ca.Seen().Issued[b]; got != 2 {
		t.Errorf("%d SVIDs were issued to who came again", got)
	}
}

// With the CA gone, an agent that starts again serves what it had to the pods that come again, and to no others.
func TestARestartWithTheCAGone(t *testing.T) {
	n := newNode(t)
	n.ca.Pod(uidA, "/ns/shop/sa/a")
	n.ca.Pod(uidB, "/ns/shop/sa/b")
	n.start()
	had := n.connect(uidA).served()
	n.stop()
	if _, err := os.Lstat(n.socket()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
	n.ca.Stop()
	n.start()
	if got := n.connect(uidA).served(); got != had {
		t.Error("another SVID is served")
	}
	silent := n.connect(uidB)
	came := make(chan error, 1)
	go func() { _, err := silent.leaf(); came <- err }()
	select {
	case err := <-came:
		t.Errorf("a pod that was not there before was answered: %v", err)
	case <-time.After(500 * time.Millisecond):
	}
	n.stop()

	// State that cannot be read is none.
	must(t, os.WriteFile(n.path("run/shared.json"), []byte("{"), 0o600))
	n.start()
	if len(n.keys()) != 0 {
		t.Errorf("keys of nobody are kept: %v", n.keys())
	}
}

// A socket that somebody took away is opened again.
func TestTheSocketIsOpenedAgain(t *testing.T) {
	n := newNode(t)
	n.ca.Pod(uidA, "/ns/shop/sa/a")
	n.start()
	must(t, os.Remove(n.socket()))
	n.eventually("it is told", func() bool { return n.source.Standing().NotReady != nil })
	n.eventually("it is open again", func() bool { return n.source.Standing().NotReady == nil })
	n.connect(uidA).served()
}

// say connects and says something that is no stream's beginning.
func (n *node) say(text string) {
	n.t.Helper()
	c, err := net.Dial("unix", n.socket())
	must(n.t, err)
	n.t.Cleanup(func() { _ = c.Close() })
	_, err = c.Write([]byte(text + strings.Repeat("-", len(uidA)-len(text))))
	must(n.t, err)
}

// Without hostPID nobody can be served: that is not ready, until somebody is seen.
func TestAnAgentThatSeesNobodyIsNotReady(t *testing.T) {
	n := newNode(t)
	n.start()
	n.say("-?")
	n.eventually("it is not ready", func() bool { return refusal.Of(n.source.Standing().NotReady) == refusal.PeerUnknown })
	n.say("--")
	n.eventually("it is ready: one that is in no pod was seen", func() bool { return n.source.Standing().NotReady == nil })
	n.say("-?")
	n.eventually("it is not ready again", func() bool { return n.source.Standing().NotReady != nil })
	n.ca.Pod(uidA, "/ns/shop/sa/a")
	n.connect(uidA).served()
	if why := n.source.Standing().NotReady; why != nil {
		t.Errorf("not ready though a pod is served: %v", why)
	}
}

// A pod that mounts the directory writable can put its own socket there, and serve others false roots.
func TestTheSocketsPlaceIsTakenBack(t *testing.T) {
	for what, rob := range map[string]func(path string) error{
		"another socket": func(path string) error {
			evil, err := net.Listen("unix", path)
			if err == nil {
				t.Cleanup(func() { _ = evil.Close() })
			}
			return err
		},
		"a symbolic link": func(path string) error { return os.Symlink("/tmp/elsewhere", path) },
	} {
		t.Run(what, func(t *testing.T) {
			n := newNode(t)
			n.ca.Pod(uidA, "/ns/shop/sa/a")
			n.start()
			must(t, os.Remove(n.socket()))
			must(t, rob(n.socket()))
			n.eventually("the fault is shown", func() bool {
				s := n.source.Standing()
				return s.NotReady == nil && len(s.Faults) == 1 && refusal.Of(s.Faults[0]) == refusal.SocketInUse && strings.Contains(s.Faults[0].Error(), "readOnly: true")
			})
			n.connect(uidA).served()
		})
	}
}

// What is no socket could be anybody's, where the path was mistaken.
func TestAFileInTheSocketsPlaceStays(t *testing.T) {
	n := newNode(t)
	n.start()
	must(t, os.Remove(n.socket()))
	must(t, os.WriteFile(n.socket(), []byte("somebody's"), 0o600))
	n.eventually("it is told", func() bool {
		why := n.source.Standing().NotReady
		return why != nil && strings.Contains(why.Error(), "a file that is no socket")
	})
	if text, err := os.ReadFile(n.socket()); err != nil || string(text) != "somebody's" {
		t.Errorf("the file is gone: %v", err)
	}
}

func TestPodsAreBounded(t *testing.T) {
	n := newNode(t)
	n.ca.Pod(uidA, "/ns/shop/sa/a")
	n.start()
	n.connect(uidA).served()
	n.source.mu.Lock()
	kept := n.source.served[uidA].kept
	for i := 1; i < maxPods; i++ {
		n.source.served[strings.Repeat("x", i)] = &podOf{kept: kept, seen: time.Now()}
	}
	n.source.mu.Unlock()
	n.say(uidB)
	n.eventually("the next pod is refused", func() bool {
		f := n.source.Standing().Faults
		return len(f) == 1 && refusal.Of(f[0]) == refusal.Overloaded
	})
	n.connect(uidA).served() // who is known stays served
}

// With SELinux no container could enter a directory without the label, or connect to a socket that was made before.
func TestTheDirectoryIsLabelled(t *testing.T) {
	n := newNode(t)
	var labelled []string
	n.label = func(path string) error {
		if _, err := os.Lstat(n.socket()); err == nil {
			t.Error("the socket was made before its directory had a label")
		}
		labelled = append(labelled, path)
		return nil
	}
	n.start()
	if len(labelled) != 1 || labelled[0] != filepath.Dir(n.socket()) {
		t.Errorf("labelled are %v", labelled)
	}
}
