package registration_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/test/world"
)

var witness = spiffeid.RequireFromString("spiffe://mesh.test/meshca/agent/one/node1")

// past is a CA, and the CA of a backup of it from before its last decisions.
type past struct {
	now, restored *life
}

// life is a store with what stands on it.
type life struct {
	t     *testing.T
	store *bolt.Store
	trust *ca.Trust
	*registration.Continuity
	agents *registration.AgentBook
	log    bytes.Buffer
}

func newLife(t *testing.T, s *bolt.Store) *life {
	t.Helper()
	l := &life{t: t, store: s}
	t.Cleanup(func() { _ = s.Close() })
	var err error
	if l.trust, err = ca.NewTrust(t.Context(), ca.TrustConfig{TrustDomain: world.TrustDomain, Store: s}); err != nil {
		t.Fatal(err)
	}
	if l.agents, err = registration.OpenAgentBook(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	l.open()
	return l
}

func (l *life) open() {
	l.t.Helper()
	var err error
	l.Continuity, err = registration.OpenContinuity(l.t.Context(), l.store, l.trust, l.agents, slog.New(slog.NewTextHandler(&l.log, nil)))
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *life) deny(path string) {
	l.t.Helper()
	if err := l.store.PutDenial(l.t.Context(), ca.Denial{ID: "spiffe://mesh.test" + path}); err != nil {
		l.t.Fatal(err)
	}
}

// sealed is the mark that an agent has by now.
func (l *life) sealed() []byte { b, _ := l.Sealed(); return b }

func (l *life) sequence() uint64 {
	b, _ := l.trust.Bundle()
	n, _ := b.SequenceNumber()
	return n
}

// copyOf restores a backup of the store to another place.
func copyOf(t *testing.T, s *bolt.Store) *bolt.Store {
	t.Helper()
	snapshot, err := s.Backup(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer snapshot.Close()
	path := filepath.Join(t.TempDir(), "meshca.db")
	if _, err := bolt.Restore(t.Context(), bolt.RestoreOptions{Backup: snapshot, Path: path, TrustDomain: world.TrustDomain.Name()}); err != nil {
		t.Fatal(err)
	}
	restored, err := bolt.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return restored
}

// newPast backs a CA up, decides something, and restores the backup elsewhere.
func newPast(t *testing.T, decide func(*life)) past {
	t.Helper()
	w := world.New(t, "")
	before := copyOf(t, w.Store)
	now := newLife(t, w.Store)
	decide(now)
	return past{now, newLife(t, before)}
}

func (l *life) witnesses(sealed []byte, proven bool, want refusal.Reason) {
	l.t.Helper()
	got, err := l.Witness(l.t.Context(), witness, sealed)
	if got != proven || refusal.Of(err) != want {
		l.t.Errorf("proven %v, %v; want %v, %s", got, err, proven, want)
	}
}

func TestAnAgentProvesALoss(t *testing.T) {
	p := newPast(t, func(l *life) { l.deny("/ns/shop/sa/web") })
	first := p.restored.sealed()
	p.restored.witnesses(first, true, "")
	p.now.witnesses(first, true, "") // an agent that was away for a while
	p.restored.witnesses(p.now.sealed(), true, refusal.CARolledBack)
	if err := p.restored.Ready(); !strings.Contains(err.Error(), witness.String()) || !refusal.Of(err).Passing() {
		t.Errorf("it says %v", err)
	}
	if !strings.Contains(p.restored.log.String(), "level=ERROR") || !strings.Contains(p.restored.log.String(), "accept-rollback") {
		t.Errorf("the log has %s", p.restored.log.String())
	}
	// Who proves nothing is not told what an old store knows either; and a restart changes nothing.
	p.restored.witnesses(first, true, refusal.CARolledBack)
	p.restored.witnesses(nil, false, refusal.CARolledBack)
	p.restored.open()
	p.restored.witnesses(first, true, refusal.CARolledBack)
}

// The store has decided as much since as was lost: the marks differ all the same.
func TestAForkIsALoss(t *testing.T) {
	p := newPast(t, func(l *life) { l.deny("/a") })
	p.restored.deny("/b")
	p.restored.deny("/c")
	p.restored.witnesses(p.now.sealed(), true, refusal.CARolledBack)
}

func TestNobodyCanClaimALoss(t *testing.T) {
	p := newPast(t, func(l *life) { l.deny("/a") })
	other := newLife(t, world.New(t, "").Store)
	for range 50 {
		other.deny("/x")
	}
	theirs := other.sealed()
	for name, sealed := range map[string][]byte{
		"nothing": nil, "text": []byte("hello"), "a store with another key": theirs, "too long": append(p.now.sealed(), 0), "too short": p.now.sealed()[1:],
		"zeros": make([]byte, len(theirs)),
	} {
		t.Run(name, func(t *testing.T) { p.restored.witnesses(sealed, false, "") })
	}
	mark := p.restored.sealed()
	for i := range mark { // every bit of it is under the seal
		forged := bytes.Clone(mark)
		forged[i] ^= 0x40
		p.restored.witnesses(forged, false, "")
	}
	if p.restored.Loss() != nil {
		t.Error("a loss was noted")
	}
}

func TestALossIsAccepted(t *testing.T) {
	p := newPast(t, func(l *life) {
		if _, err := l.trust.RaiseSequence(l.t.Context(), l.sequence()+7); err != nil {
			l.t.Fatal(err)
		}
	})
	if _, err := p.restored.Accept(t.Context(), 0); err == nil {
		t.Error("nothing was accepted")
	}
	early := p.now.sealed()
	p.restored.witnesses(early, true, refusal.CARolledBack)
	p.now.deny("/later")
	if _, err := p.now.trust.RaiseSequence(t.Context(), p.now.sequence()+20); err != nil {
		t.Fatal(err)
	}
	late := p.now.sealed()
	roots, _ := p.restored.trust.Bundle()
	sequence, err := p.restored.Accept(t.Context(), 0)
	if err != nil || sequence <= p.now.sequence() || sequence != p.restored.sequence() {
		t.Errorf("it goes on at %d, %v; agents hold %d", sequence, err, p.now.sequence())
	}
	if now, _ := p.restored.trust.Bundle(); len(now.X509Authorities()) != len(roots.X509Authorities()) {
		t.Error("the roots are others")
	}
	// Also whoever saw more of what is lost than was known follows; over a restart too.
	for range 2 {
		p.restored.witnesses(early, true, "")
		p.restored.witnesses(late, true, "")
		p.restored.witnesses(p.restored.sealed(), true, "")
		p.restored.open()
	}
	p.restored.deny("/after")
	if sequence, err = p.restored.Accept(t.Context(), 1<<40); err != nil || sequence <= 1<<40 {
		t.Errorf("above a sequence that was named: %d, %v", sequence, err)
	}
	if _, err = p.restored.Accept(t.Context(), 1<<60); refusal.Of(err) != refusal.RequestMalformed {
		t.Errorf("above what can be: %v", err)
	}
}

// Acknowledgements of sequences that may be of a lost bundle confirm nothing in a rollout.
func TestLostAcknowledgementsConfirmNothing(t *testing.T) {
	w := world.New(t, "")
	caller := w.AttestAgent(world.Agent)
	agents := w.RA.Agents
	later := time.Now().Add(2 * ca.MaxTTL)
	if now, then, ever := agents.Unconfirmed(5, time.Now()), agents.Unconfirmed(5, later), agents.Unconfirmed(5, time.Time{}); len(now) != 1 || len(then) != 0 || len(ever) != 1 {
		t.Errorf("an agent counts now: %v, when all below it has ended: %v, when nobody knows: %v", now, then, ever)
	}
	agents.Connected(caller.ID, caller.Serial, "").Acknowledge(5, nil)
	if names := agents.Unconfirmed(5, time.Now()); len(names) != 0 {
		t.Fatalf("unconfirmed: %v", names)
	}
	sequence, err := w.RA.Continuity.Accept(t.Context(), 5)
	if err != nil {
		t.Fatal(err)
	}
	if names := agents.Unconfirmed(5, time.Now()); len(names) != 1 {
		t.Errorf("after the loss was accepted unconfirmed are %v", names)
	}
	if err := agents.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, err := registration.OpenAgentBook(t.Context(), w.Store)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := registration.OpenContinuity(t.Context(), w.Store, w.Trust, again, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if names := again.Unconfirmed(5, time.Now()); len(names) != 1 {
		t.Errorf("after a restart unconfirmed are %v", names)
	}
	again.Connected(caller.ID, caller.Serial, "").Acknowledge(sequence, nil)
	if names := again.Unconfirmed(5, time.Now()); len(names) != 0 {
		t.Errorf("with bundle %d unconfirmed are %v", sequence, names)
	}
}

// broken fails at what it is told to.
type broken struct {
	*bolt.Store
	put, accept error
}

func (b *broken) PutLoss(ctx context.Context, l ca.Loss) error {
	return errors.Join(b.put, b.Store.PutLoss(ctx, l)) // it failed after it had taken effect, or did not
}
func (b *broken) AcceptLoss(ctx context.Context, beyond uint64) error {
	if b.accept != nil {
		return b.accept
	}
	return b.Store.AcceptLoss(ctx, beyond)
}

// A store that fails makes the CA no less careful: what is lost is known, and stays until its end is durable.
func TestALossAndAFullDisk(t *testing.T) {
	p := newPast(t, func(l *life) { l.deny("/a") })
	s := &broken{Store: p.restored.store, put: errors.New("disk full"), accept: errors.New("disk full")}
	c, err := registration.OpenContinuity(t.Context(), s, p.restored.trust, p.restored.agents, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Witness(t.Context(), witness, p.now.sealed()); refusal.Of(err) != refusal.StoreUnavailable {
		t.Errorf("got %v", err)
	}
	if refusal.Of(c.Ready()) != refusal.CARolledBack {
		t.Error("it goes on")
	}
	if _, err := c.Accept(t.Context(), 0); refusal.Of(err) != refusal.StoreUnavailable || refusal.Of(c.Ready()) != refusal.CARolledBack {
		t.Errorf("accepted: %v, ready: %v", err, c.Ready())
	}
	s.accept = nil
	if _, err := c.Accept(t.Context(), 0); err != nil || c.Ready() != nil {
		t.Errorf("accepted: %v, ready: %v", err, c.Ready())
	}
}

// While a loss stands, no workload and no agent gets anything, and each refusal leaves its line.
func TestARolledBackCAIssuesNothing(t *testing.T) {
	w := world.New(t, "")
	agent := w.AttestAgent(world.Agent)
	if err := w.Store.PutLoss(t.Context(), ca.Loss{Mark: ca.Mark{Generation: 9, Bundle: 9}, Agent: witness.String(), Since: time.Now()}); err != nil {
		t.Fatal(err)
	}
	c, err := registration.OpenContinuity(t.Context(), w.Store, w.Trust, w.RA.Agents, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w.RA.Continuity = c
	entries := ledgerSize(t, w)
	if _, err := w.Issue(agent, world.Web); refusal.Of(err) != refusal.CARolledBack {
		t.Errorf("a workload: %v", err)
	}
	if line := w.Audit.Last(t); line["outcome"] != string(refusal.CARolledBack) {
		t.Errorf("the audit line is %v", line)
	}
	if err := attestWith(w, w.Token(world.Agent, "meshca-agent")); refusal.Of(err) != refusal.CARolledBack {
		t.Errorf("an agent: %v", err)
	}
	if now := ledgerSize(t, w); now != entries {
		t.Errorf("%d entries more are in the ledger", now-entries)
	}
	if _, err := c.Accept(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Issue(agent, world.Web); err != nil {
		t.Errorf("after it was accepted: %v", err)
	}
}

func FuzzWitness(f *testing.F) {
	dir, err := os.MkdirTemp("", "witness")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = os.RemoveAll(dir) })
	s, err := bolt.Open(filepath.Join(dir, "meshca.db"))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = s.Close() })
	agents, err := registration.OpenAgentBook(f.Context(), s)
	if err != nil {
		f.Fatal(err)
	}
	c, err := registration.OpenContinuity(f.Context(), s, none{}, agents, slog.New(slog.DiscardHandler))
	if err != nil {
		f.Fatal(err)
	}
	sealed, _ := c.Sealed()
	f.Add(sealed)
	f.Add(sealed[:40])
	f.Fuzz(func(t *testing.T, data []byte) {
		proven, err := c.Witness(t.Context(), witness, data)
		if err != nil || proven != bytes.Equal(data, sealed) {
			t.Errorf("proven %v, %v", proven, err)
		}
	})
}

// none is no bundle.
type none struct{}

func (none) RaiseSequence(context.Context, uint64) (uint64, error) { return 0, nil }

var _ registration.Bundles = none{}
