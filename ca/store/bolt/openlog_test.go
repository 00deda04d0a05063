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
	return copied(t, strings.TrimSuffix(s.logPath, walSuffix))
}

func copied(t *testing.T, from string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "meshca.db")
	for _, suffix := range []string{"", walSuffix} {
		data, err := os.ReadFile(from + suffix)
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
	if young, last := s.young.unfolded(); len(young) != 2 || last != 3 {
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
	for name, tt := range map[string]struct {
		lose func(log string) error
		// left is what the ledger has of the log when the loss was accepted; kept says that what stood there is.
		left int
		kept bool
	}{
		"none":      {lose: os.Remove},
		"empty":     {lose: func(log string) error { return os.Truncate(log, 0) }, kept: true},
		"cut short": {lose: func(log string) error { return os.Truncate(log, walArea.file()-1) }, kept: true},
		"another": {lose: func(log string) error {
			f, err := createLog(log, walHead{id: walID{1}, base: 1})
			return errors.Join(err, f.Close())
		}, kept: true},
		"one of later": {lose: func(log string) error {
			f, err := os.OpenFile(log, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			head, _ := readHead(f)
			_, err = f.WriteAt(walHead{id: walID{1}, prev: head.id, base: 3}.block(), 0)
			return errors.Join(err, f.Close())
		}, kept: true},
		"the older area is damaged": {lose: func(log string) error { return flip(log, walArea.start(0)+walHeader) }, kept: true},
		"the newer area is damaged": {lose: func(log string) error { return flip(log, walArea.start(1)+walHeader) }, left: 3, kept: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
			must(t, s.AppendLedger(t.Context(), issued("folded")))
			must(t, s.young.fold())
			path := filled(t, s)
			closed(t, s)
			log := path + walSuffix
			must(t, tt.lose(log))
			stood, _ := os.ReadFile(log)
			_, err := Open(path)
			if !errors.Is(err, ErrLog) || !strings.Contains(err.Error(), "touch "+log+".lost") {
				t.Fatalf("got %v", err)
			}
			if v := schemaOf(t, path); v != schemaLogged {
				t.Errorf("it has schema %d now", v)
			}
			// As it says.
			must(t, os.WriteFile(log+".lost", nil, 0o600))
			s = opened(t, path)
			want := append([]string{"folded"}, slices.Repeat([]string{"big"}, tt.left)...)
			wantIDs(t, s, want...)
			if all := strings.Join(s.Notices(), "\n"); !strings.Contains(all, fmt.Sprintf("the ledger ends at entry %d", len(want))) {
				t.Errorf("it tells %q", all)
			}
			kept, err := filepath.Glob(log + ".replaced-*")
			must(t, err)
			if tt.kept != (len(kept) == 1) {
				t.Errorf("kept are %v", kept)
			} else if tt.kept {
				if have, err := os.ReadFile(kept[0]); err != nil || !bytes.Equal(have, stood) {
					t.Errorf("it is not kept as it stood: %v", err)
				}
			}
			must(t, s.AppendLedger(t.Context(), issued("next")))
			again := killed(t, s)
			closed(t, s)
			// It was said once.
			s = opened(t, again)
			wantIDs(t, s, append(want, "next")...)
			closed(t, s)
			if exists(log + ".lost") {
				t.Error("the word is there still")
			}
		})
	}
}

func flip(path string, at int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	b := make([]byte, 1)
	_, err = f.ReadAt(b, at)
	if err == nil {
		b[0] ^= 1
		_, err = f.WriteAt(b, at)
	}
	return errors.Join(err, f.Close())
}

// A store of one moment with the log of another is refused, wherever they are from.
func TestStoreAndLogOfOneMoment(t *testing.T) {
	s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	must(t, s.AppendLedger(t.Context(), issued("a")))
	must(t, s.young.fold())
	must(t, s.AppendLedger(t.Context(), issued("b")))
	first := killed(t, s)
	closed(t, s)
	moved := func(db, log string) error {
		path := filepath.Join(t.TempDir(), "meshca.db")
		for from, to := range map[string]string{db: path, log + walSuffix: path + walSuffix} {
			data, err := os.ReadFile(from)
			must(t, err)
			must(t, os.WriteFile(to, data, 0o600))
		}
		s, err := Open(path)
		if err == nil {
			t.Errorf("it opened with %v", ledgerIDs(t, s))
			closed(t, s)
		}
		return err
	}
	lives := make([]string, 2)
	for i := range lives { // two lives of one store
		path := copied(t, first)
		s := opened(t, path)
		same, begun := killed(t, s), killed(t, s)
		must(t, s.AppendLedger(t.Context(), issued("c")))
		lives[i] = killed(t, s)
		closed(t, s)
		s = opened(t, same) // a kill before anything was recorded
		wantIDs(t, s, "a", "b")
		closed(t, s)
		if err := moved(first, begun); !errors.Is(err, ErrLog) { // b was in the log that is not there any more
			t.Errorf("got %v", err)
		}
	}
	for _, tt := range [][2]string{{lives[0], lives[1]}, {lives[1], lives[0]}} {
		if err := moved(tt[0], tt[1]); !errors.Is(err, ErrLog) {
			t.Errorf("got %v", err)
		}
	}
}

// A kill between the log's coming into place and the store's knowing it.
func TestKilledAsALogBegins(t *testing.T) {
	s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	must(t, s.AppendLedger(t.Context(), issued("a")))
	must(t, s.young.fold())
	old := s.young.log
	s.young.update = func(func(*bbolt.Tx) error) error { return nil } // all is in the bucket
	db, err := os.ReadFile(s.db.Path())
	must(t, err)
	log, err := s.beginLog(1)
	must(t, err)
	must(t, errors.Join(old.file.Close(), log.file.Close()))
	path := killed(t, s)
	must(t, os.WriteFile(path, db, 0o600)) // as it was before it knew
	must(t, s.db.Close())
	s = opened(t, path)
	defer closed(t, s)
	wantIDs(t, s, "a")
	if all := s.Notices(); len(all) != 0 {
		t.Errorf("it tells %q", all)
	}
}

// Who puts other files in the place of an open store's finds them as he put them there.
func TestReplacedWhileInUse(t *testing.T) {
	other := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	must(t, other.AppendLedger(t.Context(), issued("other")))
	from := killed(t, other)
	closed(t, other)
	for name, end := range map[string]func(*Store) error{
		"close": (*Store).Close,
		"mend": func(s *Store) error {
			s.young.log.torn = true
			if err := s.AppendLedger(t.Context(), issued("b")); !errors.Is(err, errReplaced) {
				t.Errorf("got %v", err)
			}
			if err := s.Ready(); !errors.Is(err, errReplaced) {
				t.Errorf("ready: %v", err)
			}
			return s.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "meshca.db")
			s := opened(t, path)
			must(t, s.AppendLedger(t.Context(), issued("a")))
			must(t, errors.Join(os.Rename(path, path+".moved"), os.Rename(path+walSuffix, path+".moved.wal")))
			put := copied(t, from)
			must(t, errors.Join(os.Rename(put, path), os.Rename(put+walSuffix, path+walSuffix)))
			must(t, end(s))
			s = opened(t, path)
			wantIDs(t, s, "other")
			closed(t, s)
			s = opened(t, path+".moved")
			wantIDs(t, s, "a")
			closed(t, s)
		})
	}
}

// A log is of one process, also where the store beside it was replaced by a copy.
func TestLogIsLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meshca.db")
	s := opened(t, path)
	defer func() { must(t, s.db.Close()) }()
	data, err := os.ReadFile(path)
	must(t, err)
	must(t, os.Rename(path, path+".moved"))
	must(t, os.WriteFile(path, data, 0o600))
	if _, err := Open(path); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "fuser "+path+walSuffix) {
		t.Errorf("got %v", err)
	}
}

// filled is the store as a kill leaves it where three groups fill one area, and two are in the next.
func filled(t *testing.T, s *Store) string {
	t.Helper()
	s.young.folding.Lock() // what is folded meanwhile would not be in the log alone
	defer s.young.folding.Unlock()
	s.young.log.offset = 0 // as it is at a turn
	for range 5 {
		must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{{ID: "big", Evidence: make([]byte, int(walArea)/3-walBlock)}}))
	}
	return killed(t, s)
}

// A closed store is whole without a log, and leaves none. One that stands there is kept: it may be what is left of another.
func TestLogOfAnother(t *testing.T) {
	other := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	must(t, other.AppendLedger(t.Context(), issued("other")))
	log, err := os.ReadFile(other.logPath)
	must(t, err)
	defer closed(t, other)

	path := filepath.Join(t.TempDir(), "meshca.db")
	for i, want := range [][]string{{"own"}, {"own"}, {"own"}} { // the first time the store has no ID yet
		must(t, os.WriteFile(path+walSuffix, log, 0o600))
		s := opened(t, path)
		if i == 0 {
			must(t, s.AppendLedger(t.Context(), issued("own")))
		}
		wantIDs(t, s, want...)
		if len(s.Notices()) != 1 || !strings.Contains(s.Notices()[0], path+walSuffix+".replaced-") {
			t.Errorf("it tells %q", s.Notices())
		}
		closed(t, s)
		if exists(path + walSuffix) {
			t.Error("a log is beside a store that was closed")
		}
	}
	kept, err := filepath.Glob(path + walSuffix + ".replaced-*")
	must(t, err)
	if len(kept) != 3 { // within a second, too
		t.Fatalf("kept are %v", kept)
	}
	for _, k := range kept {
		if have, err := os.ReadFile(k); err != nil || !bytes.Equal(have, log) {
			t.Errorf("%s was not kept as it was: %v", k, err)
		}
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
	must(t, os.WriteFile(later, old, 0o600)) // which was closed
	s = opened(t, later)
	defer closed(t, s)
	wantIDs(t, s, "a")
	if kept, err := filepath.Glob(later + walSuffix + ".replaced-*"); err != nil || len(kept) != 1 {
		t.Errorf("kept are %v, %v", kept, err)
	}
}

func TestLogMode(t *testing.T) {
	s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	defer closed(t, s)
	info, err := os.Stat(s.logPath)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	path := killed(t, s)
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
			if young, _ := s.young.unfolded(); len(young) != 2 {
				t.Errorf("%d groups wait", len(young))
			}
			time.Sleep(foldAfter/2 + time.Millisecond)
			synctest.Wait()
			if young, _ := s.young.unfolded(); len(young) != 0 {
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

func (f *failing) WriteDurably(p []byte, at int64) error {
	if f.fail {
		return errDisk
	}
	return f.walFile.WriteDurably(p, at)
}

// Stopping twice, at once or not, stops once.
func TestClosedTwice(t *testing.T) {
	for range 20 {
		path := filepath.Join(t.TempDir(), "meshca.db")
		s := opened(t, path)
		must(t, s.AppendLedger(t.Context(), issued("a")))
		other := make(chan error, 1)
		go func() { other <- s.Close() }()
		must(t, s.Close())
		must(t, <-other)
		if v := schemaOf(t, path); v != schemaWhole {
			t.Fatalf("schema %d", v)
		}
	}
}

// While the log cannot be written nothing is acknowledged, readiness says so, and afterwards nothing is missing.
func TestLogFails(t *testing.T) {
	s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	must(t, s.AppendLedger(t.Context(), issued("a")))
	f := &failing{walFile: s.young.log.file, fail: true}
	s.young.log.file = f
	renew := s.young.renew
	s.young.renew = func(base uint64) (*wal, error) {
		if f.fail {
			return nil, errDisk
		}
		return renew(base)
	}
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

// Restores within one second put what stood aside under names of their own.
func TestRestoredTwiceInASecond(t *testing.T) {
	s, _ := decided(t)
	old := backup(t, s)
	want := append(ledgerIDs(t, s), "since")
	must(t, s.AppendLedger(t.Context(), issued("since")))
	path := killed(t, s)
	closed(t, s)
	var asides []string
	for range 3 {
		r, err := restore(t, old, path, replacing)
		must(t, err)
		if slices.Contains(asides, r.Aside) {
			t.Errorf("%s twice", r.Aside)
		}
		asides = append(asides, r.Aside)
	}
	aside := opened(t, asides[0])
	defer closed(t, aside)
	wantIDs(t, aside, want...)
}

// A log of an earlier moment of the same run, as where a directory that is in use is copied file by file.
func TestLogOfAnEarlierMoment(t *testing.T) {
	s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	must(t, s.AppendLedger(t.Context(), issued("a")))
	earlier, err := os.ReadFile(s.logPath)
	must(t, err)
	must(t, s.AppendLedger(t.Context(), issued("b")))
	must(t, s.young.fold())
	must(t, s.AppendLedger(t.Context(), issued("c")))
	path := killed(t, s)
	closed(t, s)
	must(t, os.WriteFile(path+walSuffix, earlier, 0o600))
	if s, err := Open(path); !errors.Is(err, ErrLog) || !strings.Contains(err.Error(), "ends with entry 1: the store has entry 2") {
		t.Fatalf("it opens (%v): %v", s, err)
	}
}

// A group that no area holds goes by the log. Killed before the next log begins, the store is whole with the one it had.
func TestKilledBehindAGroupThatWentByTheLog(t *testing.T) {
	s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	must(t, s.AppendLedger(t.Context(), issued("a")))
	must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{{ID: "large", Evidence: make([]byte, walArea)}}))
	path := killed(t, s)
	closed(t, s)
	again := opened(t, path)
	wantIDs(t, again, "a", "large")
	closed(t, again)
}

// A store that has had no log yet takes none for its own: the first log of another has no predecessor either.
func TestFirstLogOfAnother(t *testing.T) {
	s, _ := decided(t)
	old := backup(t, s)
	other := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	for range ledgerIDs(t, s) {
		must(t, other.AppendLedger(t.Context(), issued("in the log alone")))
	}
	closed(t, s)
	path := killed(t, other)
	closed(t, other)
	must(t, os.Rename(path, path+".moved"))
	_, err := restore(t, old, path)
	must(t, err)
	restored := opened(t, path)
	kept, err := filepath.Glob(path + walSuffix + ".replaced-*")
	must(t, err)
	if len(kept) != 1 || len(restored.Notices()) != 1 {
		t.Errorf("the other's log: kept %q, told %q", kept, restored.Notices())
	}
	closed(t, restored)
}

// The log cannot be written. That what it had is folded changes nothing about it.
func TestNotReadyWhileTheLogIsTorn(t *testing.T) {
	s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	must(t, s.AppendLedger(t.Context(), issued("a")))
	s.young.log.file = &failing{walFile: s.young.log.file, fail: true}
	if err := s.AppendLedger(t.Context(), issued("refused")); err == nil {
		t.Fatal("it was taken")
	}
	must(t, s.young.fold())
	if s.Ready() == nil {
		t.Error("ready, and the log is torn")
	}
	must(t, s.AppendLedger(t.Context(), issued("b")))
	if err := s.Ready(); err != nil {
		t.Errorf("with a new log: %v", err)
	}
	wantIDs(t, s, "a", "b")
	closed(t, s)
}

// A store that was closed has all. Its own log is left where the process died then, with a record that was refused.
func TestOwnLogOfAClosedStore(t *testing.T) {
	s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	must(t, s.AppendLedger(t.Context(), issued("a")))
	file := s.young.log.file
	s.young.log.file = &written{walFile: file}
	if err := s.AppendLedger(t.Context(), issued("refused")); err == nil {
		t.Fatal("it was taken")
	}
	log, err := os.ReadFile(s.logPath)
	must(t, err)
	path := s.db.Path()
	closed(t, s)
	must(t, os.WriteFile(path+walSuffix, log, 0o600))
	s = opened(t, path)
	wantIDs(t, s, "a")
	if all := s.Notices(); len(all) != 0 {
		t.Errorf("it tells %q", all)
	}
	closed(t, s)
}

// written is a file that fails once it has written.
type written struct{ walFile }

func (w *written) WriteDurably(p []byte, at int64) error {
	return errors.Join(w.walFile.WriteDurably(p, at), errDisk)
}
