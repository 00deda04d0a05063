package agent

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/fakeca"
)

// cell is the directories of an agent whose runs begin and are killed in a bubble: it has neither sockets nor a CA, and its
// SDS server is real.
type cell struct {
	t       *testing.T
	config  Config
	bundles [][]byte // of the sequences 1, 2 and 3
}

// runOf is one run of it.
type runOf struct {
	*Agent
	t    *testing.T
	kill context.CancelFunc
}

// inCell runs a test in a bubble. Keys are made outside of it, where time goes on.
func inCell(t *testing.T, test func(*testing.T, *cell)) {
	t.Helper()
	ca, err := fakeca.New("mesh.test")
	must(t, err)
	c := &cell{bundles: [][]byte{ca.Bundle()}}
	for range 2 {
		must(t, ca.AddRoot())
		c.bundles = append(c.bundles, ca.Bundle())
	}
	dir := t.TempDir()
	c.config = Config{
		TrustDomain: ca.Domain(), Cluster: "test", Server: "ca.test:1", TokenFile: dir + "/token", BundleFile: dir + "/bundle",
		RuntimeDir: dir + "/run", StateDir: dir + "/state", Log: slog.New(slog.DiscardHandler),
		Workloads: []Workload{{Socket: "/web.sock", TokenFile: dir + "/web"}, {Socket: "/db.sock", TokenFile: dir + "/db"}, {Socket: "/idle.sock", TokenFile: dir + "/idle"}},
	}
	synctest.Test(t, func(t *testing.T) { c.t = t; test(t, c) })
}

// start begins a run; it ends by kill, or with the test.
func (c *cell) start() *runOf {
	c.t.Helper()
	a, err := New(c.config)
	must(c.t, err)
	unlock, err := a.prepare()
	must(c.t, err)
	a.trust.load()
	if _, err := a.restore(); err != nil {
		c.t.Fatal(err)
	}
	for _, w := range a.roster.list() {
		w.state.had = true // roots are served without an SVID, too
		w.listened(nil)
	}
	ctx, cancel := context.WithCancel(c.t.Context())
	go a.distribute(ctx)
	go a.proxies.run(ctx)
	r := &runOf{Agent: a, t: c.t, kill: func() { cancel(); unlock(); synctest.Wait() }}
	c.t.Cleanup(func() { r.kill(); a.client.Close() })
	return r
}

// follow has the run follow the bundle of this sequence, as the CA says.
func (r *runOf) follow(c *cell, sequence int) {
	r.t.Helper()
	must(r.t, r.trust.offer(c.bundles[sequence-1], nil))
	synctest.Wait()
}

// says wants taken to return this sequence behind after, within its patience or, with waits, behind it.
func (r *runOf) says(after, want uint64, waits ...string) {
	r.t.Helper()
	began := time.Now()
	got, lacking, err := r.taken(r.t.Context(), after, patience)
	must(r.t, err)
	if took := time.Since(began); got != want || len(lacking) != len(waits) || (took >= patience) != (len(waits) > 0) {
		r.t.Fatalf("behind %d it says %d after %v, and that it waits for %q; want %d, and %q", after, got, took, lacking, want, waits)
	}
	for i, w := range waits {
		if !strings.Contains(lacking[i], w) {
			r.t.Errorf("it waits for %q, want %q", lacking[i], w)
		}
	}
}

// wire is a stream without a wire.
type wire struct {
	grpc.ServerStream
	t   *testing.T
	ctx context.Context
	in  chan *discoveryv3.DiscoveryRequest
	out chan *discoveryv3.DiscoveryResponse
}

func (w *wire) Context() context.Context                { return w.ctx }
func (w *wire) SendMsg(m any) error                     { w.out <- m.(*discoveryv3.DiscoveryResponse); return nil }
func (*wire) Send(*discoveryv3.DiscoveryResponse) error { panic("not used") }
func (w *wire) Recv() (*discoveryv3.DiscoveryRequest, error) {
	select {
	case r := <-w.in:
		return r, nil
	case <-w.ctx.Done():
		return nil, io.EOF
	}
}

// connect opens a stream to a workload that asks for one name; end ends it.
func (r *runOf) connect(socket, name string) (w *wire, end func()) {
	r.t.Helper()
	of := r.roster.at(socket)
	ctx, cancel := context.WithCancel(peer.NewContext(r.t.Context(), &peer.Peer{LocalAddr: boundAddr{&net.UnixAddr{Name: socket, Net: "unix"}, of}}))
	w = &wire{t: r.t, ctx: ctx, in: make(chan *discoveryv3.DiscoveryRequest, 8), out: make(chan *discoveryv3.DiscoveryResponse, 8)}
	go func() { _ = r.sds.StreamSecrets(w) }()
	w.say(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "proxy"}, ResourceNames: []string{name}, TypeUrl: secretType})
	killed := r.kill
	r.kill = func() { cancel(); synctest.Wait(); killed() }
	return w, func() { cancel(); synctest.Wait() }
}

func (w *wire) say(r *discoveryv3.DiscoveryRequest) { w.in <- r; synctest.Wait() }

// take acknowledges the next answer.
func (w *wire) take() {
	w.t.Helper()
	select {
	case r := <-w.out:
		w.say(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, VersionInfo: r.GetVersionInfo(), ResponseNonce: r.GetNonce(), ResourceNames: []string{nameIn(w.t, r)}})
	default:
		w.t.Fatal("nothing was sent")
	}
}

func nameIn(t *testing.T, r *discoveryv3.DiscoveryResponse) string {
	t.Helper()
	if names := secretNames(t, r); len(names) == 1 {
		return names[0]
	}
	t.Fatalf("an answer holds %d secrets", len(r.GetResources()))
	return ""
}

const ofDomain = "spiffe://mesh.test"

// before is a run in which two streams of web have bundle 1, and then it is killed.
func (c *cell) before() {
	c.t.Helper()
	r := c.start()
	r.follow(c, 1)
	for _, name := range []string{"ROOTCA", ofDomain} {
		w, _ := r.connect("/web.sock", name)
		w.take()
	}
	r.connect("/db.sock", "default") // it takes no roots, and so has nothing to confirm
	r.says(0, 1)
	r.kill()
}

func TestAnAgentThatRestartedWaitsForThoseItHad(t *testing.T) {
	inCell(t, func(t *testing.T, c *cell) {
		c.before()
		r := c.start()
		r.follow(c, 2)
		r.says(0, 1) // known since before
		r.says(1, 1, "/web.sock: 2 of the 2 streams")
		first, _ := r.connect("/web.sock", "ROOTCA")
		r.says(1, 1, "/web.sock: 1 of the 2 streams", "/web.sock: has not answered")
		first.take()
		r.says(1, 1, "/web.sock: 1 of the 2 streams")
		if n := r.proxies.missing("/web.sock"); n != 1 {
			t.Errorf("status shows %d", n)
		}

		// Killed again, it knows as much as before.
		r.kill()
		r = c.start()
		r.follow(c, 3)
		r.says(0, 1)
		r.says(1, 1, "/web.sock: 2 of the 2 streams")
		first, _ = r.connect("/web.sock", "ROOTCA")
		second, _ := r.connect("/web.sock", ofDomain)
		first.take()
		r.says(1, 1, "/web.sock: has not answered")
		second.take()
		r.says(1, 3)
		r.kill()

		// What was confirmed is known from then on.
		r = c.start()
		synctest.Wait()
		r.says(0, 3)
	})
}

func TestTheWaitIsBounded(t *testing.T) {
	inCell(t, func(t *testing.T, c *cell) {
		c.before()
		r := c.start()
		r.follow(c, 2)
		began := time.Now()
		sequence, lacking, err := r.taken(t.Context(), 1, time.Hour)
		if took := time.Since(began); err != nil || sequence != 2 || len(lacking) > 0 || took != ComeBack {
			t.Errorf("after %v: %d, %q, %v", took, sequence, lacking, err)
		}
		// Who did not come is not waited for by the next run.
		time.Sleep(3 * settle)
		r.kill()
		r = c.start()
		r.follow(c, 3)
		r.says(2, 3)
	})
}

func TestNobodyIsWaitedForWhoNeverCameOrIsGone(t *testing.T) {
	for name, end := range map[string]func(*runOf){
		"its pod is gone": func(r *runOf) { r.die(r.roster.at("/web.sock"), refusal.New(refusal.PodGone, "the test says so")) },
		"it is removed": func(r *runOf) {
			w := r.roster.at("/web.sock")
			w.cancel = func() {}
			must(r.t, (&Kept{r.Agent, w}).Remove())
		},
		"the CA refuses it": func(r *runOf) { r.attempted(r.roster.at("/web.sock"), verdict{refusal.New(refusal.PodGone, "")}) },
	} {
		t.Run(name, func(t *testing.T) {
			inCell(t, func(t *testing.T, c *cell) {
				c.before()
				r := c.start()
				r.follow(c, 2)
				r.says(1, 1, "/web.sock: 2 of the 2 streams") // and neither db nor idle
				end(r)
				r.says(1, 2)
			})
		})
	}
	t.Run("it stands no longer", func(t *testing.T) {
		inCell(t, func(t *testing.T, c *cell) {
			c.before()
			c.config.Workloads = c.config.Workloads[1:]
			r := c.start()
			r.follow(c, 2)
			r.says(1, 2)
			if left, _ := os.ReadDir(r.proxies.dir); len(left) > 0 {
				t.Errorf("files are left: %v", left)
			}
		})
	})
}

// file is what is kept of web's streams, and when it was written.
func (r *runOf) file() (content string, written time.Time) {
	r.t.Helper()
	path := filepath.Join(r.proxies.dir, nameOf(Workload{Socket: "/web.sock"}))
	data, err := os.ReadFile(path)
	must(r.t, err)
	info, err := os.Stat(path)
	must(r.t, err)
	return string(data), info.ModTime()
}

// TestStreamsThatComeBackAreNotWrittenDown: neither after a restart, when all do at once, nor when one breaks and comes again.
func TestStreamsThatComeBackAreNotWrittenDown(t *testing.T) {
	inCell(t, func(t *testing.T, c *cell) {
		c.before()
		r := c.start()
		r.follow(c, 2)
		path := filepath.Join(r.proxies.dir, nameOf(Workload{Socket: "/web.sock"}))
		old := time.Unix(1e9, 0)
		must(t, os.Chtimes(path, old, old))
		_, end := r.connect("/web.sock", "ROOTCA")
		for range 50 {
			end()
			_, end = r.connect("/web.sock", "ROOTCA")
		}
		_, other := r.connect("/web.sock", ofDomain)
		time.Sleep(3 * settle)
		if content, written := r.file(); content != "2" || !written.Equal(old) {
			t.Errorf("the file says %q and was written at %v", content, written)
		}
		third, _ := r.connect("/web.sock", "ALL")
		if content, _ := r.file(); content != "3" || len(third.out) != 1 {
			t.Errorf("the file says %q of three streams", content)
		}
		other()
		time.Sleep(settle + time.Second) // one look, which may come a moment behind the end of all
		if content, _ := r.file(); content != "3" {
			t.Errorf("lowered to %q at once", content)
		}
		time.Sleep(3 * settle)
		if content, _ := r.file(); content != "2" {
			t.Errorf("the file says %q of two streams", content)
		}
		// All streams end with the agent: that says nothing of their peers.
		r.kill()
		if content, _ := r.file(); content != "2" {
			t.Errorf("behind the stop the file says %q", content)
		}
	})
}

// A file that a kill left half written stands for a stream; a directory that cannot be read leaves nobody out.
func TestWhatIsDamagedIsWaitedFor(t *testing.T) {
	inCell(t, func(t *testing.T, c *cell) {
		c.before()
		r := c.start()
		path := filepath.Join(r.proxies.dir, nameOf(Workload{Socket: "/web.sock"}))
		r.kill()
		for _, content := range []string{"", "many", "-7", "0"} {
			must(t, os.WriteFile(path, []byte(content), 0o600))
			r = c.start()
			if n := r.proxies.missing("/web.sock"); n != 1 {
				t.Errorf("%q: %d streams are awaited", content, n)
			}
			r.kill()
		}
		must(t, os.RemoveAll(r.proxies.dir))
		p := newProxies(r.proxies.dir, nil, r.log)
		p.load(r.roster.list())
		if n, _ := p.awaits(); n != 3 {
			t.Errorf("%d workloads are awaited by one who knows of none", n)
		}
	})
}
