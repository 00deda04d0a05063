package bolt

import (
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
)

// What a clock a year ahead has signed is found for as long as a verifier takes it, and holds up neither pruning nor the scans
// of what came behind it.
func TestWhatAClockFarAheadHasSignedHoldsUpNothing(t *testing.T) {
	const many = 300 // more than a transaction prunes
	path := filepath.Join(t.TempDir(), "meshca.db")
	s := opened(t, path)
	now := time.Unix(1<<31, 0)
	long, ahead := now.AddDate(0, 0, -60), now.AddDate(1, 0, 0)
	add := func(ends ...time.Time) {
		t.Helper()
		var group []ca.LedgerEntry
		for _, end := range ends {
			group = append(group, ca.LedgerEntry{Serial: []byte{1}, IssuedAt: end.Add(-time.Hour), NotAfter: end})
		}
		must(t, s.AppendLedger(t.Context(), group))
	}
	add(long)
	add(long, ahead) // 2 and 3
	for range many {
		add(long)
	}
	add(ahead.Add(time.Hour)) // 304
	for range many {
		add(long)
	}
	add(now.Add(time.Hour)) // 605
	must(t, s.young.fold())

	is := func(what string, at time.Time, size uint64, living ...uint64) {
		t.Helper()
		var found []uint64
		must(t, s.ScanLiving(t.Context(), at, func(e ca.LedgerEntry) (bool, error) { found = append(found, e.Index); return true, nil }))
		if !slices.Equal(found, living) {
			t.Errorf("%s: %d live, want %d", what, found, living)
		}
		n, err := s.LedgerSize(t.Context())
		must(t, err)
		if n != size {
			t.Errorf("%s: it has %d entries, want %d", what, n, size)
		}
	}
	prune := func(before time.Time, gone uint64) {
		t.Helper()
		n, err := s.PruneLedger(t.Context(), before)
		must(t, err)
		if n != gone {
			t.Errorf("pruned %d, want %d", n, gone)
		}
	}
	is("at first", now, 605, 605, 304, 3)
	must(t, s.NoteEnded(t.Context(), now))
	if f := s.ended.Load(); f.last != 604 || !slices.Equal(f.stragglers, []uint64{304, 2}) {
		t.Errorf("the floor is %+v", f)
	}
	prune(now.AddDate(0, 0, -30), 2*many+1)
	is("pruned", now, 4, 605, 304, 3)
	closed(t, s)
	s = opened(t, path)
	is("in the next process", now, 4, 605, 304, 3)
	prune(now.AddDate(0, 0, -30), 0)

	// They stay what they are when their own time comes.
	near := ahead.Add(-30 * time.Minute)
	add(near.Add(time.Hour)) // 606
	must(t, s.NoteEnded(t.Context(), near))
	prune(near.AddDate(0, 0, -30), 1)
	is("near their end", near, 4, 606, 304, 3)
	later := ahead.AddDate(0, 0, 31)
	must(t, s.NoteEnded(t.Context(), later))
	prune(later.AddDate(0, 0, -30), 4)
	is("a month behind it", later, 0)
	must(t, s.NoteEnded(t.Context(), later))
	if f := s.ended.Load(); len(f.stragglers) > 0 {
		t.Errorf("the floor is %+v", f)
	}
	closed(t, s)
}

// Where they are too many to be looked at one by one, they hold up the floor, and nothing is missed.
func TestStragglersAreBounded(t *testing.T) {
	now := time.Unix(1<<31, 0)
	ended := encodeGroup([]ca.LedgerEntry{{NotAfter: now.AddDate(0, 0, -60)}})
	ahead := encodeGroup([]ca.LedgerEntry{{NotAfter: now.AddDate(1, 0, 0)}})
	const many = maxStragglers + 10
	w := newWalk(now, &floor{})
	for i := uint64(2 * many); i > 0; i-- {
		value := ended
		if i%2 == 0 {
			value = ahead
		}
		if got, err := w.read(i, value, true); err != nil || (len(got) > 0) != (i%2 == 0) {
			t.Fatalf("of %d it reads %v, %v", i, got, err)
		}
	}
	if n := len(w.next.stragglers); n > maxStragglers || w.next.last != 2*(many-maxStragglers)-1 || n != many-maxStragglers-1 {
		t.Errorf("%d stragglers up to %d", n, w.next.last)
	}
}
