package bolt

import (
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// carryOver makes next go on behind what the standing store has decided: denied stays denied, tainted stays tainted, what
// was trusted stays so for as long as what it signed can live, and sequence and generation lie beyond all that agents can
// have seen of it.
func carryOver(next *bbolt.DB, standing State) (st State, err error) {
	err = next.Update(func(tx *bbolt.Tx) error {
		denials, err := tx.CreateBucketIfNotExists(bucketDenials)
		if err != nil {
			return err
		}
		for _, d := range standing.Denials {
			if err := putJSON(denials, []byte(d.ID), d); err != nil {
				return err
			}
		}
		bundle, err := inherit(tx, standing, time.Now())
		if err != nil {
			return err
		}
		if _, err := tx.CreateBucketIfNotExists(bucketMarks); err != nil {
			return err
		}
		sequence := max(bundle.Sequence, standing.Bundle.Sequence) + ca.AcceptedJump
		if err := tx.Bucket(bucketMeta).Put(keyBundle, append(binary.BigEndian.AppendUint64(nil, sequence), bundle.JSON...)); err != nil {
			return err
		}
		if err := acceptLoss(tx, standing.Mark.Generation+ca.AcceptedJump); err != nil {
			return err
		}
		if _, err := advance(tx); err != nil {
			return err
		}
		st, err = readState(tx, "the restored store")
		return err
	})
	return st, err
}

// putBack notes that the store was, and has its rollout reckon with what lives that the store does not know. Nothing that
// was decided changes, so neither do marks and versions.
func putBack(next *bbolt.DB, now time.Time) (r rotation.Rollout, err error) {
	err = next.Update(func(tx *bbolt.Tx) error {
		journal, version, err := readRollout(tx)
		if err != nil {
			return err
		}
		r = journal.PutBack(now.Add(ca.MaxTTL), now)
		data, err := json.Marshal(r)
		if err != nil {
			return fmt.Errorf("encoding the rollout: %w", err)
		}
		if err := putRollout(tx, version, data); err != nil {
			return err
		}
		meta := tx.Bucket(bucketMeta)
		if err := meta.Delete(keyLog); err != nil { // what has that ID is the log of the store that stood
			return err
		}
		if err := putSchema(tx, schemaWhole); err != nil {
			return err
		}
		return meta.Put(keyRestored, binary.BigEndian.AppendUint64(nil, uint64(now.Unix())))
	})
	return r, err
}

// inherit has the journal of roots know what the standing one does of those that must not come back, and of those that
// others rely on. It returns the bundle with these.
func inherit(tx *bbolt.Tx, standing State, now time.Time) (ca.StoredBundle, error) {
	bundle, err := readBundle(tx)
	if err != nil {
		return bundle, err
	}
	journal, version, err := readRollout(tx)
	if err != nil {
		return bundle, err
	}
	journal, bundle, err = keepTrusted(journal.Inherit(standing.Rollout, now), bundle, standing, now)
	if err != nil {
		return bundle, err
	}
	data, err := json.Marshal(journal)
	if err != nil {
		return bundle, fmt.Errorf("encoding the rollout: %w", err)
	}
	return bundle, putRollout(tx, max(version, standing.RolloutVersion)+1, data)
}

// keepTrusted has the roots that the standing store trusts stay trusted: workloads hold what they have signed, and are to
// be accepted until they have another one.
func keepTrusted(journal rotation.Rollout, bundle ca.StoredBundle, standing State, now time.Time) (rotation.Rollout, ca.StoredBundle, error) {
	roots, err := standing.Bundle.Roots()
	if err != nil {
		return journal, bundle, fmt.Errorf("what the store that stands trusts: %w", err)
	}
	known, err := bundle.Roots()
	if err != nil {
		return journal, bundle, err
	}
	parties := func(roots []*x509.Certificate) (all []rotation.Party) {
		for _, root := range roots {
			all = append(all, rotation.Party{ID: ca.RootID(root), Key: ca.KeyOf(root)})
		}
		return all
	}
	journal, come := journal.Keep(parties(known), parties(roots), now.Add(ca.MaxTTL))
	if len(come) == 0 {
		return journal, bundle, nil
	}
	roots = slices.DeleteFunc(roots, func(root *x509.Certificate) bool {
		return !slices.ContainsFunc(come, func(p rotation.Party) bool { return p.ID == ca.RootID(root) })
	})
	bundle, err = bundle.With(roots...)
	return journal, bundle, err
}
