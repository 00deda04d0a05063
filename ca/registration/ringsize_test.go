package registration

import (
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// heap is what is live after a collection.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// longest is a decision in which everything is as long as it can be, and nothing is shared with another one.
func longest(t *testing.T) *Decision {
	t.Helper()
	name := func(n int) string { return strings.Repeat("x", n) }
	id := func() spiffeid.ID {
		id, err := spiffeid.FromString("spiffe://" + name(255) + "/" + name(2048-255-10))
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	identity, err := attestor.NewIdentity(name(63), name(63), name(253))
	if err != nil {
		t.Fatal(err)
	}
	return &Decision{
		Time: time.Now(), Event: eventIssue, Door: "grpc", Cluster: name(maxName), ID: id(), Rule: name(63), Serial: name(40), NotAfter: time.Now(),
		Caller: Caller{Address: name(64), ID: id(), Serial: name(40), Untrusted: errors.New(name(256 << 10))},
		Evidence: attestor.Evidence{Proven: true, Identity: identity, Method: "kubernetes/jwks", ServiceAccountUID: name(253), PodName: name(253),
			PodUID: name(253), NodeName: name(253), NodeUID: name(253), CredentialID: name(253)},
		Outcome: string(refusal.PodNotOnNode), Claim: "kubernetes.io.pod.uid", Message: refusal.Clip(name(64<<10), 1024),
	}
}

// usual is a decision of a fleet's everyday.
func usual(t *testing.T) *Decision {
	t.Helper()
	identity, err := attestor.NewIdentity("production", "storefront", "checkout-worker")
	if err != nil {
		t.Fatal(err)
	}
	const uid = "5f0c6a1e-7b0d-4c36-9c0e-2f7d0a1b2c3d"
	return &Decision{
		Time: time.Now(), Event: eventIssue, Door: "grpc", Cluster: "production", NotAfter: time.Now(),
		ID: spiffeid.RequireFromString("spiffe://mesh.example/ns/storefront/sa/checkout-worker"), Rule: "storefront", Serial: strings.Repeat("5", 32),
		Caller: Caller{
			Address: "10.200.100.11:43210", Serial: strings.Repeat("6", 32),
			ID: spiffeid.RequireFromString("spiffe://mesh.example/meshca/agent/production/ip-10-200-100-11.internal"),
		},
		Evidence: attestor.Evidence{Proven: true, Identity: identity, Method: "kubernetes/jwks", ServiceAccountUID: uid,
			PodName: "checkout-worker-6d5f8c7b9d-x2x4z", PodUID: uid, NodeName: "ip-10-200-100-11.internal", NodeUID: uid, CredentialID: uid,
			IssuedAt: time.Now(), ExpiresAt: time.Now()},
		Outcome: OutcomeIssued,
	}
}

// TestWhatTheRingTakes holds what the manual of rememberedDecisions says.
func TestWhatTheRingTakes(t *testing.T) {
	// As many places as there are by default, to have what other tests leave behind weigh little.
	const places = 10_000
	before := heap()
	r := NewRing(places)
	empty := heap() - before
	t.Logf("%d bytes from the start", empty)
	if empty > 1<<20 {
		t.Errorf("30,000 empty places take %d bytes, not 1 MiB", empty)
	}
	for _, c := range []struct {
		of         *Decision
		least, max int64
	}{{usual(t), 500, 640}, {longest(t), 6 << 10, 8<<10 + 64}} { // with its place
		for range places {
			r.add(c.of)
		}
		each := (heap() - before - empty) / places
		t.Logf("%d bytes a decision", each)
		if each < c.least || each > c.max {
			t.Errorf("a decision takes %d bytes, not %d to %d", each, c.least, c.max)
		}
		clear(r.kinds[0].slots)
	}
	runtime.KeepAlive(r)
}
