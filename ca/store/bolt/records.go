package bolt

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/ca"
)

// Bundle returns the stored trust bundle; the zero StoredBundle when there is none.
func (s *Store) Bundle(ctx context.Context) (ca.StoredBundle, error) {
	var b ca.StoredBundle
	err := s.view(ctx, func(tx *bbolt.Tx) (err error) {
		b, err = readBundle(tx)
		return err
	})
	return b, err
}

// SwapBundle replaces the bundle if its sequence is the expected one, else it returns ca.ErrConflict.
func (s *Store) SwapBundle(ctx context.Context, expected uint64, next ca.StoredBundle) error {
	return s.change(ctx, func(tx *bbolt.Tx) error {
		have, err := readBundle(tx)
		if err != nil {
			return err
		}
		if have.Sequence != expected {
			return passed{ca.ErrConflict}
		}
		if next.Sequence <= expected {
			return passed{fmt.Errorf("the bundle's sequence would go from %d to %d", expected, next.Sequence)}
		}
		return tx.Bucket(bucketMeta).Put(keyBundle, append(binary.BigEndian.AppendUint64(nil, next.Sequence), next.JSON...))
	})
}

// readBundle decodes the stored form: the sequence, big-endian, then the JSON.
func readBundle(tx *bbolt.Tx) (ca.StoredBundle, error) {
	v := tx.Bucket(bucketMeta).Get(keyBundle)
	if v == nil {
		return ca.StoredBundle{}, nil
	}
	if len(v) < 8 {
		return ca.StoredBundle{}, fmt.Errorf("the stored bundle has %d bytes", len(v))
	}
	return ca.StoredBundle{Sequence: binary.BigEndian.Uint64(v), JSON: bytes.Clone(v[8:])}, nil
}

// PutDenial stores a denial in place of one for the same identity.
func (s *Store) PutDenial(ctx context.Context, d ca.Denial) error {
	return s.change(ctx, func(tx *bbolt.Tx) error { return putJSON(tx.Bucket(bucketDenials), []byte(d.ID), d) })
}

// DeleteDenial lifts a denial, and reports whether there was one.
func (s *Store) DeleteDenial(ctx context.Context, id string) (bool, error) {
	var was bool
	err := s.change(ctx, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketDenials)
		if was = b.Get([]byte(id)) != nil; !was {
			return errUnchanged
		}
		return b.Delete([]byte(id))
	})
	return was && err == nil, err
}

// Denials returns all denials, ordered by identity.
func (s *Store) Denials(ctx context.Context) ([]ca.Denial, error) {
	return readAll[ca.Denial](ctx, s, bucketDenials)
}

// SetRenewOrders stores these orders in place of all there are.
func (s *Store) SetRenewOrders(ctx context.Context, all []ca.RenewOrder) error {
	return s.change(ctx, func(tx *bbolt.Tx) error {
		if err := tx.DeleteBucket(bucketRenewals); err != nil {
			return err
		}
		b, err := tx.CreateBucket(bucketRenewals)
		if err != nil {
			return err
		}
		for i, o := range all {
			if err := putJSON(b, binary.BigEndian.AppendUint32(nil, uint32(i)), o); err != nil {
				return err
			}
		}
		return nil
	})
}

// RenewOrders returns the orders whose Until has not passed.
func (s *Store) RenewOrders(ctx context.Context) ([]ca.RenewOrder, error) {
	all, err := readAll[ca.RenewOrder](ctx, s, bucketRenewals)
	now := time.Now()
	live := all[:0]
	for _, o := range all {
		if !o.Until.Before(now) {
			live = append(live, o)
		}
	}
	return live, err
}

// Agent returns the record of an agent, and whether there is one.
func (s *Store) Agent(ctx context.Context, id string) (ca.AgentRecord, bool, error) {
	var (
		r     ca.AgentRecord
		found bool
	)
	err := s.view(ctx, func(tx *bbolt.Tx) error {
		v := tx.Bucket(bucketAgents).Get([]byte(id))
		if v == nil {
			return nil
		}
		found = true
		return json.Unmarshal(v, &r)
	})
	return r, found && err == nil, err
}

// PutAgent stores a record in place of the one with the same ID.
func (s *Store) PutAgent(ctx context.Context, r ca.AgentRecord) error {
	return s.update(ctx, func(tx *bbolt.Tx) error { return putJSON(tx.Bucket(bucketAgents), []byte(r.ID), r) })
}

// UpdateAgent lets change edit the record of an agent and stores the result, in one step that nothing comes between. A
// record that is not there yet comes with its ID alone. change may be called more than once; its error is returned as
// it is and nothing is stored. Nothing is written when change changed nothing.
func (s *Store) UpdateAgent(ctx context.Context, id string, change func(*ca.AgentRecord) error) error {
	return s.update(ctx, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketAgents)
		old := b.Get([]byte(id))
		r := ca.AgentRecord{ID: id}
		if old != nil {
			if err := json.Unmarshal(old, &r); err != nil {
				return fmt.Errorf("the stored agent %s: %w", id, err)
			}
		}
		if err := change(&r); err != nil {
			return passed{err}
		}
		if r.ID != id {
			return passed{fmt.Errorf("the agent %s would become %s", id, r.ID)}
		}
		data, err := json.Marshal(r)
		if err != nil {
			return err
		}
		if bytes.Equal(data, old) {
			return errUnchanged
		}
		return b.Put([]byte(id), data)
	})
}

// Agents returns all agents, ordered by ID.
func (s *Store) Agents(ctx context.Context) ([]ca.AgentRecord, error) {
	return readAll[ca.AgentRecord](ctx, s, bucketAgents)
}

// DeleteAgent forgets an agent, and reports whether it was known.
func (s *Store) DeleteAgent(ctx context.Context, id string) (bool, error) {
	var was bool
	err := s.update(ctx, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketAgents)
		if was = b.Get([]byte(id)) != nil; !was {
			return errUnchanged
		}
		return b.Delete([]byte(id))
	})
	return was && err == nil, err
}

func putJSON(b *bbolt.Bucket, key []byte, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return b.Put(key, data)
}

// readAll decodes each value of a bucket, in the order of the keys.
func readAll[T any](ctx context.Context, s *Store, bucket []byte) ([]T, error) {
	var all []T
	err := s.view(ctx, func(tx *bbolt.Tx) error {
		all = nil
		return tx.Bucket(bucket).ForEach(func(k, v []byte) error {
			var r T
			if err := json.Unmarshal(v, &r); err != nil {
				return fmt.Errorf("%s %q: %w", bucket, k, err)
			}
			all = append(all, r)
			return nil
		})
	})
	return all, err
}
