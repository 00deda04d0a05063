package bolt

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// State is what a store's file holds of what was decided, and how far its ledger goes.
type State struct {
	Schema  uint32
	Mark    ca.Mark
	Bundle  ca.StoredBundle
	Rollout rotation.Rollout
	// RolloutVersion counts the changes of the journal of roots.
	RolloutVersion uint64
	Denials        []ca.Denial
	LedgerEntries  uint64
	// LedgerLast is the index of the last entry ever, LastIssued the time of the last one that is there.
	LedgerLast uint64
	LastIssued time.Time
}

// readState reads a file that need not be a store of ours; path is for its errors.
func readState(tx *bbolt.Tx, path string) (State, error) {
	var st State
	meta, ledger, denials := tx.Bucket(bucketMeta), tx.Bucket(bucketLedger), tx.Bucket(bucketDenials)
	if meta == nil || ledger == nil || denials == nil {
		return st, fmt.Errorf("%s is no store of meshca: it lacks buckets", path)
	}
	var err error
	if st.Schema, err = readSchema(meta.Get(keySchema), path); err != nil {
		return st, err
	}
	var errs []error
	gather := func(err error) { errs = append(errs, err) }
	st.Mark, err = newestMark(tx)
	gather(err)
	st.Bundle, err = readBundle(tx)
	gather(err)
	st.Rollout, st.RolloutVersion, err = readRollout(tx)
	gather(err)
	gather(denials.ForEach(func(_, v []byte) error {
		var d ca.Denial
		err := json.Unmarshal(v, &d)
		st.Denials = append(st.Denials, d)
		return err
	}))
	st.LedgerLast = ledger.Sequence()
	c := ledger.Cursor()
	if k, _ := c.First(); len(k) == 8 {
		st.LedgerEntries, _, err = sizeOf(tx, st.LedgerLast)
		gather(err)
	}
	if k, v := c.Last(); len(k) == 8 {
		group, err := readGroup(binary.BigEndian.Uint64(k), v)
		gather(err)
		if len(group) > 0 {
			st.LastIssued = group[len(group)-1].IssuedAt
		}
	}
	return st, errors.Join(errs...)
}
