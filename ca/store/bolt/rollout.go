package bolt

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/rotation"
)

// keyRollout holds, in the bucket meta, the version of the Rollout (uint64, big-endian) and the Rollout in JSON.
var keyRollout = []byte("rollout")

// Rollout returns the journal of roots, and its version; the zero Rollout and 0 when there is none.
func (s *Store) Rollout(ctx context.Context) (rotation.Rollout, uint64, error) {
	var (
		r       rotation.Rollout
		version uint64
	)
	err := s.view(ctx, func(tx *bbolt.Tx) (err error) {
		r, version, err = readRollout(tx)
		return err
	})
	return r, version, err
}

func readRollout(tx *bbolt.Tx) (r rotation.Rollout, version uint64, err error) {
	v := tx.Bucket(bucketMeta).Get(keyRollout)
	if v == nil {
		return r, 0, nil
	}
	if len(v) < 8 {
		return r, 0, passed{fmt.Errorf("the rollout in the store is damaged: %d bytes", len(v))}
	}
	if err := json.Unmarshal(v[8:], &r); err != nil {
		return r, 0, passed{fmt.Errorf("the rollout in the store is damaged: %w", err)}
	}
	return r, binary.BigEndian.Uint64(v), nil
}

// SwapRollout replaces the journal if it has this version, else it returns rotation.ErrConflict.
func (s *Store) SwapRollout(ctx context.Context, version uint64, next rotation.Rollout) error {
	data, err := json.Marshal(next)
	if err != nil {
		return fmt.Errorf("encoding the rollout: %w", err)
	}
	return s.change(ctx, func(tx *bbolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		var have uint64
		if v := meta.Get(keyRollout); len(v) >= 8 {
			have = binary.BigEndian.Uint64(v)
		}
		if have != version {
			return passed{rotation.ErrConflict}
		}
		return putRollout(tx, version+1, data)
	})
}

func putRollout(tx *bbolt.Tx, version uint64, data []byte) error {
	return tx.Bucket(bucketMeta).Put(keyRollout, append(binary.BigEndian.AppendUint64(nil, version), data...))
}

var _ rotation.Journal = (*Store)(nil)
