package e2e

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/test/mesh"
	"github.com/meshca/meshca/test/parts"
)

const (
	ttl = 20 * time.Second
	// rate is how many requests are sent a second, each with a handshake of its own; steady is how many must be answered.
	// What a busy machine holds up comes late, and some of it after the end.
	rate, steady = 60, 50
	// rotations is how many each proxy must have gone through in the end.
	rotations = 6
)

// Two Envoys under steady traffic, a handshake for every request: nothing that happens to the CA or the agent may cost
// one request, as long as the SVIDs last.
func TestRotationUnderTraffic(t *testing.T) {
	for name, delta := range map[string]bool{"state of the world": false, "delta": true} {
		t.Run(name, func(t *testing.T) { rotate(t, delta) })
	}
}

func rotate(t *testing.T, delta bool) {
	s := newSite(t, "jwks", ttl)
	s.startCA()
	n := s.node("node1")
	n.workload("web")
	n.workload("db")
	n.start()
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	m, err := mesh.Start(ctx, mesh.Config{
		Envoy: parts.Path(t, "envoy"), Dir: t.TempDir(), Delta: delta,
		Client: mesh.Workload{ID: "spiffe://mesh.test/ns/shop/sa/web", Socket: n.socket("web")},
		Server: mesh.Workload{ID: "spiffe://mesh.test/ns/shop/sa/db", Socket: n.socket("db")},
	})
	check(t, err)
	t.Cleanup(m.Stop)

	start, err := m.Read(ctx)
	check(t, err)
	traffic, began := m.NewTraffic(), time.Now()
	running, end := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() { traffic.Run(running, rate) })
	defer func() { end(); done.Wait() }()
	noFaults := func(after string) {
		t.Helper()
		if traffic.Failed() > 0 {
			t.Fatalf("after %s: %d of %d requests failed, the last so: %s", after, traffic.Failed(), traffic.OK()+traffic.Failed(), traffic.Fault())
		}
	}
	serials := func() map[string]bool {
		seen := map[string]bool{}
		readings, err := m.Read(t.Context())
		check(t, err)
		for _, r := range readings {
			seen[r.Serial] = true
		}
		return seen
	}
	rotated := func(after string) {
		t.Helper()
		before := serials()
		eventually(t, "both proxies to hold new certificates "+after, 2*ttl, func() bool {
			for serial := range serials() {
				if before[serial] {
					return false
				}
			}
			return true
		})
		noFaults(after)
	}

	rotated("the start")

	s.stopCA()
	time.Sleep(2 * time.Second)
	s.startCA()
	rotated("a restart of the CA")

	n.stop()
	n.start()
	rotated("a restart of the agent")

	// The CA goes away for longer than the distance between two rotations (T/2), and the agent dies meanwhile and serves
	// what it had. It begins when both have most of a life left: their phases lie at most T/4 apart one way or the other.
	eventually(t, "both certificates to be young", 2*ttl, func() bool {
		readings, err := m.Read(t.Context())
		check(t, err)
		return min(readings[0].Left(time.Now()), readings[1].Left(time.Now())) > ttl*7/10
	})
	s.stopCA()
	gone := time.Now()
	n.kill()
	n.start()
	before := serials()
	time.Sleep(time.Until(gone.Add(ttl/2 + 200*time.Millisecond)))
	noFaults("a restart of both with the CA gone")
	for serial := range serials() {
		if !before[serial] {
			t.Error("a proxy has a new certificate, with the CA gone")
		}
	}
	s.startCA()
	rotated("the CA's return")

	eventually(t, "all rotations", 4*ttl, func() bool { return updates(t, m) >= rotations })
	replaced := updates(t, m)
	end()
	lasted := time.Since(began)
	done.Wait()
	noFaults("the end")
	if least := int64(steady * lasted.Seconds()); traffic.OK() < least {
		t.Errorf("%d requests were answered in %v, want %d at least: the traffic was not steady", traffic.OK(), lasted, least)
	}
	handshakes(t, m, start, traffic.OK())
	t.Logf("%d requests in %v, %d failed, %d rotations of the proxy with the fewest", traffic.OK(), lasted, traffic.Failed(), replaced)
}

// handshakes checks that since start each of so many requests had a handshake of its own at both proxies, and that none
// failed, not even one that was made again.
func handshakes(t *testing.T, m *mesh.Mesh, start [2]mesh.Reading, requests int64) {
	t.Helper()
	readings, err := m.Read(t.Context())
	check(t, err)
	for i, r := range readings {
		if made := r.Handshakes - start[i].Handshakes; made < requests {
			t.Errorf("the %s's Envoy made %d handshakes for %d requests, want one for each", mesh.Sides[i], made, requests)
		}
		if failed := r.HandshakeFaults - start[i].HandshakeFaults; failed != 0 {
			t.Errorf("%d handshakes of the %s's Envoy failed", failed, mesh.Sides[i])
		}
	}
}

// updates is how often the proxy with the fewest updates replaced its TLS context, after what it started with. It fails
// the test when a proxy refused a secret.
func updates(t *testing.T, m *mesh.Mesh) int64 {
	t.Helper()
	readings, err := m.Read(t.Context())
	check(t, err)
	least := int64(1 << 62)
	for i, r := range readings {
		if r.Rejected > 0 {
			t.Fatalf("the %s's Envoy rejected %d secrets", mesh.Sides[i], r.Rejected)
		}
		least = min(least, r.Contexts-2, r.Updates-2)
	}
	return least
}
