package bolt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
)

// killed copies a store as a process that is killed now leaves it.
func killed(t *testing.T, s *Store) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "meshca.db")
	for _, suffix := range []string{"", walSuffix} {
		data, err := os.ReadFile(s.db.Path() + suffix)
		must(t, err)
		must(t, os.WriteFile(path+suffix, data, 0o600))
	}
	return path
}

func schemaOf(t *testing.T, path string) uint32 {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	must(t, err)
	defer db.Close()
	var v uint32
	must(t, db.View(func(tx *bbolt.Tx) (err error) {
		v, err = readSchema(tx.Bucket(bucketMeta).Get(keySchema), path)
		return err
	}))
	return v
}

func issued(id string) []ca.LedgerEntry { return []ca.LedgerEntry{{ID: id}} }

// ledgerIDs are those of the ledger's entries, oldest first; each has the index of its place.
func ledgerIDs(t *testing.T, s *Store) (ids []string) {
	t.Helper()
	var next uint64
	must(t, s.ScanLedger(t.Context(), func(e ca.LedgerEntry) (bool, error) {
		if next != 0 && e.Index != next-1 {
			t.Errorf("entry %d comes behind %d", e.Index, next)
		}
		next = e.Index
		ids = append(ids, e.ID)
		return true, nil
	}))
	slices.Reverse(ids)
	if n, err := s.LedgerSize(t.Context()); err != nil || n != uint64(len(ids)) {
		t.Errorf("the ledger has %d entries, %v; %d were read", n, err, len(ids))
	}
	return ids
}

func wantIDs(t *testing.T, s *Store, want ...string) {
	t.Helper()
	if have := ledgerIDs(t, s); !slices.Equal(have, want) {
		t.Errorf("the ledger has %v, want %v", have, want)
	}
}

// What is in the log alone is there after a kill, and only a build that knows logs goes on with such a store.
func TestKilled(t *testing.T) {
	first := filepath.Join(t.TempDir(), "meshca.db")
	s := opened(t, first)
	must(t, s.AppendLedger(t.Context(), issued("a")))
	must(t, s.young.fold())
	must(t, s.AppendLedger(t.Context(), issued("b")))
	must(t, s.AppendLedger(t.Context(), issued("c")))
	if young, last := s.young.young(); len(young) != 2 || last != 3 {
		t.Fatalf("%d groups are in the log alone, up to %d: this proves nothing", len(young), last)
	}
	wantIDs(t, s, "a", "b", "c")
	path := killed(t, s)
	if v := schemaOf(t, path); v != schemaLogged {
		t.Errorf("a store in use has schema %d", v)
	}
	closed(t, s)
	if v := schemaOf(t, first); v != schemaWhole {
		t.Errorf("a store that was closed has schema %d", v)
	}
	for range 2 {
		s = opened(t, path)
		wantIDs(t, s, "a", "b", "c")
		path = killed(t, s)
		closed(t, s)
	}
	s = opened(t, path)
	must(t, s.AppendLedger(t.Context(), issued("d")))
	again := killed(t, s)
	closed(t, s)
	s = opened(t, again)
	wantIDs(t, s, "a", "b", "c", "d")
	closed(t, s)
}

// A store that was not closed does not begin without its log: somebody was told that what it holds is recorded.
func TestLogIsMissing(t *testing.T) {
	for name, lose := range map[string]func(log string) error{
		"none":      os.Remove,
		"cut short": func(log string) error { return os.Truncate(log, walArea.file()-1) },
		"another": func(log string) error {
			return errors.Join(os.Remove(log), createLog(log, walID{1}))
		},
		"damaged": func(log string) error {
			f, err := os.OpenFile(log, os.O_RDWR, 0)
			if err == nil {
				_, err = f.WriteAt([]byte{0xff}, walBlock+walHeader)
			}
			return errors.Join(err, f.Close())
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
			must(t, s.AppendLedger(t.Context(), issued("folded")))
			must(t, s.young.fold())
			filled(t, s, 3) // both areas have something that is not folded
			path := killed(t, s)
			closed(t, s)
			must(t, lose(path+walSuffix))
			_, err := Open(path)
			if !errors.Is(err, ErrLog) || !strings.Contains(err.Error(), "make an empty file of that name") || !strings.Contains(err.Error(), path+walSuffix) {
				t.Fatalf("got %v", err)
			}
			if v := schemaOf(t, path); v != schemaLogged {
				t.Errorf("it has schema %d now", v)
			}
			// As it says.
			must(t, os.WriteFile(path+walSuffix, nil, 0o600))
			s = opened(t, path)
			wantIDs(t, s, "folded")
			must(t, s.AppendLedger(t.Context(), issued("next")))
			wantIDs(t, s, "folded", "next")
			closed(t, s)
		})
	}
}

// filled appends until the log has changed areas, with groups of which n fill one.
func filled(t *testing.T, s *Store, n int) {
	t.Helper()
	s.young.folding.Lock() // what is folded meanwhile would not be in the log alone
	defer s.young.folding.Unlock()
	for area := s.young.log.area; s.young.log.area == area; {
		must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{{ID: "big", Evidence: make([]byte, int(walArea)/n-walBlock)}}))
	}
}

// A closed store is whole without its log. One that stands there is kept: it may be what is left of another store.
func TestLogOfAnother(t *testing.T) {
	other := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	must(t, other.AppendLedger(t.Context(), issued("other")))
	log, err := os.ReadFile(other.db.Path() + walSuffix)
	must(t, err)
	defer closed(t, other)

	path := filepath.Join(t.TempDir(), "meshca.db")
	for _, known := range []bool{false, true} { // whether the store has had a log before
		must(t, os.WriteFile(path+walSuffix, log, 0o600))
		s := opened(t, path)
		if known {
			wantIDs(t, s, "own")
		} else {
			must(t, s.AppendLedger(t.Context(), issued("own")))
		}
		closed(t, s)
		kept, err := filepath.Glob(path + walSuffix + ".replaced-*")
		must(t, err)
		if len(kept) != 1 {
			t.Fatalf("kept are %v", kept)
		}
		if have, err := os.ReadFile(kept[0]); err != nil || !bytes.Equal(have, log) {
			t.Errorf("it was not kept as it was: %v", err)
		}
		must(t, os.Remove(kept[0]))
	}
}

// An older copy of the file was put back while the store was not in use, without its log: what the log has beyond is kept.
func TestOlderFileNewerLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meshca.db")
	s := opened(t, path)
	must(t, s.AppendLedger(t.Context(), issued("a")))
	closed(t, s)
	old, err := os.ReadFile(path)
	must(t, err)
	s = opened(t, path)
	must(t, s.AppendLedger(t.Context(), issued("b")))
	later := killed(t, s)
	closed(t, s)
	must(t, os.WriteFile(later, old, 0o600))
	s = opened(t, later)
	defer closed(t, s)
	wantIDs(t, s, "a")
	if kept, err := filepath.Glob(later + walSuffix + ".replaced-*"); err != nil || len(kept) != 1 {
		t.Errorf("kept are %v, %v", kept, err)
	}
}

func TestLogMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meshca.db")
	closed(t, opened(t, path))
	info, err := os.Stat(path + walSuffix)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	must(t, os.Chmod(path+walSuffix, 0o640))
	if _, err := Open(path); err == nil || !strings.Contains(err.Error(), "chmod 600 "+path+walSuffix) {
		t.Errorf("got %v", err)
	}
}

// A group is not in the log alone for long.
func TestFoldedInTime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meshca.db")
	synctest.Test(t, func(t *testing.T) {
		s := opened(t, path)
		defer closed(t, s)
		for _, id := range []string{"a", "b"} {
			must(t, s.AppendLedger(t.Context(), issued(id)))
			time.Sleep(foldAfter / 2)
			must(t, s.AppendLedger(t.Context(), issued(id)))
			if young, _ := s.young.young(); len(young) != 2 {
				t.Errorf("%d groups wait", len(young))
			}
			time.Sleep(foldAfter/2 + time.Millisecond)
			synctest.Wait()
			if young, _ := s.young.young(); len(young) != 0 {
				t.Errorf("%d groups wait after %s", len(young), foldAfter)
			}
		}
	})
}

// More than the log holds, under readers and a pruner that come all the time.
func TestLogGoesRound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meshca.db")
	s := opened(t, path)
	ctx, stop := context.WithCancel(t.Context())
	read := make(chan int, 1)
	go func() {
		n := 0
		for ; ctx.Err() == nil; n++ {
			readGrowing(t, s)
		}
		read <- n
	}()
	var want []string
	ended := time.Now().Add(-time.Hour)
	must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{{ID: "ended", NotAfter: ended.Add(-time.Hour)}}))
	for i := range 60 {
		id := fmt.Sprintf("id %d", i)
		size := int(walArea) / 7
		if i%10 == 9 {
			size = int(walArea) + 1 // more than an area holds
		}
		must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{{ID: id, Evidence: make([]byte, size), NotAfter: time.Now()}}))
		want = append(want, id)
		if i == 5 {
			if n, err := s.PruneLedger(t.Context(), ended); err != nil || n != 1 {
				t.Errorf("pruned %d, %v", n, err)
			}
		}
	}
	wantIDs(t, s, want...)
	after := killed(t, s)
	stop()
	if n := <-read; n == 0 {
		t.Error("nobody has read")
	}
	closed(t, s)
	for _, path := range []string{path, after} {
		s = opened(t, path)
		wantIDs(t, s, want...)
		closed(t, s)
	}
}

// readGrowing reads a ledger that grows: it has no gaps.
func readGrowing(t *testing.T, s *Store) {
	var next uint64
	err := s.ScanLedger(context.WithoutCancel(t.Context()), func(e ca.LedgerEntry) (bool, error) {
		if next != 0 && e.Index != next-1 {
			return false, fmt.Errorf("entry %d comes behind %d", e.Index, next)
		}
		next = e.Index
		return true, nil
	})
	if err == nil && next > 2 {
		err = fmt.Errorf("the oldest is %d", next)
	}
	if err != nil {
		t.Error(err)
	}
}

// failing is a log's file that fails as long as it is told to.
type failing struct {
	walFile
	fail bool
}

func (f *failing) Sync() error {
	if f.fail {
		return errDisk
	}
	return f.walFile.Sync()
}

// While the log cannot be written nothing is acknowledged, readiness says so, and afterwards nothing is missing.
func TestLogFails(t *testing.T) {
	s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	must(t, s.AppendLedger(t.Context(), issued("a")))
	f := &failing{walFile: s.young.log.file}
	s.young.log.file = f
	f.fail = true
	for range 3 {
		if err := s.AppendLedger(t.Context(), issued("lost")); refusal.Of(err) != refusal.StoreUnavailable || !errors.Is(err, errDisk) {
			t.Errorf("got %v", err)
		}
		if err := s.Probe(t.Context()); refusal.Of(err) != refusal.StoreUnavailable {
			t.Errorf("a probe of a log that fails: %v", err)
		}
		wantIDs(t, s, "a")
	}
	f.fail = false
	must(t, s.Probe(t.Context()))
	must(t, s.AppendLedger(t.Context(), issued("b")))
	wantIDs(t, s, "a", "b")
	path := killed(t, s)
	closed(t, s)
	s = opened(t, path)
	defer closed(t, s)
	wantIDs(t, s, "a", "b")
}

// Where a commit of bbolt's fails at its end, what it wrote is there all the same. It comes once, and nothing comes in its place.
func TestCommitFailsAtItsEnd(t *testing.T) {
	s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	defer closed(t, s)
	must(t, s.AppendLedger(t.Context(), issued("a")))
	young, _ := s.young.young()
	must(t, s.young.store(young)) // a fold, whose caller hears of an error
	s.young.failed = true
	must(t, s.AppendLedger(t.Context(), issued("b")))
	must(t, s.young.fold())
	wantIDs(t, s, "a", "b")
	// A group that goes by the log.
	s.young.log.torn = true
	must(t, s.young.store([]group{{3, 3, encodeGroup(issued("refused"))}}))
	must(t, s.AppendLedger(t.Context(), issued("c")))
	must(t, s.young.fold())
	wantIDs(t, s, "a", "b", "refused", "c")
}

// A store that was not closed is put aside with its log, and is whole there.
func TestRestoreOverAKilledStore(t *testing.T) {
	s, _ := decided(t)
	old := backup(t, s)
	before := ledgerIDs(t, s)
	must(t, s.AppendLedger(t.Context(), issued("since")))
	path := killed(t, s)
	closed(t, s)
	r, err := restore(t, old, path, replacing)
	must(t, err)
	s = opened(t, path)
	wantIDs(t, s, before...)
	must(t, s.AppendLedger(t.Context(), issued("after")))
	closed(t, s)
	aside := opened(t, r.Aside)
	defer closed(t, aside)
	wantIDs(t, aside, append(before, "since")...)
	if left, err := filepath.Glob(path + "*.replaced-*"); err != nil || len(left) != 2 {
		t.Errorf("put aside are %v, %v", left, err)
	}
}
