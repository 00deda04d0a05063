package storetest

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/meshca/meshca/ca"
)

func testBundle(t *testing.T, open Opener) {
	place := t.TempDir()
	s := open(t, place)
	got, err := s.Bundle(t.Context())
	must(t, err)
	if got.Sequence != 0 || got.JSON != nil {
		t.Fatalf("a new store has the bundle %+v", got)
	}
	first := ca.StoredBundle{Sequence: 1, JSON: []byte(`{"keys":[]}`)}
	must(t, s.SwapBundle(t.Context(), 0, first))
	for _, expected := range []uint64{0, 2, 99} {
		if err := s.SwapBundle(t.Context(), expected, ca.StoredBundle{Sequence: 100}); !errors.Is(err, ca.ErrConflict) {
			t.Errorf("swapped against sequence %d: %v", expected, err)
		}
	}
	if err := s.SwapBundle(t.Context(), 1, ca.StoredBundle{Sequence: 1}); err == nil || errors.Is(err, ca.ErrConflict) {
		t.Errorf("the sequence did not grow: %v", err)
	}
	s = reopened(t, open, s, place)
	got, err = s.Bundle(t.Context())
	must(t, err)
	if got.Sequence != 1 || string(got.JSON) != string(first.JSON) {
		t.Errorf("stored %+v, read %+v", first, got)
	}
	must(t, s.SwapBundle(t.Context(), 1, ca.StoredBundle{Sequence: 9, JSON: []byte("x")}))
	got, err = s.Bundle(t.Context())
	must(t, err)
	if got.Sequence != 9 || string(got.JSON) != "x" {
		t.Errorf("read %+v", got)
	}
	must(t, s.Close())
}

// testBundleRace has many writers compare and swap: each sequence is won once.
func testBundleRace(t *testing.T, open Opener) {
	s := opened(t, open)
	const writers, wins = 8, 5
	var (
		wg  sync.WaitGroup
		won atomic.Int64
	)
	for w := range writers {
		wg.Go(func() {
			for won.Load() < writers*wins {
				have, err := s.Bundle(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				err = s.SwapBundle(t.Context(), have.Sequence, ca.StoredBundle{Sequence: have.Sequence + 1, JSON: fmt.Appendf(nil, "%d", w)})
				switch {
				case err == nil:
					won.Add(1)
				case !errors.Is(err, ca.ErrConflict):
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	got, err := s.Bundle(t.Context())
	must(t, err)
	if got.Sequence != uint64(won.Load()) {
		t.Errorf("%d swaps succeeded, the sequence is %d", won.Load(), got.Sequence)
	}
}
