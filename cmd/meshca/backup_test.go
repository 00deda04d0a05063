package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// moves counts what a rollout did, and says when the last certificate ends.
type moves struct {
	n       int
	lastEnd time.Time
}

func (m *moves) Publish(context.Context, rotation.Party) (uint64, error) { m.n++; return 1, nil }
func (m *moves) Unconfirmed(context.Context, uint64, time.Time) ([]string, error) {
	m.n++
	return nil, nil
}
func (m *moves) Prepare(context.Context, rotation.Party) error { m.n++; return nil }
func (m *moves) Assign(context.Context, rotation.Rollout) (time.Time, error) {
	m.n++
	return m.lastEnd, nil
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
	h, err := d.hold(t.Context(), under)
	if err != nil {
		t.Fatal(err)
	}
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

// The ledger of a restored store does not know what was issued after the backup: an old root stays until that has ended.
func TestARestoredLedgerKeepsRootsLonger(t *testing.T) {
	dir := t.TempDir()
	d := opened(t, configIn(t, dir, clusterIn(t, dir, "a", false)))
	now := time.Now()
	for name, tt := range map[string]struct {
		restored, lastEnd, want time.Time
		step                    rotation.Step
	}{
		"never restored":      {lastEnd: now, want: now, step: rotation.StepSigning},
		"restored":            {restored: now, lastEnd: now, want: now.Add(ca.MaxTTL), step: rotation.StepSigning},
		"and nothing known":   {restored: now, want: now.Add(ca.MaxTTL), step: rotation.StepSigning},
		"restored before":     {restored: now.Add(-ca.MaxTTL), lastEnd: now.Add(time.Hour), want: now.Add(time.Hour), step: rotation.StepSigning},
		"while both may sign": {restored: now, step: rotation.StepCanary},
	} {
		h := held{Authorities: &moves{lastEnd: tt.lastEnd}, continuity: d.continuity}
		if !tt.restored.IsZero() {
			h.unrecorded = tt.restored.Add(ca.MaxTTL)
		}
		if got, err := h.Assign(t.Context(), rotation.Rollout{Step: tt.step}); err != nil || !got.Equal(tt.want) {
			t.Errorf("%s: the last certificate ends at %v, want %v (%v)", name, got, tt.want, err)
		}
	}
}
