package bolt

import (
	"context"
	"encoding/binary"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/ca"
)

const (
	// scanGroups and pruneGroups bound what one transaction of a scan or of a pruning touches: a reader that stays open
	// keeps old pages from being used again, a writer that stays open holds up issuance.
	scanGroups  = 64
	pruneGroups = 256
)

// AppendLedger makes a group durable, all of it or nothing: in the log, from where it goes into the bucket as one value.
func (s *Store) AppendLedger(ctx context.Context, group []ca.LedgerEntry) error {
	if len(group) == 0 {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return unavailable(s.young.append(encodeGroup(group), len(group)))
}

// ScanLedger calls fn for each entry, newest first, until it returns false or an error. No transaction is open while fn
// runs, so a slow fn holds up nothing; entries that come after the scan began are not seen.
func (s *Store) ScanLedger(ctx context.Context, fn func(ca.LedgerEntry) (bool, error)) error {
	_, _, err := s.scan(ctx, 0, readGroup, fn)
	return err
}

// scan calls fn for each entry of the groups that read reads, newest first, until it returns false or an error. It ends at the
// group of the index above, which it leaves out. newest is the index of the ledger's last entry as it began, and whole, that it
// came to its end.
func (s *Store) scan(ctx context.Context, above uint64, read groupReader, fn func(ca.LedgerEntry) (bool, error)) (newest uint64, whole bool, err error) {
	groups, newest := s.young.unfolded()
	last := newest
	for _, g := range slices.Backward(groups) {
		page, err := read(g.first, g.value)
		if err != nil {
			return newest, false, unavailable(err)
		}
		if more, err := each(page, fn); err != nil || !more {
			return newest, false, err
		}
		last = g.first - 1
	}
	for before := indexKey(last + 1); before != nil; { // the key that the last page ended at
		page, next, err := s.ledgerPage(ctx, before, above, read)
		if err != nil {
			return newest, false, err
		}
		if more, err := each(page, fn); err != nil || !more {
			return newest, false, err
		}
		before = next
	}
	return newest, true, nil
}

// groupReader reads a group by the index of its first entry; nil: none of its entries are wanted.
type groupReader func(first uint64, value []byte) ([]ca.LedgerEntry, error)

// each calls fn for each entry, the last one first.
func each(page []ca.LedgerEntry, fn func(ca.LedgerEntry) (bool, error)) (more bool, err error) {
	for _, e := range slices.Backward(page) {
		if more, err := fn(e); err != nil || !more {
			return false, err
		}
	}
	return true, nil
}

// ledgerPage looks at groups below the key before, oldest entry first, down to the index above, and returns the key to go on
// from: nil where none is left. It looks at headGroups of them at most, and at no more when scanGroups are wanted.
func (s *Store) ledgerPage(ctx context.Context, before []byte, above uint64, read groupReader) (page []ca.LedgerEntry, next []byte, err error) {
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucketLedger).Cursor()
		k, v := lastBelow(c, before)
		var groups [][]ca.LedgerEntry
		for n := 0; k != nil && indexOf(k) > above && n < headGroups && len(groups) < scanGroups; n++ {
			group, err := read(indexOf(k), v)
			if err != nil {
				return err
			}
			if group != nil {
				groups = append(groups, group)
			}
			next = append(next[:0], k...)
			k, v = c.Prev()
		}
		if k == nil || indexOf(k) <= above {
			next = nil
		}
		slices.Reverse(groups)
		page = slices.Concat(groups...)
		return nil
	})
	return page, next, err
}

func lastBelow(c *bbolt.Cursor, before []byte) (k, v []byte) {
	if k, _ := c.Seek(before); k == nil {
		return c.Last()
	}
	return c.Prev()
}

// PruneLedger drops the groups whose last SVID ended before the moment given, oldest first and up to the first group
// that has not: what stays is one unbroken run of indexes, and the stragglers below it that NoteEnded has found. It returns
// how many entries went.
func (s *Store) PruneLedger(ctx context.Context, before time.Time) (uint64, error) {
	var total uint64
	_ = s.young.fold() // on a full disk it fails, and pruning makes room
	for {
		n, more, err := s.pruneSome(ctx, before)
		total += n
		if err != nil || !more {
			return total, err
		}
	}
}

func (s *Store) pruneSome(ctx context.Context, before time.Time) (gone uint64, more bool, err error) {
	err = s.update(ctx, func(tx *bbolt.Tx) error {
		gone, more = 0, false
		b := tx.Bucket(bucketLedger)
		c := b.Cursor()
		stragglers, left := s.ended.Load().stragglers, false
		var keys [][]byte
		k, v := c.First()
		for ; k != nil; k, v = c.Next() {
			end, err := groupEnd(v)
			if err != nil {
				return err
			}
			var straggles bool
			straggles, stragglers = isNext(stragglers, indexOf(k))
			if !end.Before(before) && straggles {
				left = true
				continue
			}
			if !end.Before(before) {
				break
			}
			if len(keys) == pruneGroups {
				more = true
				break
			}
			n, err := groupSize(v)
			if err != nil {
				return err
			}
			keys, gone = append(keys, k), gone+n
		}
		if len(keys) == 0 {
			return errUnchanged
		}
		run := b.Sequence() + 1
		if k != nil {
			run = indexOf(k)
		}
		for _, k := range keys {
			if err := b.Delete(k); err != nil {
				return err
			}
		}
		if !left {
			return nil
		}
		return tx.Bucket(bucketMeta).Put(keyRun, indexKey(run))
	})
	if err != nil {
		return 0, false, err
	}
	return gone, more, nil
}

// keyRun holds, in the bucket meta, the index from which on the ledger is one unbroken run, big-endian. Below it are stragglers.
var keyRun = []byte("ledger run")

// isNext reports whether first is among the stragglers, and returns those that are greater.
func isNext(stragglers []uint64, first uint64) (is bool, rest []uint64) {
	for n := len(stragglers); n > 0 && stragglers[n-1] <= first; n-- {
		is, stragglers = stragglers[n-1] == first, stragglers[:n-1]
	}
	return is, stragglers
}

// LedgerSize is how many entries the ledger holds.
func (s *Store) LedgerSize(ctx context.Context) (n uint64, err error) {
	groups, last := s.young.unfolded()
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		var rest uint64
		if n, rest, err = sizeOf(tx, last); rest == 0 && len(groups) > 0 {
			n += last + 1 - groups[0].first
		}
		return err
	})
	return n, err
}

// sizeOf is how many entries the bucket holds: stragglers, and rest, an unbroken run up to the index last, or beyond: there
// may be more by now.
func sizeOf(tx *bbolt.Tx, last uint64) (n, rest uint64, err error) {
	run, c := uint64(0), tx.Bucket(bucketLedger).Cursor()
	if v := tx.Bucket(bucketMeta).Get(keyRun); len(v) == 8 {
		run = indexOf(v)
	}
	for k, v := c.First(); len(k) == 8; k, v = c.Next() {
		if indexOf(k) >= run {
			rest = last + 1 - min(last+1, indexOf(k))
			break
		}
		size, err := groupSize(v)
		if err != nil {
			return 0, 0, err
		}
		n += size
	}
	return n + rest, rest, nil
}

func indexKey(i uint64) []byte { return binary.BigEndian.AppendUint64(nil, i) }

func indexOf(key []byte) uint64 { return binary.BigEndian.Uint64(key) }
