package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
	"github.com/meshca/meshca/test/fakeca"
)

// pods is a Source that a test moves.
type pods struct {
	known []Workload
	do    chan func(*Agent)
}

func (p *pods) Known() ([]Workload, error) { return p.known, nil }

func (p *pods) Run(ctx context.Context, a *Agent) error {
	for {
		select {
		case f := <-p.do:
			f(a)
		case <-ctx.Done():
			return nil
		}
	}
}

// in calls f within Run.
func (p *pods) in(f func(*Agent)) {
	done := make(chan struct{})
	p.do <- func(a *Agent) { defer close(done); f(a) }
	<-done
}

// pod is a workload that is not in the configuration.
func (n *node) pod(name string) (Workload, string) {
	id := n.ca.Workload(name+"-token", "/ns/test/sa/"+name)
	n.write(name+".token", name+"-token")
	return Workload{Socket: n.path(name + ".sock"), TokenFile: n.path(name + ".token"), Mode: 0o666}, id.String()
}

func newPods(n *node) *pods {
	p := &pods{do: make(chan func(*Agent))}
	n.config.Sources = []Source{p}
	return p
}

func TestWorkloadsComeAndGo(t *testing.T) {
	n := newNode(t)
	n.workload("fixed")
	p := newPods(n)
	a := n.start()
	w, id := n.pod("web")
	p.in(func(a *Agent) {
		k, err := a.Add(w)
		must(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		must(t, k.Ready(ctx))
		m, _ := k.Materials()
		if m.SVID == nil || m.SVID.ID.String() != id || len(m.Bundle.X509Authorities()) == 0 || m.End != nil {
			t.Errorf("materials %+v", m)
		}
		if _, err := a.Add(w); refusal.Of(err) != refusal.SocketInUse {
			t.Errorf("added twice: %v", err)
		}
	})
	if got := fetch(t, w.Socket, "default", "ROOTCA"); got["default"] == nil || got["ROOTCA"] == nil {
		t.Fatalf("got %v", got)
	}
	if n := len(a.status().GetWorkloads()); n != 2 {
		t.Errorf("%d workloads in status", n)
	}
	keys := len(n.kept())

	conn := dial(t, w.Socket)
	defer conn.Close()
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(t.Context(), grpc.WaitForReady(true))
	must(t, err)
	must(t, stream.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "test"}, ResourceNames: []string{"default"},
		TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"}))
	_, err = stream.Recv()
	must(t, err)
	p.in(func(a *Agent) { must(t, a.Find(w.Socket).Remove()) })
	if _, err := stream.Recv(); refusal.Of(err) != refusal.PodGone {
		t.Errorf("the stream ended with %v", err)
	}
	if _, err := os.Lstat(w.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	if now := len(n.kept()); now != keys-1 {
		t.Errorf("%d keys are kept, %d before", now, keys)
	}
	if n := len(a.status().GetWorkloads()); n != 1 {
		t.Errorf("%d workloads in status", n)
	}

	// The next pod at the same path is served, and what is left of the connection of the one before is not.
	p.in(func(a *Agent) {
		k, err := a.Add(w)
		must(t, err)
		must(t, k.Ready(t.Context()))
	})
	if got := fetch(t, w.Socket, "default"); got["default"] == nil {
		t.Error("nothing is served at the path that was used before")
	}
}

// TestConnectionsEndWithTheirPod, also those that no stream is open on: whoever holds one must not be served what the next
// pod at the same path gets.
func TestConnectionsEndWithTheirPod(t *testing.T) {
	n := newNode(t)
	p := newPods(n)
	n.start()
	w, _ := n.pod("web")
	p.in(func(a *Agent) {
		k, err := a.Add(w)
		must(t, err)
		must(t, k.Ready(t.Context()))
		c, err := net.Dial("unix", w.Socket)
		must(t, err)
		defer c.Close()
		_, err = io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00") // and empty SETTINGS (RFC 9113 §3.4)
		must(t, err)
		_, err = io.ReadFull(c, make([]byte, 9)) // the server's
		must(t, err)
		must(t, k.Remove())
		must(t, c.SetReadDeadline(time.Now().Add(10*time.Second)))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the connection of a pod that is gone stays open")
		}
	})
}

func TestReadySaysWhyNot(t *testing.T) {
	n := newNode(t)
	p := newPods(n)
	w, id := n.pod("web")
	n.start()
	for _, tt := range []struct {
		reason refusal.Reason
		final  bool
	}{{refusal.PolicyDenied, true}, {refusal.PodGone, true}, {refusal.LedgerUnavailable, false}} {
		n.ca.Refuse(func(asked spiffeid.ID) error {
			if asked.String() == id {
				return refusal.New(tt.reason, "the test says so")
			}
			return nil
		})
		p.in(func(a *Agent) {
			k, err := a.Add(w)
			must(t, err)
			patience := 10 * time.Second
			if !tt.final {
				patience = time.Second
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			err = k.Ready(ctx)
			if refusal.Of(err) != tt.reason || tt.final == errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: Ready says %v", tt.reason, err)
			}
			must(t, k.Remove())
		})
	}
}

func TestAFreshTokenEndsTheBackoff(t *testing.T) {
	n := newNode(t)
	p := newPods(n)
	n.start()
	w, _ := n.pod("web")
	must(t, os.Remove(w.TokenFile))
	p.in(func(a *Agent) {
		k, err := a.Add(w)
		must(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		if err := k.Ready(ctx); err == nil {
			t.Fatal("ready without a token")
		}
		n.write("web.token", "web-token")
		k.TokenChanged()
		must(t, k.Ready(t.Context()))
	})
}

// TestARestartKeepsTheWorkloadsOfSources, with the CA gone: what stands is served at once, what does not is forgotten.
func TestARestartKeepsTheWorkloadsOfSources(t *testing.T) {
	n := newNode(t)
	p := newPods(n)
	a := n.start()
	stays, _ := n.pod("stays")
	goes, _ := n.pod("goes")
	p.in(func(a *Agent) {
		for _, w := range []Workload{stays, goes} {
			k, err := a.Add(w)
			must(t, err)
			must(t, k.Ready(t.Context()))
		}
	})
	must(t, a.stop())
	n.ca.Stop()
	p = newPods(n)
	p.known = []Workload{stays}
	n.start()
	if got := fetch(t, stays.Socket, "default"); got["default"] == nil {
		t.Errorf("got %v", got)
	}
	if kept := n.kept(); len(kept) != 1 || !strings.Contains(strings.Join(kept, " "), nameOf(stays)) {
		t.Errorf("kept are %v, want %s alone", kept, nameOf(stays))
	}
	p.in(func(a *Agent) {
		if a.Find(stays.Socket) == nil || a.Find(goes.Socket) != nil {
			t.Error("it does not find what stands, or finds what does not")
		}
	})
	if _, err := os.Lstat(filepath.Dir(goes.Socket)); err != nil {
		t.Error(err)
	}
}

// gate is a Source that says how it stands.
type gate struct {
	pods
	standing rotation.Current[Standing]
}

func (g *gate) Standing() Standing { return g.standing.Value() }

func TestASourceSaysHowItStands(t *testing.T) {
	n := newNode(t)
	g := &gate{pods: pods{do: make(chan func(*Agent))}}
	g.standing.Set(Standing{Subject: "the gate", Well: "it is open", NotReady: refusal.New(refusal.KubeletUnregistered, "nobody came")})
	n.config.Sources = []Source{g}
	a := n.start()
	finds := func(level meshcav1.Finding_Level, detail, hint string) bool {
		return slices.ContainsFunc(a.check(t.Context()), func(f *meshcav1.Finding) bool {
			return f.GetSubject() == "the gate" && f.GetLevel() == level && f.GetDetail() == detail && f.GetHint() == hint
		})
	}
	eventually(t, "it alone keeps the agent from being ready", func() bool {
		why := a.NotReady()
		return len(why) == 1 && why[0] == "the gate: KUBELET_UNREGISTERED: nobody came"
	})
	if !finds(meshcav1.Finding_LEVEL_ERROR, "KUBELET_UNREGISTERED: nobody came", refusal.KubeletUnregistered.Do()) {
		t.Error("a check does not find it")
	}
	fault := refusal.New(refusal.MountFailed, "it squeaks")
	g.standing.Set(Standing{Subject: "the gate", Well: "it is open", Faults: []error{fault}})
	if why := a.NotReady(); len(why) > 0 || !finds(meshcav1.Finding_LEVEL_WARNING, fault.Error(), refusal.MountFailed.Do()) {
		t.Errorf("not ready for a fault (%v), or it is not found", why)
	}
	g.standing.Set(Standing{Subject: "the gate", Well: "it is open"})
	if !finds(meshcav1.Finding_LEVEL_OK, "it is open", "") {
		t.Error("a check does not say that all is well")
	}
}

func TestStatusNamesThePod(t *testing.T) {
	n := newNode(t)
	p := newPods(n)
	a := n.start()
	w, _ := n.pod("web")
	w.Pod = Pod{Namespace: "shop", Name: "web-1"}
	p.in(func(a *Agent) {
		k, err := a.Add(w)
		must(t, err)
		must(t, k.Ready(t.Context()))
	})
	if got := a.status().GetWorkloads()[0]; got.GetNamespace() != "shop" || got.GetPod() != "web-1" {
		t.Errorf("status has %v", got)
	}
	if !strings.Contains(n.log.String(), "pod=shop/web-1") {
		t.Error("the log does not name the pod")
	}
}

func TestReadersHoldUpAcknowledgements(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	p := newPods(n)
	a := n.start()
	acked := func(sequence uint64) func() bool {
		return func() bool { _, _, _, acked := a.follower.standing(); return acked >= sequence }
	}
	eventually(t, "the first bundle is acknowledged", acked(1))
	var r *Reader
	p.in(func(a *Agent) { r = a.NewReader("files of web") })
	must(t, n.ca.AddRoot())
	const second = 2
	eventually(t, "the second bundle is there", func() bool { return a.trust.sequence() == second })
	r.Failed(errors.New("the disk is full"))
	eventually(t, "the reader is named", func() bool {
		return strings.Contains(strings.Join(a.lacking(second), " "), "files of web: cannot take it: the disk is full")
	})
	time.Sleep(100 * time.Millisecond)
	if acked(second)() {
		t.Error("a bundle was acknowledged that a reader lacks")
	}
	r.Took(second)
	eventually(t, "the second bundle is acknowledged", acked(second))
	r.Close()
	must(t, n.ca.AddRoot())
	eventually(t, "a closed reader holds up nothing", acked(second+1))
}

// TestMaterialsSayWhatBecameOfTheSVID, and a bundle is news also to a workload that has no SVID yet: its readers are waited
// for like all others.
func TestMaterialsSayWhatBecameOfTheSVID(t *testing.T) {
	n := newNode(t)
	p := newPods(n)
	n.start()
	w, id := n.pod("web")
	no := refusal.New(refusal.LedgerUnavailable, "the test says so")
	n.ca.Refuse(func(asked spiffeid.ID) error {
		if asked.String() == id {
			return no
		}
		return nil
	})
	p.in(func(a *Agent) {
		k, err := a.Add(w)
		must(t, err)
		await := func(what string, met func(Materials) bool) {
			t.Helper()
			for end := time.After(20 * time.Second); ; {
				m, stale := k.Materials()
				if met(m) {
					return
				}
				select {
				case <-stale:
				case <-end:
					t.Fatalf("waited in vain until %s: %+v", what, m)
				}
			}
		}
		await("nothing has come", func(m Materials) bool { return m.SVID == nil && !m.Withdrawn && m.End == nil })
		must(t, n.ca.AddRoot())
		await("the second bundle is there", func(m Materials) bool { s, _ := m.Bundle.SequenceNumber(); return s == 2 && !m.Withdrawn })
		n.ca.Refuse(nil)
		k.TokenChanged()
		await("there is an SVID", func(m Materials) bool { return m.SVID != nil && !m.Withdrawn })
		n.ca.Order(fakeca.State{Denied: []string{id}})
		await("it is withdrawn", func(m Materials) bool { return m.SVID == nil && m.Withdrawn && m.End == nil })
		must(t, k.Remove())
		await("the end", func(m Materials) bool {
			return m.SVID == nil && m.Withdrawn && refusal.Of(m.End) == refusal.PodGone
		})
	})
}

func TestReadersShowThemselves(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	p := newPods(n)
	a := n.start()
	at := time.Now().Truncate(time.Second)
	p.in(func(a *Agent) {
		well, ill := a.NewReader("files in /a"), a.NewReader("files in /b")
		well.Took(7)
		well.Show(Delivery{WrittenAt: at, After: "signal HUP to nginx", AfterAt: at})
		ill.Show(Delivery{Failures: 3, Fault: "the disk is full"})
	})
	got := a.status().GetDeliveries()
	if len(got) != 2 || got[0].GetName() != "files in /a" || !got[0].GetWrittenAt().AsTime().Equal(at) || !got[0].GetAfterAt().AsTime().Equal(at) ||
		got[0].GetAfter() != "signal HUP to nginx" || got[0].GetBundleSequence() != 7 || got[1].GetWrittenAt() != nil || got[1].GetFailures() != 3 || got[1].GetFault() != "the disk is full" {
		t.Errorf("status %v", got)
	}
	var told []string
	for _, f := range a.check(t.Context()) {
		if strings.Contains(f.GetSubject(), "files in") || f.GetSubject() == "deliveries" {
			told = append(told, f.GetSubject()+": "+f.GetDetail())
		}
	}
	if s := strings.Join(told, "; "); s != "files in /b: the disk is full; deliveries: 1 of 2 are as they should be" {
		t.Errorf("a check says %s", s)
	}
}

// A pod that the agent vouches for has no token and no socket; its connections are handed over, and end with it.
func TestVouchedWorkloads(t *testing.T) {
	n := newNode(t)
	n.config.ConnectionsPerPod = 2
	id := n.ca.Pod("pod-uid", "/ns/test/sa/web")
	p := newPods(n)
	a := n.start()
	w := Workload{Socket: n.path("shared.sock#pod-uid"), PodUID: "pod-uid"}
	p.in(func(a *Agent) {
		for _, wrong := range []Workload{{Socket: w.Socket}, {Socket: w.Socket, PodUID: "u", TokenFile: n.path("token")}} {
			if _, err := a.Add(wrong); err == nil {
				t.Errorf("%+v was taken", wrong)
			}
		}
		k, err := a.Add(w)
		must(t, err)
		must(t, k.Ready(t.Context()))
		m, _ := k.Materials()
		if m.SVID == nil || m.SVID.ID != id {
			t.Errorf("materials %+v", m)
		}
		var ours []net.Conn
		for range 2 {
			one, other := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, one) }()
			must(t, k.Serve(other))
			ours = append(ours, one)
		}
		_, third := net.Pipe()
		if err := k.Serve(third); refusal.Of(err) != refusal.PeerLimit || k.Open() != 2 {
			t.Errorf("a third connection: %v, %d are open", err, k.Open())
		}
		if _, err := third.Write([]byte{1}); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("it stays open: %v", err)
		}
		must(t, k.Remove())
		for _, c := range ours {
			for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
				if _, err := c.Write([]byte{0}); errors.Is(err, io.ErrClosedPipe) {
					break
				}
				if time.Now().After(end) {
					t.Fatal("a connection outlives its pod")
				}
			}
		}
		_, late := net.Pipe()
		if err := k.Serve(late); !errors.Is(err, net.ErrClosed) {
			t.Errorf("a connection of a pod that was removed: %v", err)
		}
	})
	if kept := n.kept(); len(kept) != 0 {
		t.Errorf("on disk: %v", kept)
	}
	if f := a.findings(); len(f) == 0 {
		t.Error("no findings")
	}
}
