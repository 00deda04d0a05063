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

// TestWhatTheRingTakes holds what the manual of rememberedDecisions says.
func TestWhatTheRingTakes(t *testing.T) {
	// As many places as there are by default, to have what other tests leave behind weigh little.
	const places, size = 10_000, 1000
	before := heap()
	r := NewRing(places)
	each := (heap() - before) / (3 * places)
	runtime.KeepAlive(r)
	t.Logf("%d bytes a place", each)
	if each < 400 || each > 31<<19/30_000 { // rounded
		t.Errorf("a place takes %d bytes, not half a kilobyte: 15 MiB for 30,000", each)
	}

	before = heap()
	r = NewRing(size)
	empty := heap() - before
	for range 2 * size {
		r.add(longest(t))
	}
	full := heap() - before - empty*2/3 // one kind of the three is full
	runtime.KeepAlive(r)
	t.Logf("%d bytes a decision", full/size)
	if each := full / size; each < 4<<10 || each > 8<<10 {
		t.Errorf("a decision takes %d bytes, not 8 KiB at most", each)
	}
}
