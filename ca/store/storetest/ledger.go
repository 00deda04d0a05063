package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
)

// epoch is a moment with whole seconds: NotAfter has no finer ones.
var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func entry(i int, end time.Duration) ca.LedgerEntry {
	return ca.LedgerEntry{
		Serial:         bytes.Repeat([]byte{byte(i)}, 16),
		ID:             fmt.Sprintf("spiffe://example.org/ns/shop/sa/%d", i),
		Profile:        "workload",
		IssuedAt:       epoch.Add(time.Duration(i)*time.Second + 7*time.Nanosecond),
		NotAfter:       epoch.Add(end),
		AuthorityKeyID: bytes.Repeat([]byte{1}, 20),
		TBSDigest:      bytes.Repeat([]byte{byte(i), 2}, 16),
		Evidence:       fmt.Appendf(nil, `{"pod":"p-%d"}`, i),
	}
}

// fataler is what *testing.T and *rapid.T share.
type fataler interface {
	Helper()
	Fatal(args ...any)
}

func scan(t fataler, s Ledger) []ca.LedgerEntry {
	t.Helper()
	var all []ca.LedgerEntry
	err := s.ScanLedger(context.Background(), func(e ca.LedgerEntry) (bool, error) {
		all = append(all, e)
		return true, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func sameEntry(a, b ca.LedgerEntry) bool {
	return a.Index == b.Index && bytes.Equal(a.Serial, b.Serial) && a.ID == b.ID && a.Profile == b.Profile &&
		a.IssuedAt.Equal(b.IssuedAt) && a.NotAfter.Equal(b.NotAfter) && bytes.Equal(a.AuthorityKeyID, b.AuthorityKeyID) &&
		bytes.Equal(a.TBSDigest, b.TBSDigest) && bytes.Equal(a.Evidence, b.Evidence)
}

func testLedgerOrder(t *testing.T, open Opener) {
	place := t.TempDir()
	s := open(t, place)
	if got := scan(t, s); len(got) != 0 {
		t.Fatalf("a new ledger has %d entries", len(got))
	}
	var want []ca.LedgerEntry
	for _, size := range []int{1, 3, 1, 5, 0, 2} {
		var group []ca.LedgerEntry
		for range size {
			group = append(group, entry(len(want)+len(group), time.Hour))
		}
		must(t, s.AppendLedger(t.Context(), group))
		for _, e := range group {
			e.Index = uint64(len(want) + 1)
			want = append(want, e)
		}
		if size == 5 {
			s = reopened(t, open, s, place)
		}
	}
	got := scan(t, s)
	if len(got) != len(want) {
		t.Fatalf("%d entries, want %d", len(got), len(want))
	}
	for i := range got {
		if w := want[len(want)-1-i]; !sameEntry(got[i], w) {
			t.Errorf("entry %d from the new end: %+v, want %+v", i, got[i], w)
		}
	}
	if n, err := s.LedgerSize(t.Context()); err != nil || n != uint64(len(want)) {
		t.Errorf("size %d, %v", n, err)
	}
	must(t, s.Close())
}

// testLedgerPages scans more than a page, appends and stops in the middle of it.
func testLedgerPages(t *testing.T, open Opener) {
	s := opened(t, open)
	const groups = 300
	for i := range groups {
		must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{entry(2*i, time.Hour), entry(2*i+1, time.Hour)}))
	}
	want := uint64(2 * groups)
	err := s.ScanLedger(t.Context(), func(e ca.LedgerEntry) (bool, error) {
		if e.Index != want {
			return false, fmt.Errorf("index %d, want %d", e.Index, want)
		}
		want--
		// A scan that is under way does not see what comes, and holds nothing up.
		if e.Index%100 == 0 {
			return true, s.AppendLedger(t.Context(), []ca.LedgerEntry{entry(0, time.Hour)})
		}
		return true, nil
	})
	must(t, err)
	if want != 0 {
		t.Errorf("the scan ended at %d", want)
	}
	stop := errors.New("enough")
	if err := s.ScanLedger(t.Context(), func(ca.LedgerEntry) (bool, error) { return true, stop }); !errors.Is(err, stop) {
		t.Errorf("the error of fn came back as %v", err)
	}
	seen := 0
	must(t, s.ScanLedger(t.Context(), func(ca.LedgerEntry) (bool, error) { seen++; return seen < 10, nil }))
	if seen != 10 {
		t.Errorf("saw %d after it said stop at 10", seen)
	}
}

func testLedgerPruning(t *testing.T, open Opener) {
	place := t.TempDir()
	s := open(t, place)
	prune := func(after time.Duration, gone, left uint64) {
		t.Helper()
		n, err := s.PruneLedger(t.Context(), epoch.Add(after))
		must(t, err)
		size, err := s.LedgerSize(t.Context())
		must(t, err)
		all := scan(t, s)
		if n != gone || size != left || len(all) != int(left) {
			t.Fatalf("pruned %d, size %d, %d entries; want %d and %d", n, size, len(all), gone, left)
		}
		for i := 1; i < len(all); i++ {
			if all[i-1].Index != all[i].Index+1 {
				t.Fatalf("a gap between %d and %d", all[i-1].Index, all[i].Index)
			}
		}
	}
	prune(time.Hour, 0, 0)
	must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{entry(1, 1*time.Hour), entry(2, 3*time.Hour)}))
	must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{entry(3, 2*time.Hour)}))
	must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{entry(4, 6*time.Hour)}))
	must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{entry(5, 4*time.Hour)}))
	// The first group lasts until its last entry has ended; what has ended waits behind what has not.
	prune(2*time.Hour, 0, 5)
	prune(3*time.Hour, 0, 5)
	prune(3*time.Hour+time.Second, 3, 2)
	prune(5*time.Hour, 0, 2)
	s = reopened(t, open, s, place)
	prune(5*time.Hour+time.Second, 0, 2)
	prune(6*time.Hour+time.Second, 2, 0)
	must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{entry(6, 9*time.Hour)}))
	if all := scan(t, s); len(all) != 1 || all[0].Index != 6 {
		t.Errorf("indexes are given twice: %+v", all)
	}
	for i := range 600 {
		must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{entry(i, 8*time.Hour)}))
	}
	prune(10*time.Hour, 601, 0)
	must(t, s.Close())
}

func testLedgerConcurrency(t *testing.T, open Opener) {
	s := opened(t, open)
	const writers, groups = 4, 25
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for g := range groups {
				if err := s.AppendLedger(t.Context(), []ca.LedgerEntry{entry(w, time.Hour), entry(w+100, time.Duration(g)*time.Second)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	all := scan(t, s)
	if len(all) != 2*writers*groups {
		t.Fatalf("%d entries", len(all))
	}
	for i, e := range all {
		if e.Index != uint64(len(all)-i) {
			t.Fatalf("index %d at %d", e.Index, i)
		}
		// Groups stay whole and in their order.
		if e.Index%2 == 0 && all[i+1].ID != fmt.Sprintf("spiffe://example.org/ns/shop/sa/%d", int(e.Serial[0])-100) {
			t.Fatalf("%s stands before %s", all[i+1].ID, e.ID)
		}
	}
}

func testLedgerKeepsNoSlices(t *testing.T, open Opener) {
	s := opened(t, open)
	e := entry(1, time.Hour)
	group := []ca.LedgerEntry{e}
	must(t, s.AppendLedger(t.Context(), group))
	clear(e.Serial)
	clear(e.Evidence)
	clear(group)
	want := entry(1, time.Hour)
	want.Index = 1
	got := scan(t, s)
	if len(got) != 1 || !sameEntry(got[0], want) {
		t.Errorf("read %+v", got)
	}
	clear(got[0].Serial)
	if again := scan(t, s); !sameEntry(again[0], want) {
		t.Error("what a reader was given is the store's own")
	}
}
