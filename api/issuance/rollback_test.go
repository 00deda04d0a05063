package issuance_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/api/issuance"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/rotation"
	"github.com/meshca/meshca/test/world"
)

// text is a log that a test reads.
type text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *text) Write(p []byte) (int, error) { l.mu.Lock(); defer l.mu.Unlock(); return l.b.Write(p) }
func (l *text) String() string              { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }

func shows(mark []byte, sequence uint64) *meshcav1.SyncRequest {
	return &meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: &meshcav1.SyncHello{
		Cluster: world.Cluster, Mark: mark, HighestBundleSequence: sequence,
	}}}
}

// future is the store of w with one decision more, as a CA had it whose disk was lost: the mark that it gave agents.
func future(t *testing.T, w *world.World) []byte {
	t.Helper()
	snapshot, err := w.Store.Backup(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer snapshot.Close()
	path := filepath.Join(t.TempDir(), "meshca.db")
	if _, err := bolt.Restore(t.Context(), bolt.RestoreOptions{Backup: snapshot, Path: path, TrustDomain: world.TrustDomain.Name()}); err != nil {
		t.Fatal(err)
	}
	s, err := bolt.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.PutDenial(t.Context(), ca.Denial{ID: "spiffe://mesh.test/ns/shop/sa/web"}); err != nil {
		t.Fatal(err)
	}
	c, err := registration.OpenContinuity(t.Context(), s, w.Trust, w.RA.Agents, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	sealed, _ := c.Sealed()
	return sealed
}

// An agent that has followed more than the CA knows is told nothing that would undo it; nobody gets anything until an
// operator has looked, and then a bundle that this agent follows.
func TestAnAgentThatHasSeenMore(t *testing.T) {
	d := newDoor(t, issuance.Limits{})
	cert := d.attest()
	mark := future(t, d.World)
	bundle, _ := d.Trust.Bundle()
	sequence, _ := bundle.SequenceNumber()
	stream := d.sync(cert, shows(mark, 1))
	if state, err := stream.Recv(); refusal.Of(err) != refusal.CARolledBack || state != nil {
		t.Errorf("it was told %v, %v", state, err)
	}
	if line := d.Audit.Last(t); line["outcome"] != string(refusal.CARolledBack) {
		t.Errorf("the audit line is %v", line)
	}
	answer, err := d.dial(cert).IssueX509SVIDs(t.Context(), &meshcav1.IssueX509SVIDsRequest{Cluster: world.Cluster, Requests: []*meshcav1.X509SVIDRequest{d.item()}})
	if err != nil || answer.GetResults()[0].GetRefusal().GetReason() != string(refusal.CARolledBack) {
		t.Errorf("it issued %v, %v", answer, err)
	}
	if _, err := d.sync(cert, hello()).Recv(); refusal.Of(err) != refusal.CARolledBack {
		t.Errorf("an agent that shows nothing was told: %v", err)
	}
	if _, err := d.RA.Continuity.Accept(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	state, err := d.sync(cert, shows(mark, 1)).Recv()
	if err != nil || len(state.GetMark()) == 0 || len(state.GetMark()) > 256 || !strings.Contains(string(state.GetBundle()), fmt.Sprintf(`"spiffe_sequence":%d`, sequence+1001)) {
		t.Errorf("after it was accepted: %v, %v", state, err)
	}
}

// A stolen agent that claims what never was is heard in the log, and stops nobody.
func TestAClaimIsNoProof(t *testing.T) {
	log := &text{}
	d := newDoor(t, issuance.Limits{}, func(s *issuance.Server, _ *world.World) { s.Log = slog.New(slog.NewTextHandler(log, nil)) })
	cert := d.attest()
	other := world.New(t, "") // another CA's mark, of a state far beyond
	for range 9 {
		if err := other.Store.PutDenial(t.Context(), ca.Denial{ID: "a"}); err != nil {
			t.Fatal(err)
		}
	}
	foreign, _ := other.RA.Continuity.Sealed()
	for _, claim := range [][]byte{nil, []byte("trust me"), foreign} {
		if _, err := d.sync(cert, shows(claim, 1<<60)).Recv(); err != nil {
			t.Errorf("%x: %v", claim, err)
		}
	}
	if err := d.RA.Continuity.Ready(); err != nil {
		t.Error(err)
	}
	if n := strings.Count(log.String(), "does not prove it"); n != 3 {
		t.Errorf("the log says so %d times of 3:\n%s", n, log)
	}
}

// A step of a rollout changes neither the bundle nor what is denied: agents hear of it by its mark, and come back with it.
func TestEveryDecisionIsWitnessed(t *testing.T) {
	d := newDoor(t, issuance.Limits{}, within(time.Hour, time.Hour, time.Hour))
	cert := d.attest()
	stream := d.sync(cert, hello())
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Store.SwapRollout(t.Context(), 0, rotation.Rollout{Step: rotation.StepOut}); err != nil {
		t.Fatal(err)
	}
	next, err := stream.Recv()
	if err != nil || bytes.Equal(next.GetMark(), first.GetMark()) {
		t.Errorf("the mark is the same: %v", err)
	}
	if now, _ := d.RA.Continuity.Sealed(); !bytes.Equal(now, next.GetMark()) {
		t.Error("the mark is not that of now")
	}
	for _, mark := range [][]byte{first.GetMark(), next.GetMark()} {
		if _, err := d.sync(cert, shows(mark, 1)).Recv(); err != nil {
			t.Error(err)
		}
	}
}
