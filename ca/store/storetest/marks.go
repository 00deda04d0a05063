package storetest

import (
	"bytes"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// testMarks: a store knows the marks of its own past, over restarts, and no others; the key of marks stays.
func testMarks(t *testing.T, open Opener) {
	place := t.TempDir()
	s := open(t, place)
	if m, _ := s.Mark(); m != (ca.Mark{}) {
		t.Fatalf("a new store has the mark %+v", m)
	}
	h, err := s.History(t.Context())
	must(t, err)
	if len(h.MarkKey) != 32 || bytes.Equal(h.MarkKey, make([]byte, 32)) || h.Loss != nil || h.Floor != 0 || !h.RestoredAt.IsZero() {
		t.Fatalf("a new store has the history %+v", h)
	}
	var past []ca.Mark
	for i := range uint64(5) {
		must(t, s.SwapBundle(t.Context(), i, ca.StoredBundle{Sequence: i + 1, JSON: []byte("{}")}))
		m, _ := s.Mark()
		past = append(past, m)
	}
	s = reopened(t, open, s, place)
	if m, _ := s.Mark(); m != past[4] || m.Generation != 5 || m.Bundle != 5 {
		t.Errorf("the mark was %+v, and is %+v", past[4], m)
	}
	again, err := s.History(t.Context())
	must(t, err)
	if !bytes.Equal(again.MarkKey, h.MarkKey) {
		t.Error("the key of marks has changed")
	}
	for _, m := range past {
		hasMark(t, s, m, true)
		other := m
		other.Tag[3]++
		hasMark(t, s, other, false) // another store's, of the same generation
		other = m
		other.Generation += 5
		hasMark(t, s, other, false) // not reached yet
	}
	hasMark(t, s, ca.Mark{}, true)
	must(t, s.Close())
}

func hasMark(t *testing.T, s Store, m ca.Mark, want bool) {
	t.Helper()
	if has, err := s.HasMark(t.Context(), m); err != nil || has != want {
		t.Errorf("mark %+v: %v, %v; want %v", m, has, err, want)
	}
}

// testMarkedChanges: what operators and rollouts decide makes a mark and wakes who follows it; nothing else does.
func testMarkedChanges(t *testing.T, open Opener) {
	s := opened(t, open)
	ctx := t.Context()
	expect := func(what string, changes bool, f func() error) {
		t.Helper()
		before, stale := s.Mark()
		must(t, f())
		after, _ := s.Mark()
		woken := false
		select {
		case <-stale:
			woken = true
		default:
		}
		want := before.Generation
		if changes {
			want++
		}
		if after.Generation != want || woken != changes || changes && after.Tag == before.Tag {
			t.Errorf("%s: generation %d to %d, woken %v", what, before.Generation, after.Generation, woken)
		}
	}
	expect("a bundle", true, func() error { return s.SwapBundle(ctx, 0, ca.StoredBundle{Sequence: 1}) })
	expect("a rollout", true, func() error { return s.SwapRollout(ctx, 0, rotation.Rollout{Step: rotation.StepChosen}) })
	expect("a denial", true, func() error { return s.PutDenial(ctx, ca.Denial{ID: "a"}) })
	expect("its end", true, func() error { _, err := s.DeleteDenial(ctx, "a"); return err })
	expect("the end of none", false, func() error { _, err := s.DeleteDenial(ctx, "a"); return err })
	expect("an order", true, func() error {
		return s.SetRenewOrders(ctx, []ca.RenewOrder{{ID: "a", Until: time.Now().Add(time.Hour)}})
	})
	expect("a ledger entry", false, func() error { return s.AppendLedger(ctx, []ca.LedgerEntry{entry(1, time.Hour)}) })
	expect("an agent", false, func() error { return s.PutAgent(ctx, ca.AgentRecord{ID: "a"}) })
	expect("a loss", false, func() error { return s.PutLoss(ctx, ca.Loss{Agent: "a"}) })
	expect("a conflict", false, func() error { _ = s.SwapBundle(ctx, 9, ca.StoredBundle{Sequence: 10}); return nil })

	const writers, each = 8, 10
	before, _ := s.Mark()
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				if err := s.PutDenial(ctx, ca.Denial{ID: "a"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if after, _ := s.Mark(); after.Generation != before.Generation+writers*each {
		t.Errorf("%d changes: generation %d to %d", writers*each, before.Generation, after.Generation)
	}
}

// testLosses: a loss stands over restarts until it is accepted; then the store goes on beyond it, and holds no mark of
// the time before against anyone.
func testLosses(t *testing.T, open Opener) {
	place := t.TempDir()
	s := open(t, place)
	must(t, s.SwapBundle(t.Context(), 0, ca.StoredBundle{Sequence: 7, JSON: []byte("{}")}))
	own, _ := s.Mark()
	lost := ca.Mark{Generation: 40, Tag: [16]byte{9}, Bundle: 12}
	fork := ca.Mark{Generation: 1, Tag: [16]byte{8}, Bundle: 12}
	hasMark(t, s, lost, false)
	hasMark(t, s, fork, false)
	want := ca.Loss{Mark: lost, Agent: "spiffe://example.org/agent", Since: time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)}
	must(t, s.PutLoss(t.Context(), ca.Loss{Agent: "another"}))
	must(t, s.PutLoss(t.Context(), want))
	s = reopened(t, open, s, place)
	h, err := s.History(t.Context())
	must(t, err)
	if h.Loss == nil || !reflect.DeepEqual(*h.Loss, want) {
		t.Fatalf("the loss %+v became %+v", want, h.Loss)
	}
	must(t, s.AcceptLoss(t.Context(), 1040))
	s = reopened(t, open, s, place)
	if h, err = s.History(t.Context()); err != nil || h.Loss != nil || h.Floor != 7 {
		t.Errorf("after it was accepted: %+v, %v", h, err)
	}
	now, _ := s.Mark()
	if now.Generation <= 1040 || now.Bundle != 7 {
		t.Errorf("it goes on at %+v", now)
	}
	for _, m := range []ca.Mark{own, lost, fork, now, {Generation: 1040, Tag: [16]byte{1}}} {
		hasMark(t, s, m, true)
	}
	hasMark(t, s, ca.Mark{Generation: now.Generation, Tag: [16]byte{1}}, false)
	hasMark(t, s, ca.Mark{Generation: now.Generation + 1}, false)
	must(t, s.Close())
}
