package bolt

import (
	"bytes"
	"context"
	"encoding/binary"
	"math"
	"time"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/ca"
)

// The ledger's order is not that of clocks: what a machine signed while its clock was days behind stands above what lives. So
// who looks for that looks at all entries, but for those up to the floor, which are known to have ended.

// floor says that all entries up to this index have ended at this moment. It is so by what stands in them, whatever a clock says.
type floor struct {
	last uint64
	end  time.Time
}

// keyFloorEnded holds, in the bucket meta, a floor: the index and the moment in Unix seconds, both uint64, big-endian.
var keyFloorEnded = []byte("ledger ended")

const (
	// floorBehind is how much longer entries must have ended that come under the floor: it is of use also to who asks by a
	// clock that believes a step forward a day late (rotation.Clock), or was set back.
	floorBehind = 26 * time.Hour
	// headGroups bounds of how many groups one transaction reads when they end.
	headGroups = 1024
)

// ScanLiving calls fn for each entry that ends after a moment, newest first, until it returns false or an error, as ScanLedger
// does. Of the other ones above the floor it reads when their groups end.
func (s *Store) ScanLiving(ctx context.Context, at time.Time, fn func(ca.LedgerEntry) (bool, error)) error {
	return s.walk(ctx, newWalk(at, s.ended.Load()), func(e ca.LedgerEntry) (bool, error) {
		if !e.NotAfter.After(at) {
			return true, nil
		}
		return fn(e)
	})
}

// NoteEnded raises the floor to what has ended long ago, durably: the scans of the next process begin with it.
func (s *Store) NoteEnded(ctx context.Context, at time.Time) error {
	if err := s.walk(ctx, newWalk(at, s.ended.Load()), nil); err != nil {
		return err
	}
	return s.update(ctx, func(tx *bbolt.Tx) error {
		f, meta := s.ended.Load(), tx.Bucket(bucketMeta)
		// Entries that are in the log alone may be lost with it, and their indexes given out again.
		v := binary.BigEndian.AppendUint64(nil, min(f.last, tx.Bucket(bucketLedger).Sequence()))
		v = binary.BigEndian.AppendUint64(v, uint64(f.end.Unix()))
		if bytes.Equal(meta.Get(keyFloorEnded), v) {
			return errUnchanged
		}
		return meta.Put(keyFloorEnded, v)
	})
}

// openFloor reads the floor; a store that has none begins at its first entry.
func (s *Store) openFloor() error {
	f := &floor{}
	defer s.ended.Store(f)
	return s.db.View(func(tx *bbolt.Tx) error {
		if v := tx.Bucket(bucketMeta).Get(keyFloorEnded); len(v) == 16 {
			f.last, f.end = binary.BigEndian.Uint64(v), time.Unix(int64(binary.BigEndian.Uint64(v[8:])), 0)
		}
		return nil
	})
}

// walk is one way through the ledger, the newest group first.
type walk struct {
	at time.Time
	// above is the index at whose entry it ends, for a floor that counts at this moment.
	above uint64
	// next is the floor by what was seen.
	next floor
}

func newWalk(at time.Time, f *floor) *walk {
	w := &walk{at: at, next: floor{last: math.MaxUint64}}
	if !at.Before(f.end) {
		w.above, w.next.end = f.last, f.end
	}
	return w
}

// read reads a group in which something may live, if it is wanted; nil: nothing does.
func (w *walk) read(first uint64, value []byte, wanted bool) ([]ca.LedgerEntry, error) {
	end, err := groupEnd(value)
	if err != nil {
		return nil, err
	}
	switch {
	case end.After(w.at.Add(-floorBehind)):
		w.next.last = first - 1
		if !wanted || !end.After(w.at) {
			return nil, nil
		}
		return readGroup(first, value)
	case end.After(w.next.end):
		w.next.end = end
	}
	return nil, nil
}

// walk goes on until fn says no. One that came to its end has found the floor. Without fn no entry is read.
func (s *Store) walk(ctx context.Context, w *walk, fn func(ca.LedgerEntry) (bool, error)) error {
	read := func(first uint64, value []byte) ([]ca.LedgerEntry, error) { return w.read(first, value, fn != nil) }
	newest, whole, err := s.scan(ctx, w.above, read, fn)
	if whole {
		w.next.last = min(w.next.last, newest)
		s.ended.Store(&w.next)
	}
	return err
}
