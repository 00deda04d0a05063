package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
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
