package main

import (
	"context"
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
	h := held{Authorities: under, continuity: d.continuity}
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
	if _, err := d.continuity.Accept(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(all()...); err != nil || under.n != 5 {
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
	running.Go(func() { d.keepLines(ctx, func() {}) })
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
