package bolt

import (
	"context"
	"encoding/binary"
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

// AppendLedger stores a group as one value in one commit.
func (s *Store) AppendLedger(ctx context.Context, group []ca.LedgerEntry) error {
	if len(group) == 0 {
		return nil
	}
	return s.update(ctx, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketLedger)
		b.FillPercent = 1 // keys only ever grow
		last := b.Sequence()
		if err := b.SetSequence(last + uint64(len(group))); err != nil {
			return err
		}
		return b.Put(indexKey(last+1), encodeGroup(group))
	})
}

// ScanLedger calls fn for each entry, newest first, until it returns false or an error. No transaction is open while fn
// runs, so a slow fn holds up nothing; entries that come after the scan began are not seen.
func (s *Store) ScanLedger(ctx context.Context, fn func(ca.LedgerEntry) (bool, error)) error {
	var before []byte // the key that the last page ended at
	for {
		page, next, err := s.ledgerPage(ctx, before)
		if err != nil {
			return err
		}
		for i := range page {
			more, err := fn(page[i])
			if err != nil || !more {
				return err
			}
		}
		if next == nil {
			return nil
		}
		before = next
	}
}

// ledgerPage reads up to scanGroups groups below the key before (nil: from the newest), newest entry first, and
// returns the key to go on from.
func (s *Store) ledgerPage(ctx context.Context, before []byte) (page []ca.LedgerEntry, next []byte, err error) {
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucketLedger).Cursor()
		k, v := lastBelow(c, before)
		for n := 0; k != nil; k, v = c.Prev() {
			if n++; n > scanGroups {
				return nil
			}
			group, err := readGroup(binary.BigEndian.Uint64(k), v)
			if err != nil {
				return err
			}
			for i := len(group) - 1; i >= 0; i-- {
				page = append(page, group[i])
			}
			next = append(next[:0], k...)
		}
		next = nil
		return nil
	})
	return page, next, err
}

func lastBelow(c *bbolt.Cursor, before []byte) (k, v []byte) {
	if before == nil {
		return c.Last()
	}
	if k, _ := c.Seek(before); k == nil {
		return c.Last()
	}
	return c.Prev()
}

// PruneLedger drops the groups whose last SVID ended before the moment given, oldest first and up to the first group
// that has not: what stays is one unbroken run of indexes. It returns how many entries went.
func (s *Store) PruneLedger(ctx context.Context, before time.Time) (uint64, error) {
	var total uint64
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
		var keys [][]byte
		k, v := c.First()
		for ; k != nil; k, v = c.Next() {
			end, err := groupEnd(v)
			if err != nil {
				return err
			}
			if !end.Before(before) {
				break
			}
			if len(keys) == pruneGroups {
				more = true
				break
			}
			keys = append(keys, k)
		}
		if len(keys) == 0 {
			return errUnchanged
		}
		end := b.Sequence() + 1
		if k != nil {
			end = binary.BigEndian.Uint64(k)
		}
		gone = end - binary.BigEndian.Uint64(keys[0])
		for _, k := range keys {
			if err := b.Delete(k); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, false, err
	}
	return gone, more, nil
}

// LedgerSize is how many entries the ledger holds.
func (s *Store) LedgerSize(ctx context.Context) (uint64, error) {
	var n uint64
	err := s.view(ctx, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketLedger)
		if k, _ := b.Cursor().First(); k != nil {
			n = b.Sequence() + 1 - binary.BigEndian.Uint64(k)
		}
		return nil
	})
	return n, err
}

func indexKey(i uint64) []byte { return binary.BigEndian.AppendUint64(nil, i) }
