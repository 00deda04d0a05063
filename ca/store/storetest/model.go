package storetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/meshca/meshca/ca"
)

// model is what a store holds, kept in the plainest way.
type model struct {
	sequence uint64
	bundle   string
	groups   [][]ca.LedgerEntry
	next     uint64
	denials  map[string]string
	agents   map[string]uint64
	// changes are those of the bundle and of denials, which have a mark each.
	changes uint64
}

// testModel runs random sequences of calls, closing and opening between them, against the store and the model.
func testModel(t *testing.T, open Opener) {
	rapid.Check(t, func(rt *rapid.T) {
		place := t.TempDir()
		s := open(t, place)
		m := &model{next: 1, denials: map[string]string{}, agents: map[string]uint64{}}
		ctx := context.Background()
		id := rapid.SampledFrom([]string{"spiffe://example.org/a", "spiffe://example.org/b", "spiffe://example.org/c"})
		check := func(err error) {
			rt.Helper()
			if err != nil {
				rt.Fatal(err)
			}
		}
		// A moment is a second of one of some days: a store may look no further back than to the day before.
		moment := func(rt *rapid.T, what string) time.Duration {
			return time.Duration(rapid.IntRange(0, 10).Draw(rt, what))*time.Second + time.Duration(rapid.IntRange(0, 4).Draw(rt, "day"))*24*time.Hour
		}
		rt.Repeat(map[string]func(*rapid.T){
			"swap": func(rt *rapid.T) {
				expected := rapid.Uint64Range(0, 4).Draw(rt, "expected")
				next := ca.StoredBundle{Sequence: expected + rapid.Uint64Range(1, 2).Draw(rt, "step"), JSON: []byte(rapid.String().Draw(rt, "json"))}
				err := s.SwapBundle(ctx, expected, next)
				if expected != m.sequence {
					if !errors.Is(err, ca.ErrConflict) {
						rt.Fatalf("expected %d of %d: %v", expected, m.sequence, err)
					}
					return
				}
				check(err)
				m.sequence, m.bundle = next.Sequence, string(next.JSON)
				m.changes++
			},
			"append": func(rt *rapid.T) {
				var group []ca.LedgerEntry
				for range rapid.IntRange(0, 4).Draw(rt, "size") {
					group = append(group, entry(rapid.IntRange(0, 255).Draw(rt, "entry"), moment(rt, "end")))
				}
				check(s.AppendLedger(ctx, group))
				m.append(group)
			},
			"prune": func(rt *rapid.T) {
				before := epoch.Add(moment(rt, "before"))
				n, err := s.PruneLedger(ctx, before)
				check(err)
				m.prune(rt, n, scan(rt, s), before)
			},
			"what lives": func(rt *rapid.T) {
				at := epoch.Add(moment(rt, "at"))
				if rapid.Bool().Draw(rt, "noted") {
					check(s.NoteEnded(ctx, at))
				}
				m.living(rt, s, at)
			},
			"deny": func(rt *rapid.T) {
				d := ca.Denial{ID: id.Draw(rt, "id"), Why: rapid.String().Draw(rt, "why"), Since: epoch}
				check(s.PutDenial(ctx, d))
				m.denials[d.ID] = d.Why
				m.changes++
			},
			"allow": func(rt *rapid.T) {
				i := id.Draw(rt, "id")
				was, err := s.DeleteDenial(ctx, i)
				check(err)
				if _, want := m.denials[i]; was != want {
					rt.Fatalf("lifted %v, want %v", was, want)
				}
				if was {
					m.changes++
				}
				delete(m.denials, i)
			},
			"ack": func(rt *rapid.T) {
				i := id.Draw(rt, "id")
				check(s.UpdateAgent(ctx, i, func(r *ca.AgentRecord) error { r.AckedSequence++; return nil }))
				m.agents[i]++
			},
			"restart": func(*rapid.T) {
				check(s.Close())
				s = open(t, place)
			},
			"": func(rt *rapid.T) { m.compare(rt, s) },
		})
		check(s.Close())
	})
}

func (m *model) append(group []ca.LedgerEntry) {
	if len(group) == 0 {
		return
	}
	stored := slices.Clone(group)
	for i := range stored {
		stored[i].Index = m.next
		m.next++
	}
	m.groups = append(m.groups, stored)
}

// prune forgets what the store has, if it may: groups of which all has ended, the oldest of them at any rate. What is behind
// one that has not ended it may forget as well, where NoteEnded found that one to be from a clock far ahead.
func (m *model) prune(rt *rapid.T, n uint64, left []ca.LedgerEntry, before time.Time) {
	had, gone, oldest := map[uint64]bool{}, uint64(0), true
	for _, e := range left {
		had[e.Index] = true
	}
	m.groups = slices.DeleteFunc(m.groups, func(group []ca.LedgerEntry) bool {
		ended := !slices.ContainsFunc(group, func(e ca.LedgerEntry) bool { return !e.NotAfter.Before(before) })
		oldest = oldest && ended
		if had[group[0].Index] {
			if oldest {
				rt.Fatalf("entry %d is kept, and it has ended, with all before it", group[0].Index)
			}
			return false
		}
		if !ended {
			rt.Fatalf("entry %d is pruned, and its group has not ended", group[0].Index)
		}
		gone += uint64(len(group))
		return true
	})
	if n != gone {
		rt.Fatalf("it says that it pruned %d, and %d are gone", n, gone)
	}
}

func (m *model) living(rt *rapid.T, s Store, at time.Time) {
	want := slices.DeleteFunc(slices.Concat(m.groups...), func(e ca.LedgerEntry) bool { return !e.NotAfter.After(at) })
	slices.Reverse(want)
	var got []ca.LedgerEntry
	err := s.ScanLiving(context.Background(), at, func(e ca.LedgerEntry) (bool, error) { got = append(got, e); return true, nil })
	if err != nil || !slices.EqualFunc(got, want, sameEntry) {
		rt.Fatalf("%d entries live at %s, want %d: %v", len(got), at, len(want), err)
	}
}

func (m *model) compare(rt *rapid.T, s Store) {
	ctx := context.Background()
	b, err := s.Bundle(ctx)
	if err != nil || b.Sequence != m.sequence || string(b.JSON) != m.bundle {
		rt.Fatalf("bundle %d %q, want %d %q: %v", b.Sequence, b.JSON, m.sequence, m.bundle, err)
	}
	if mark, _ := s.Mark(); mark.Generation != m.changes || mark.Bundle != m.sequence && m.changes > 0 {
		rt.Fatalf("mark %+v after %d changes, bundle %d", mark, m.changes, m.sequence)
	}
	want := slices.Concat(m.groups...)
	slices.Reverse(want)
	got := scan(rt, s)
	if !slices.EqualFunc(got, want, sameEntry) {
		rt.Fatalf("the ledger has %d entries, want %d", len(got), len(want))
	}
	if n, err := s.LedgerSize(ctx); err != nil || n != uint64(len(want)) {
		rt.Fatalf("size %d, want %d: %v", n, len(want), err)
	}
	denials, err := s.Denials(ctx)
	if err != nil || len(denials) != len(m.denials) {
		rt.Fatalf("%d denials, want %d: %v", len(denials), len(m.denials), err)
	}
	for _, d := range denials {
		if why, ok := m.denials[d.ID]; !ok || d.Why != why {
			rt.Fatalf("denial %+v, want %q", d, why)
		}
	}
	agents, err := s.Agents(ctx)
	if err != nil {
		rt.Fatal(err)
	}
	acked := map[string]uint64{}
	for _, a := range agents {
		acked[a.ID] = a.AckedSequence
	}
	if !maps.Equal(acked, m.agents) {
		rt.Fatal(fmt.Sprintf("agents %v, want %v", acked, m.agents))
	}
}
