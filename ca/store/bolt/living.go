package bolt

import (
	"bytes"
	"context"
	"encoding/binary"
	"math"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/ca"
)

// The ledger's order is not that of clocks: what a machine signed while its clock was days behind stands above what lives. So
// who looks for that looks at all entries, but for those up to the floor, which are known to have ended. What a clock far
// ahead has signed lives for years, for verifiers too, and must not hold up the floor for as long: it is a straggler.

// floor says that all entries up to this index have ended at this moment, but for stragglers. It is so by what stands in
// them, whatever a clock says. It is not changed once it is made.
type floor struct {
	last uint64
	end  time.Time
	// stragglers are the groups up to last that are looked at all the same, by the indexes of their first entries, the
	// greatest first. Each stays one until it is pruned.
	stragglers []uint64
}

// keyFloorEnded holds, in the bucket meta, a floor: the index, the moment in Unix seconds, and the stragglers, all uint64,
// big-endian.
var keyFloorEnded = []byte("ledger ended")

const (
	// floorBehind is how much longer entries must have ended that come under the floor: it is of use also to who asks by a
	// clock that believes a step forward a day late (rotation.Clock), or was set back.
	floorBehind = 26 * time.Hour
	// headGroups bounds of how many groups one transaction reads when they end.
	headGroups = 1024
	// farAhead is how much later than by the clock of now a straggler ends: nothing lives so long that a clock has signed
	// which is right, or a day behind.
	farAhead = floorBehind + ca.MaxTTL
	// maxStragglers bounds what each scan looks at below the floor. What is beyond holds it up.
	maxStragglers = 4096
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
		last := min(f.last, tx.Bucket(bucketLedger).Sequence())
		v := binary.BigEndian.AppendUint64(nil, last)
		v = binary.BigEndian.AppendUint64(v, uint64(f.end.Unix()))
		for _, first := range f.stragglers {
			if first <= last {
				v = binary.BigEndian.AppendUint64(v, first)
			}
		}
		if bytes.Equal(meta.Get(keyFloorEnded), v) {
			return errUnchanged
		}
		return meta.Put(keyFloorEnded, v)
	})
}

// openFloor reads the floor; a store that has none begins at its first entry.
func (s *Store) openFloor() error {
	return s.db.View(func(tx *bbolt.Tx) error {
		s.ended.Store(readFloor(tx))
		return nil
	})
}

func readFloor(tx *bbolt.Tx) *floor {
	f := &floor{}
	v := tx.Bucket(bucketMeta).Get(keyFloorEnded)
	if len(v) < 16 || len(v)%8 != 0 {
		return f
	}
	f.last, f.end = binary.BigEndian.Uint64(v), time.Unix(int64(binary.BigEndian.Uint64(v[8:])), 0)
	for v = v[16:]; len(v) > 0; v = v[8:] {
		f.stragglers = append(f.stragglers, binary.BigEndian.Uint64(v))
	}
	return f
}

// walk is one way through the ledger, the newest group first.
type walk struct {
	at time.Time
	// above is the index at whose entry it ends, for a floor that counts at this moment.
	above uint64
	// known are the stragglers by now that it has not come to, the greatest first.
	known []uint64
	// next is the floor by what was seen.
	next floor
}

func newWalk(at time.Time, f *floor) *walk {
	w := &walk{at: at, known: f.stragglers, next: floor{last: math.MaxUint64}}
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
	known := w.comesTo(first)
	switch {
	case !known && !end.After(w.at.Add(-floorBehind)):
		if end.After(w.next.end) {
			w.next.end = end
		}
		return nil, nil
	case known || end.After(w.at.Add(farAhead)) && len(w.next.stragglers)+len(w.known) < maxStragglers:
		w.next.stragglers = append(w.next.stragglers, first)
	default:
		w.next.last, w.next.stragglers = first-1, nil
	}
	if !wanted || !end.After(w.at) {
		return nil, nil
	}
	return readGroup(first, value)
}

// comesTo reports whether the group with this first entry is a straggler already. Those above it, which it did not come to,
// were pruned.
func (w *walk) comesTo(first uint64) bool {
	for len(w.known) > 0 && w.known[0] > first {
		w.known = w.known[1:]
	}
	if len(w.known) == 0 || w.known[0] != first {
		return false
	}
	w.known = w.known[1:]
	return true
}

// walk goes on until fn says no. One that came to its end has found the floor. Without fn no entry is read.
func (s *Store) walk(ctx context.Context, w *walk, fn func(ca.LedgerEntry) (bool, error)) error {
	read := func(first uint64, value []byte) ([]ca.LedgerEntry, error) { return w.read(first, value, fn != nil) }
	newest, whole, err := s.scan(ctx, w.above, read, fn)
	if whole {
		whole, err = s.scanStragglers(ctx, w.known, read, fn)
	}
	if whole {
		w.next.last = min(w.next.last, newest)
		s.ended.Store(&w.next)
	}
	return err
}

// scanStragglers calls fn for each entry of stragglers that read reads, until it returns false or an error. whole is that it came
// to their end.
func (s *Store) scanStragglers(ctx context.Context, all []uint64, read groupReader, fn func(ca.LedgerEntry) (bool, error)) (whole bool, err error) {
	for some := range slices.Chunk(all, scanGroups) {
		var page []ca.LedgerEntry
		err := s.view(ctx, func(tx *bbolt.Tx) error {
			for _, first := range some {
				v := tx.Bucket(bucketLedger).Get(indexKey(first))
				if v == nil {
					continue // pruned
				}
				group, err := read(first, v)
				if err != nil {
					return err
				}
				page = append(group, page...)
			}
			return nil
		})
		if err != nil {
			return false, err
		}
		if more, err := each(page, fn); err != nil || !more {
			return false, err
		}
	}
	return true, nil
}
