package files

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/fakeca"
)

// pods is a source of workloads that a test moves.
type pods struct{ do chan func(*agent.Agent) }

func (p *pods) Known() ([]agent.Workload, error) { return nil, nil }

func (p *pods) Run(ctx context.Context, a *agent.Agent) error {
	for {
		select {
		case f := <-p.do:
			f(a)
		case <-ctx.Done():
			return nil
		}
	}
}

// node is an agent with one workload of its own, and a CA.
type node struct {
	t      *testing.T
	ca     *fakeca.CA
	dir    string
	id     spiffeid.ID
	config agent.Config
	pods   *pods
}

func newNode(t *testing.T) *node {
	t.Helper()
	ca, err := fakeca.New("mesh.test")
	must(t, err)
	address, err := ca.Start()
	must(t, err)
	dir, err := os.MkdirTemp("", "fi") // short: sockets lie in it
	must(t, err)
	t.Cleanup(func() { ca.Stop(); _ = os.RemoveAll(dir) })
	n := &node{t: t, ca: ca, dir: dir, id: ca.Workload("web-token", "/ns/shop/sa/web"), pods: &pods{make(chan func(*agent.Agent))}}
	ca.Agent("agent-token", "node-1")
	for name, content := range map[string]string{"agent.token": "agent-token", "web.token": "web-token", "bundle.json": string(ca.Bundle())} {
		must(t, os.WriteFile(n.path(name), []byte(content), 0o600))
	}
	n.config = agent.Config{
		TrustDomain: ca.Domain(), Cluster: "test", Server: address, TokenFile: n.path("agent.token"), BundleFile: n.path("bundle.json"),
		RuntimeDir: n.path("run"), Log: quiet(), Sources: []agent.Source{n.pods},
		Workloads: []agent.Workload{{Socket: n.path("web.sock"), TokenFile: n.path("web.token")}},
	}
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

// files keeps a directory of the agent's own workload.
func (n *node) files(c Config) {
	n.t.Helper()
	c.Log = quiet()
	s, err := NewSource([]Entry{{n.path("web.sock"), c}})
	must(n.t, err)
	n.config.Sources = append(n.config.Sources, s)
}

// start runs the agent until the test ends, or stop is called.
func (n *node) start() (stop func()) {
	n.t.Helper()
	a, err := agent.New(n.config)
	must(n.t, err)
	ctx, cancel := context.WithCancel(n.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			n.t.Error(err)
		}
	})
	n.t.Cleanup(stop)
	return stop
}

func eventually(t *testing.T, what string, met func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !met(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func (n *node) holds(dir string) func() bool {
	return func() bool {
		svid, err := x509svid.Load(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
		return err == nil && svid.ID == n.id
	}
}

func (n *node) acked(sequence uint64) func() bool {
	return func() bool { return slices.Contains(n.ca.Seen().Acks, sequence) }
}

func TestTheCAHearsOfABundleWhenItIsWrittenAndTold(t *testing.T) {
	n := newNode(t)
	dir := n.path("tls")
	n.files(Config{Dir: dir, Names: []Names{TLS}, After: &Hook{Command: &Command{Argv: []string{"/bin/sh", "-c", `test ! -e "$0"`, n.path("broken")}}}})
	n.start()
	eventually(t, "the files are there", n.holds(dir))
	eventually(t, "the first bundle is acknowledged", n.acked(1))
	must(t, os.WriteFile(n.path("broken"), nil, 0o600))
	must(t, n.ca.AddRoot())
	eventually(t, "the second root is there", func() bool {
		b, err := x509bundle.Load(n.ca.Domain(), filepath.Join(dir, "ca.crt"))
		return err == nil && len(b.X509Authorities()) == 2
	})
	time.Sleep(300 * time.Millisecond)
	if n.acked(2)() {
		t.Error("a bundle was acknowledged that a process was not told of")
	}
	must(t, os.Remove(n.path("broken")))
	eventually(t, "the second bundle is acknowledged", n.acked(2))
}

func TestADeniedIdentitysKeyGoesAndComesBack(t *testing.T) {
	n := newNode(t)
	dir := n.path("tls")
	n.files(Config{Dir: dir, Names: []Names{TLS}})
	n.start()
	eventually(t, "the files are there", n.holds(dir))
	n.ca.Order(fakeca.State{Denied: []string{n.id.String()}})
	eventually(t, "all keys are gone", func() bool {
		left, err := filepath.Glob(filepath.Join(dir, "..2*", "tls.key"))
		must(t, err)
		_, err = os.Lstat(filepath.Join(dir, "tls.key"))
		return len(left) == 0 && errors.Is(err, os.ErrNotExist)
	})
	if _, err := os.ReadFile(filepath.Join(dir, "ca.crt")); err != nil {
		t.Error(err)
	}
	n.ca.Order(fakeca.State{})
	eventually(t, "the files are there again", n.holds(dir))
}

func TestAVolumeIsFilledBeforeItsPodStarts(t *testing.T) {
	n := newNode(t)
	n.start()
	v, dir, options := NewVolumes(quiet()), n.path("volume"), map[string]string{"files": "tls,gke"}
	gid := os.Getgid()
	if os.Geteuid() == 0 {
		gid = 2000
	}
	keeping, done := context.WithCancel(t.Context())
	ended, reports := make(chan error, 1), make(chan error, 100)
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "tls.key"), nil, 0o600))
	n.pods.do <- func(a *agent.Agent) {
		k := a.Find(n.path("web.sock"))
		for _, wrong := range []map[string]string{{"files": "pkcs12"}, nil} {
			if err := v.Keep(keeping, k, n.path("none"), nil, wrong, nil); err == nil {
				t.Errorf("options that are wrong were taken: %v", wrong)
			}
		}
		go func() { ended <- v.Keep(keeping, k, dir, &gid, options, func(err error) { reports <- err }) }()
	}
	next := func() error {
		select {
		case err := <-reports:
			return err
		case <-time.After(30 * time.Second):
			t.Fatal("nothing more is reported")
			return nil
		}
	}
	if err := next(); err == nil || !strings.Contains(err.Error(), "a file that this agent did not make") {
		t.Errorf("with somebody else's file in the way the first report is %v", err)
	}
	must(t, os.Remove(filepath.Join(dir, "tls.key")))
	for next() != nil { // it is tried again
	}
	if !n.holds(dir)() {
		t.Error("it was said that the files are there")
	}
	info, err := os.Stat(filepath.Join(dir, "tls.key"))
	must(t, err)
	if info.Mode() != 0o640 || groupOf(info) != gid {
		t.Errorf("the key's file has mode %v and group %d", info.Mode(), groupOf(info))
	}
	must(t, n.ca.AddRoot())
	eventually(t, "the second root is there", func() bool {
		b, err := x509bundle.Load(n.ca.Domain(), filepath.Join(dir, "ca.crt"))
		return err == nil && len(b.X509Authorities()) == 2
	})
	done()
	must(t, <-ended)
	if len(reports) > 0 {
		t.Errorf("reported after the files were there: %v", <-reports)
	}
	if _, err := os.Lstat(n.path("none")); err == nil {
		t.Error("files were written that nobody asked for")
	}
}

func TestSourcesThatAreRefused(t *testing.T) {
	good := Config{Dir: "/a", Names: []Names{TLS}}
	if _, err := NewSource([]Entry{{"/s", good}, {"/t", Config{Dir: "/a/", Names: []Names{GKE}}}}); err == nil {
		t.Error("two write to one directory")
	}
	for _, c := range []Config{{}, {Dir: "a", Names: good.Names}, {Dir: "/", Names: good.Names}, {Dir: "/a"}, {Dir: "/a", Names: []Names{"x"}}, {Dir: "/a", Names: good.Names, Mode: 0o660}, {Dir: "/a", Names: good.Names, Mode: 0o040}} {
		if _, err := NewSource([]Entry{{"/s", c}}); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

// tokenOf is a token of an account, as the agent reads it.
func tokenOf(account string) string {
	part := base64.RawURLEncoding.EncodeToString
	return part([]byte(`{"alg":"RS256"}`)) + "." + part(fmt.Appendf(nil, `{"exp":%d,"sub":"system:serviceaccount:shop:%s"}`, time.Now().Add(time.Hour).Unix(), account)) + ".c2ln"
}

// The token file came to name somebody else while the agent was off. Whoever is refused for good does not keep the files of who was
// there before; while the CA has not said so, they stay.
func TestFilesOfSomebodyElseOverARestart(t *testing.T) {
	for name, meanwhile := range map[string]func(n *node, dir string){
		"a restart": func(*node, string) {},
		"the CA is away over another restart": func(n *node, dir string) {
			n.ca.Stop()
			stop := n.start()
			time.Sleep(300 * time.Millisecond)
			if !n.holds(dir)() {
				n.t.Error("they are gone, and the CA has said nothing")
			}
			stop()
			_, err := n.ca.Start()
			must(n.t, err)
		},
		"a reboot, of which nothing in memory is left": func(n *node, _ string) { must(n.t, os.RemoveAll(n.path("run"))) },
		"a reboot, and a new trust bundle while the CA is away": func(n *node, dir string) {
			must(n.t, os.RemoveAll(n.path("run")))
			must(n.t, n.ca.AddRoot())
			must(n.t, os.WriteFile(n.path("bundle.json"), n.ca.Bundle(), 0o600))
			n.ca.Stop()
			stop := n.start()
			eventually(n.t, "the bundle is written beside the key", func() bool {
				b, err := x509bundle.Load(n.ca.Domain(), filepath.Join(dir, "ca.crt"))
				return err == nil && len(b.X509Authorities()) == 2 && n.holds(dir)()
			})
			stop()
			_, err := n.ca.Start()
			must(n.t, err)
		},
		"the configuration names another token file": func(n *node, _ string) {
			must(n.t, os.Rename(n.path("web.token"), n.path("other.token")))
			n.config.Workloads[0].TokenFile = n.path("other.token")
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			was, other := tokenOf("web"), tokenOf("other")
			n.ca.Workload(was, "/ns/shop/sa/web")
			refused := n.ca.Workload(other, "/ns/shop/sa/other")
			must(t, os.WriteFile(n.path("web.token"), []byte(was), 0o600))
			dir := n.path("tls")
			n.files(Config{Dir: dir, Names: []Names{TLS}})
			stop := n.start()
			eventually(t, "the files are there", n.holds(dir))
			stop()
			must(t, os.WriteFile(n.path("web.token"), []byte(other), 0o600))
			n.ca.Refuse(func(id spiffeid.ID) error {
				if id == refused {
					return refusal.New(refusal.PolicyError, "as the test says")
				}
				return nil
			})
			meanwhile(n, dir)
			n.start()
			eventually(t, "the files of the one before are gone", func() bool {
				_, err := os.Stat(filepath.Join(dir, "tls.key"))
				return errors.Is(err, fs.ErrNotExist)
			})
		})
	}
}
