package bolt

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/ca"
)

// metaDisk is what a disk has of a database's meta pages: those that were synced.
type metaDisk struct {
	dataFile
	has  []byte
	fail error
}

func (d *metaDisk) WriteDurably(p []byte, at int64) error {
	if d.fail != nil {
		return d.fail
	}
	copy(d.has[at:], p)
	return d.dataFile.WriteDurably(p, at)
}

func (d *metaDisk) sync(t *testing.T) {
	t.Helper()
	_, err := d.ReadAt(d.has, 0)
	must(t, err)
}

// besideItsFile opens a store, and its file once more.
func besideItsFile(t *testing.T) (*Store, dataFile) {
	t.Helper()
	s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	f, err := os.OpenFile(s.db.Path(), os.O_RDWR, 0)
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return s, dataFile{f}
}

// A commit fails in the sync of its meta page, which the disk never has. The store goes on, and power fails as the next commit
// has written its pages, and its meta page not yet.
func TestPowerFailsBehindACommitThatFailed(t *testing.T) {
	s, file := besideItsFile(t)
	meta := &metaDisk{dataFile: file, has: make([]byte, 2*s.db.Info().PageSize)}
	s.writes.file = meta
	var ids []string
	issue := func(id string) {
		ids = append(ids, id)
		must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{{ID: id, Evidence: make([]byte, 700)}}))
	}
	for i := range 300 {
		issue(fmt.Sprint(i))
		if i%20 == 19 {
			must(t, s.young.fold())
			must(t, s.PutDenial(t.Context(), ca.Denial{ID: fmt.Sprint("spiffe://example.org/", i)}))
		}
	}
	must(t, s.young.fold())
	meta.sync(t)

	broken := errors.New("input/output error")
	s.writes.commit = func(fn func(*bbolt.Tx) error) error { return errors.Join(s.db.Update(fn), broken) }
	issue("as a commit fails")
	if err := s.young.fold(); !errors.Is(err, broken) {
		t.Fatalf("fold: %v", err)
	}
	// Where the disk takes nothing, nothing is committed.
	meta.fail = broken
	s.writes.commit = func(func(*bbolt.Tx) error) error { t.Error("a commit, before the state is durable"); return broken }
	if err := s.young.fold(); !errors.Is(err, broken) {
		t.Fatalf("fold: %v", err)
	}
	// Nor while somebody reads what bbolt has forgotten.
	meta.fail = nil
	reader, err := s.db.Begin(false)
	must(t, err)
	if err := s.PutDenial(t.Context(), ca.Denial{ID: "spiffe://example.org/a"}); !errors.Is(err, errStillRead) {
		t.Errorf("while it is read: %v", err)
	}
	must(t, reader.Rollback())
	if err := s.Ready(); err == nil {
		t.Error("ready, and nothing can be written")
	}

	s.writes.commit = s.db.Update
	issue("next")
	durable := slices.Clone(meta.has)
	must(t, s.young.fold())
	must(t, s.Ready())
	crash := killed(t, s)
	closed(t, s)
	c, err := os.OpenFile(crash, os.O_RDWR, 0)
	must(t, err)
	_, err = c.WriteAt(durable, 0)
	must(t, errors.Join(err, c.Close()))
	again := opened(t, crash)
	wantIDs(t, again, ids...)
	closed(t, again)
}

// The system drops the page that could not be written, and reads what the disk has. bbolt's memory goes on from what was dropped.
func TestPageOfAFailedCommitIsDropped(t *testing.T) {
	s, file := besideItsFile(t)
	before := make([]byte, 2*s.db.Info().PageSize)
	_, err := file.ReadAt(before, 0)
	must(t, err)
	broken := errors.New("input/output error")
	s.writes.commit = func(fn func(*bbolt.Tx) error) error { return errors.Join(s.db.Update(fn), broken) }
	denial := ca.Denial{ID: "spiffe://example.org/a"}
	if err := s.PutDenial(t.Context(), denial); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	// What has failed is said at once, also where nobody issues.
	if err := s.Ready(); !errors.Is(err, broken) {
		t.Errorf("ready: %v", err)
	}
	_, err = file.WriteAt(before, 0)
	must(t, err)
	s.writes.commit = func(func(*bbolt.Tx) error) error { t.Error("a commit"); return broken }
	for range 2 {
		if err := s.PutDenial(t.Context(), denial); !errors.Is(err, errForgotten) {
			t.Errorf("it goes on: %v", err)
		}
	}
	again := opened(t, killed(t, s))
	must(t, again.PutDenial(t.Context(), denial))
	closed(t, again)
}

// The process that had the commit fail may end before it could make the state durable.
func TestStartMakesDurableWhatItShows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meshca.db")
	closed(t, opened(t, path))
	db, err := bbolt.Open(path, 0o600, nil)
	must(t, err)
	defer db.Close()
	var order []string
	c := newCommitter(db, dataFile{})
	c.file = &recorded{order: &order}
	c.commit = func(fn func(*bbolt.Tx) error) error { order = append(order, "commit"); return db.Update(fn) }
	for range 2 {
		must(t, c.update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketMeta).Put(keyProbe, nil) }))
	}
	if want := []string{"read", "sync", "commit", "commit"}; !slices.Equal(order, want) {
		t.Errorf("%v, want %v", order, want)
	}
	// Of what is rolled back nothing is written.
	if err := c.update(func(*bbolt.Tx) error { return errUnchanged }); !errors.Is(err, errUnchanged) || !c.sure {
		t.Errorf("%v, sure %v", err, c.sure)
	}
}

type recorded struct{ order *[]string }

func (r *recorded) ReadAt(p []byte, _ int64) (int, error) {
	*r.order = append(*r.order, "read")
	return len(p), nil
}

func (r *recorded) WriteDurably([]byte, int64) error {
	*r.order = append(*r.order, "sync")
	return nil
}

// bbolt panics where a file is damaged: the CA says so, and what to do.
func TestDamagedStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meshca.db")
	s := opened(t, path)
	for i := range 50 {
		must(t, s.PutDenial(t.Context(), ca.Denial{ID: fmt.Sprint("spiffe://example.org/", i)}))
	}
	page := s.db.Info().PageSize
	closed(t, s)
	whole, err := os.ReadFile(path)
	must(t, err)
	said := 0
	for at := 2 * page; at < len(whole); at += page { // each but the metas' is overwritten by another
		broken := slices.Clone(whole)
		copy(broken[at:at+page], make([]byte, page))
		copy(broken[at:], "damage damage damage damage damage damage")
		must(t, os.WriteFile(path, broken, 0o600))
		s, err := Open(path)
		if err == nil { // a page that is free
			closed(t, s)
			continue
		}
		if !strings.Contains(err.Error(), path) || errors.Is(err, errDamaged) && !strings.Contains(err.Error(), "meshca restore") {
			t.Errorf("page %d: %v", at/page, err)
		}
		said++
	}
	for _, size := range []int{1, 100, page, 2 * page, 3 * page} {
		must(t, os.WriteFile(path, whole[:size], 0o600))
		if s, err := Open(path); err == nil || !strings.Contains(err.Error(), "meshca restore") {
			t.Errorf("cut to %d bytes: %v, %v", size, s, err)
		}
	}
	if said == 0 {
		t.Error("every damaged store opens")
	}
}
