package bolt

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/ca"
)

// What has ended long ago is not read again, in this process and in the next one. Who asks for a moment at which it had not
// ended reads it all the same.
func TestWhatHasEndedIsNotReadAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meshca.db")
	s := opened(t, path)
	now := time.Unix(1<<31, 0)
	long, late := now.Add(-2*floorBehind), now.Add(-time.Hour)
	for _, end := range []time.Time{long, long.Add(time.Hour), now.Add(time.Hour), long, late} {
		must(t, s.AppendLedger(t.Context(), []ca.LedgerEntry{{Serial: []byte{1}, IssuedAt: end.Add(-time.Hour), NotAfter: end}}))
	}
	living := func(at time.Time) (found []uint64, err error) {
		err = s.ScanLiving(t.Context(), at, func(e ca.LedgerEntry) (bool, error) { found = append(found, e.Index); return true, nil })
		return found, err
	}
	spoil := func(index uint64, value []byte) {
		must(t, s.young.fold())
		must(t, s.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketLedger).Put(indexKey(index), value) }))
	}
	must(t, s.young.fold())
	must(t, s.NoteEnded(t.Context(), now))
	spoil(2, []byte{9})
	for range 2 {
		if found, err := living(now); err != nil || len(found) != 1 || found[0] != 3 {
			t.Errorf("now %d live: %v", found, err)
		}
		if _, err := living(long); !errors.Is(err, errGroup) {
			t.Errorf("what lived then was not read: %v", err)
		}
		closed(t, s)
		s = opened(t, path)
	}
	spoil(4, []byte{9}) // above the one that lives
	if _, err := living(now); !errors.Is(err, errGroup) {
		t.Errorf("what may live was not read: %v", err)
	}
	closed(t, s)
}
