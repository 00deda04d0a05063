package storetest

import (
	"context"
	"errors"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
)

func testDenials(t *testing.T, open Opener) {
	place := t.TempDir()
	s := open(t, place)
	a := ca.Denial{ID: "spiffe://example.org/a", Why: "stolen", Since: epoch, By: "uid 0"}
	b := ca.Denial{ID: "spiffe://example.org/b", Since: epoch, By: "uid 7"}
	must(t, s.PutDenial(t.Context(), b))
	must(t, s.PutDenial(t.Context(), a))
	a.Why = "still stolen"
	must(t, s.PutDenial(t.Context(), a))
	s = reopened(t, open, s, place)
	got, err := s.Denials(t.Context())
	must(t, err)
	if !reflect.DeepEqual(got, []ca.Denial{a, b}) {
		t.Errorf("read %+v", got)
	}
	for _, want := range []bool{true, false} {
		was, err := s.DeleteDenial(t.Context(), a.ID)
		must(t, err)
		if was != want {
			t.Errorf("lifted: %v, want %v", was, want)
		}
	}
	got, err = s.Denials(t.Context())
	must(t, err)
	if !reflect.DeepEqual(got, []ca.Denial{b}) {
		t.Errorf("read %+v", got)
	}
	if err := s.PutDenial(t.Context(), ca.Denial{}); err == nil {
		t.Error("a denial of nobody was stored")
	}
	must(t, s.Close())
}

func testRenewOrders(t *testing.T, open Opener) {
	place := t.TempDir()
	s := open(t, place)
	now := time.Now().UTC().Truncate(time.Second)
	all := ca.RenewOrder{IssuedBefore: now, Spread: time.Minute, Until: now.Add(time.Hour), For: "a step"}
	slower := ca.RenewOrder{IssuedBefore: now.Add(time.Second), Spread: time.Hour, Until: now.Add(time.Hour)}
	one := ca.RenewOrder{ID: "spiffe://example.org/a", IssuedBefore: now, Until: now.Add(time.Hour)}
	past := ca.RenewOrder{ID: "spiffe://example.org/b", IssuedBefore: now.Add(-time.Hour), Until: now.Add(-time.Second)}
	must(t, s.SetRenewOrders(t.Context(), []ca.RenewOrder{past, one, all}))
	must(t, s.SetRenewOrders(t.Context(), []ca.RenewOrder{past, all, slower}))
	s = reopened(t, open, s, place)
	got, err := s.RenewOrders(t.Context())
	must(t, err)
	if want := []ca.RenewOrder{all, slower}; !reflect.DeepEqual(got, want) {
		t.Errorf("read %+v, want %+v", got, want)
	}
	must(t, s.Close())
}

func agent(id string) ca.AgentRecord {
	return ca.AgentRecord{
		ID: id, Cluster: "prod", Version: "1", LastSeen: epoch, AckedSequence: 3, HoldsUntil: epoch.Add(time.Hour),
		Instances: []ca.AgentInstance{{Serial: "ab", NotAfter: epoch, NodeName: "n", NodeUID: "u", PodName: "p", PodUID: "v"}},
	}
}

func testAgents(t *testing.T, open Opener) {
	place := t.TempDir()
	s := open(t, place)
	if _, found, err := s.Agent(t.Context(), "spiffe://example.org/x"); err != nil || found {
		t.Errorf("found an agent in a new store: %v", err)
	}
	b, a := agent("spiffe://example.org/b"), agent("spiffe://example.org/a")
	must(t, s.PutAgent(t.Context(), b))
	must(t, s.PutAgent(t.Context(), a))
	must(t, s.UpdateAgent(t.Context(), a.ID, func(r *ca.AgentRecord) error {
		if !reflect.DeepEqual(*r, a) {
			t.Errorf("edits %+v", *r)
		}
		r.AckedSequence = 9
		return nil
	}))
	a.AckedSequence = 9
	must(t, s.UpdateAgent(t.Context(), "spiffe://example.org/c", func(r *ca.AgentRecord) error {
		if !reflect.DeepEqual(*r, ca.AgentRecord{ID: "spiffe://example.org/c"}) {
			t.Errorf("a new record comes as %+v", *r)
		}
		r.Cluster = "test"
		return nil
	}))
	refused := errors.New("no")
	err := s.UpdateAgent(t.Context(), b.ID, func(r *ca.AgentRecord) error { r.Cluster = "x"; return refused })
	if err != refused {
		t.Errorf("the error of change came back as %v", err)
	}
	if err := s.UpdateAgent(t.Context(), b.ID, func(r *ca.AgentRecord) error { r.ID = "z"; return nil }); err == nil {
		t.Error("an agent changed its name")
	}
	must(t, s.UpdateAgent(t.Context(), b.ID, func(*ca.AgentRecord) error { return nil }))
	s = reopened(t, open, s, place)
	got, err := s.Agents(t.Context())
	must(t, err)
	if want := []ca.AgentRecord{a, b, {ID: "spiffe://example.org/c", Cluster: "test"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("read %+v, want %+v", got, want)
	}
	if r, found, err := s.Agent(t.Context(), b.ID); err != nil || !found || !reflect.DeepEqual(r, b) {
		t.Errorf("read %+v, %v, %v", r, found, err)
	}
	for _, want := range []bool{true, false} {
		if was, err := s.DeleteAgent(t.Context(), b.ID); err != nil || was != want {
			t.Errorf("deleted: %v, %v", was, err)
		}
	}
	must(t, s.Close())
}

func testAgentUpdates(t *testing.T, open Opener) {
	s := opened(t, open)
	const writers, rounds = 8, 20
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range rounds {
				if err := s.UpdateAgent(t.Context(), "spiffe://example.org/a", func(r *ca.AgentRecord) error { r.AckedSequence++; return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	r, _, err := s.Agent(t.Context(), "spiffe://example.org/a")
	must(t, err)
	if r.AckedSequence != writers*rounds {
		t.Errorf("%d of %d updates are there", r.AckedSequence, writers*rounds)
	}
}

// testProbe: a probe changes nothing that anyone reads, however often it is made, and fails where nothing can be written.
func testProbe(t *testing.T, open Opener) {
	place := t.TempDir()
	s := open(t, place)
	must(t, s.Probe(t.Context()))
	must(t, s.SwapBundle(t.Context(), 0, ca.StoredBundle{Sequence: 1, JSON: []byte("{}")}))
	must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{entry(1, time.Hour)}))
	must(t, s.PutDenial(t.Context(), ca.Denial{ID: "spiffe://example.org/a"}))
	for range 3 {
		must(t, s.Probe(t.Context()))
	}
	s = reopened(t, open, s, place)
	if b, err := s.Bundle(t.Context()); err != nil || b.Sequence != 1 || string(b.JSON) != "{}" {
		t.Errorf("the bundle is %+v, %v", b, err)
	}
	if all := scan(t, s); len(all) != 1 || !sameEntry(all[0], withIndex(entry(1, time.Hour), all[0].Index)) {
		t.Errorf("the ledger is %+v", all)
	}
	if d, err := s.Denials(t.Context()); err != nil || len(d) != 1 {
		t.Errorf("%d denials, %v", len(d), err)
	}
	must(t, s.Close())
	if err := s.Probe(t.Context()); err == nil {
		t.Error("a closed store could be written")
	}
}

func withIndex(e ca.LedgerEntry, i uint64) ca.LedgerEntry {
	e.Index = i
	return e
}

// testEndedContext: a call that comes too late does nothing.
func testEndedContext(t *testing.T, open Opener) {
	s := opened(t, open)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, err := range map[string]error{
		"SwapBundle":     s.SwapBundle(ctx, 0, ca.StoredBundle{Sequence: 1}),
		"AppendLedger":   s.AppendLedger(ctx, []ca.LedgerEntry{entry(1, time.Hour)}),
		"PutDenial":      s.PutDenial(ctx, ca.Denial{ID: "a"}),
		"SetRenewOrders": s.SetRenewOrders(ctx, []ca.RenewOrder{{ID: "a"}}),
		"PutAgent":       s.PutAgent(ctx, ca.AgentRecord{ID: "a"}),
		"Probe":          s.Probe(ctx),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n, err := s.LedgerSize(t.Context()); err != nil || n != 0 {
		t.Errorf("%d entries, %v", n, err)
	}
	if d, err := s.Denials(t.Context()); err != nil || len(d) != 0 {
		t.Errorf("%d denials, %v", len(d), err)
	}
}
