package main

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/rotation"
)

// moves counts what a rollout did.
type moves struct{ n int }

func (m *moves) Publish(context.Context, rotation.Party) (uint64, error) { m.n++; return 1, nil }
func (m *moves) Unconfirmed(context.Context, uint64, time.Time) ([]string, error) {
	m.n++
	return nil, nil
}
func (m *moves) Prepare(context.Context, rotation.Party) error { m.n++; return nil }
func (m *moves) Assign(context.Context, rotation.Rollout) (time.Time, error) {
	m.n++
	return time.Time{}, nil
}
func (m *moves) Withdraw(context.Context, rotation.Party) error { m.n++; return nil }

// A rollout in a journal that is an old one stands still at every step, until that is accepted.
func TestARolloutStandsStillWhileTheStoreIsAnOldOne(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	d := opened(t, c)
	if err := d.store.PutLoss(t.Context(), ca.Loss{Mark: ca.Mark{Generation: 9, Bundle: 9}, Agent: "an agent"}); err != nil {
		t.Fatal(err)
	}
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	d = opened(t, c)
	if why := d.notReady(); len(why) == 0 || refusal.Of(d.continuity.Ready()) != refusal.CARolledBack {
		t.Errorf("it is not ready for %q", why)
	}
	under := &moves{}
	h := held{Authorities: under, continuity: d.continuity, tainted: func(p rotation.Party) bool { return p.ID == "tainted" }}
	all := func() (errs []error) {
		_, publish := h.Publish(t.Context(), rotation.Party{})
		_, unconfirmed := h.Unconfirmed(t.Context(), 1, time.Time{})
		_, assign := h.Assign(t.Context(), rotation.Rollout{})
		return []error{publish, unconfirmed, h.Prepare(t.Context(), rotation.Party{}), assign, h.Withdraw(t.Context(), rotation.Party{})}
	}
	for i, err := range all() {
		if refusal.Of(err) != refusal.CARolledBack {
			t.Errorf("step %d: %v", i, err)
		}
	}
	if under.n != 0 {
		t.Errorf("%d moves were made", under.n)
	}
	if err := h.Withdraw(t.Context(), rotation.Party{ID: "tainted"}); err != nil || under.n != 1 {
		t.Errorf("what is tainted stays: %v", err)
	}
	// One that has retired by it may be the one that agents rely on: nobody takes it out before that is settled, and `ca abort`
	// still goes back to it. What is tainted leaves.
	for id, step := range map[string]rotation.Step{"old": rotation.StepRetired, "tainted": rotation.StepOut} {
		_, version, err := d.store.Rollout(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		r := rotation.Rollout{Old: rotation.Party{ID: id}, New: rotation.Party{ID: "new"}, Step: rotation.StepRetired, NewShare: 100, LastEnd: time.Now().Add(-time.Hour)}
		if err := d.store.SwapRollout(t.Context(), version, r); err != nil {
			t.Fatal(err)
		}
		x := rotation.NewRoller(rotation.RollerOptions{Journal: d.store, Authorities: held{Authorities: &moves{}, continuity: d.continuity, tainted: h.tainted}})
		for x.Move(t.Context()) {
		}
		if s, _ := x.Standing(); s.Rollout.Step != step || (refusal.Of(s.Err) == refusal.CARolledBack) != (step == rotation.StepRetired) {
			t.Errorf("%s has retired: it is %s, %v", id, s.Rollout.Step, s.Err)
		}
	}
	if _, err := d.continuity.Accept(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(all()...); err != nil || under.n != 6 {
		t.Errorf("after it was accepted: %d moves, %v", under.n, err)
	}
}

// The ledger of a restored store does not know what was issued after the backup, for as long as that can live.
func TestARestoredStoreKnowsHowLongItsLedgerIsShort(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	d := opened(t, c)
	if until, err := d.unrecorded(t.Context()); err != nil || !until.IsZero() {
		t.Errorf("of a store that never was restored: until %v, %v", until, err)
	}
	made, err := d.backup(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Create(filepath.Join(dir, "backup"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(file, made)
	if err := errors.Join(err, made.Close(), file.Close(), d.close()); err != nil {
		t.Fatal(err)
	}
	before := time.Now().Truncate(time.Second)
	if err := restore(t.Context(), io.Discard, c, restoreFlags{replace: true}, file.Name()); err != nil {
		t.Fatal(err)
	}
	until, err := opened(t, c).unrecorded(t.Context())
	if err != nil || until.Before(before.Add(ca.MaxTTL)) || until.After(time.Now().Add(ca.MaxTTL)) {
		t.Errorf("of one restored just now: until %v, %v", until, err)
	}
}

// The root that signs by a restored store is one that was tainted since: nothing is signed under it, no bundle with it is
// told, and a second taint that names another issuer leads out.
func TestARestoredStoreDoesNotSignUnderATaintedRoot(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	c.BundleFile = filepath.Join(dir, "public", "bundle.json")
	d, err := open(t.Context(), c, slog.New(slog.DiscardHandler), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	stolen := d.authority.Assignment().Root.ID
	journal, version, err := d.store.Rollout(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	inherited := journal.Inherit(rotation.Rollout{Taints: []rotation.Taint{{ID: stolen, At: time.Now(), By: "op"}}}, time.Now())
	if err := errors.Join(d.store.SwapRollout(t.Context(), version, inherited), d.close()); err != nil {
		t.Fatal(err)
	}

	d = opened(t, c)
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	signing := make(chan struct{})
	first := sync.OnceFunc(func() { close(signing) })
	running.Go(func() { d.keepLines(ctx, first) })
	running.Go(func() { d.bundleFile.keep(ctx) })
	eventually := func(what string, f func() bool) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); !f(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("never: %s", what)
			}
		}
	}
	eventually("the bundle file is held back", func() bool { return len(d.degraded()) == 1 })
	says := strings.Join(d.notReady(), "\n")
	if !strings.Contains(says, "ROOT_TAINTED") || !strings.Contains(says, "ca taint root --issuer") || !d.authority.NotAfter().IsZero() {
		t.Errorf("it is not ready for %q, and its intermediate ends at %s", says, d.authority.NotAfter())
	}
	if _, err := os.Stat(c.BundleFile); err == nil {
		t.Error("a bundle with the tainted root was told")
	}

	running.Go(func() { d.roller.Run(ctx) })
	if _, err := d.operator.Rotate(ctx, rollout.RotateOptions{By: "test", Within: 20 * time.Second}); err != nil {
		t.Fatal(err)
	}
	eventually("another root signs", func() bool {
		return d.authority.Assignment().Root.ID != stolen && !d.authority.NotAfter().IsZero()
	})
	select {
	case <-signing:
	case <-time.After(30 * time.Second):
		t.Error("nobody is told that the CA can sign for itself, too")
	}
	if err := d.store.ScanLedger(t.Context(), func(e ca.LedgerEntry) (bool, error) {
		t.Errorf("%s was signed under %x", e.Profile, e.Root)
		return false, nil
	}); err != nil {
		t.Error(err)
	}
	w := httptest.NewRecorder()
	opsHandler(d.registry, d.notReady, d.degraded).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if want := "\nmeshca_own_renewals_total{credential=\"intermediate\",outcome=\"ok\"} 1\n"; !strings.Contains(w.Body.String(), want) {
		t.Error("not one intermediate was made, that of the other root")
	}
	eventually("the bundle file is there", func() bool { _, err := os.Stat(c.BundleFile); return err == nil })
}

// What was tainted since the backup is a key that the backup knows by other roots: the one that signs, and one that is
// trusted. Its journal is one of before keys were named.
func TestARestoredStoreKnowsATaintedKeyByOtherRoots(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	d, err := open(t.Context(), c, slog.New(slog.DiscardHandler), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	other := disk.Files{Cert: dir + "/other.crt", Key: dir + "/other.key"}
	anchor, err := disk.Create(other, disk.CreateOptions{TrustDomain: c.trustDomain})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.operator.TrustRoots(t.Context(), []*x509.Certificate{anchor}); err != nil {
		t.Fatal(err)
	}
	bundle, _ := d.trust.Bundle()
	signing := bundle.X509Authorities()[0]
	journal, version, err := d.store.Rollout(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	journal.New.Key = ""
	later := rotation.Rollout{Taints: []rotation.Taint{
		{ID: "of the root that signs", Key: ca.KeyOf(signing), At: time.Now(), By: "op"},
		{ID: "of the anchor", Key: ca.KeyOf(anchor), At: time.Now(), By: "op"},
	}}
	if err := errors.Join(d.store.SwapRollout(t.Context(), version, journal.Inherit(later, time.Now())), d.close()); err != nil {
		t.Fatal(err)
	}

	d = opened(t, c)
	if says := strings.Join(d.notReady(), "\n"); !strings.Contains(says, "the root that signs by the store was tainted") {
		t.Errorf("it is not ready for %q", says)
	}
	for d.roller.Move(t.Context()) {
	}
	if bundle, _ := d.trust.Bundle(); bundle.HasX509Authority(anchor) {
		t.Error("the anchor's key is tainted, and the anchor is trusted")
	}
	if _, err := d.operator.TrustRoots(t.Context(), []*x509.Certificate{anchor}); refusal.Of(err) != refusal.RootTainted {
		t.Errorf("it comes back: %v", err)
	}
	// A second start finds all of that in the journal, and changes nothing.
	_, settled, err := d.store.Rollout(t.Context())
	if err == nil {
		err = d.operator.Settle(t.Context())
	}
	if _, again, failed := d.store.Rollout(t.Context()); err != nil || failed != nil || again != settled {
		t.Errorf("change %d follows on %d: %v, %v", again, settled, err, failed)
	}
}

// An operator taints again what was tainted in a past that is lost, and accepts the loss: agents, which have seen the root go,
// are not told of it in between.
func TestWhatIsTaintedLeavesBeforeALossIsAccepted(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	d := opened(t, c)
	anchor, err := disk.Create(disk.Files{Cert: dir + "/other.crt", Key: dir + "/other.key"}, disk.CreateOptions{TrustDomain: c.trustDomain})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.operator.TrustRoots(t.Context(), []*x509.Certificate{anchor}); err != nil {
		t.Fatal(err)
	}
	if err := d.store.PutLoss(t.Context(), ca.Loss{Mark: ca.Mark{Generation: 99, Bundle: 99}, Agent: "an agent"}); err != nil {
		t.Fatal(err)
	}
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	d = opened(t, c)
	if _, err := d.operator.Rotate(t.Context(), rollout.RotateOptions{By: "test", Within: 20 * time.Second, Tainted: ca.RootID(anchor)}); err != nil {
		t.Fatal(err)
	}
	sequence, err := accepting{d.continuity, d.roller}.Accept(t.Context(), 0)
	bundle, _ := d.trust.Bundle()
	if now, _ := bundle.SequenceNumber(); err != nil || now != sequence || bundle.HasX509Authority(anchor) || d.continuity.Ready() != nil {
		t.Errorf("told is bundle %d of %d, which has the root: %v; %v", now, sequence, bundle.HasX509Authority(anchor), err)
	}
}
