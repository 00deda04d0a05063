package bolt

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// The bucket marks holds the tag (16 bytes) and the bundle's sequence (uint64, big-endian) by generation (uint64,
// big-endian). What the state is in a generation is nowhere: the current one is the store itself.
const (
	tagSize  = 16
	markSize = tagSize + 8
	// maxMarks is how many generations back a fork is told from the store's own past. Operators make a few a week.
	maxMarks = 4096
)

var (
	keyMarkKey = []byte("mark key")
	keyLoss    = []byte("loss")
	keyFloor   = []byte("floor")
	// keyRestored holds Unix seconds, big-endian.
	keyRestored = []byte("restored")
)

// markKeySize is that of HMAC-SHA256's keys.
const markKeySize = 32

// openHistory makes the key of marks in a store that has none, and reads the newest mark.
func (s *Store) openHistory() error {
	var newest ca.Mark
	err := s.writes.update(func(tx *bbolt.Tx) (err error) {
		if newest, err = newestMark(tx); err != nil {
			return err
		}
		meta := tx.Bucket(bucketMeta)
		if meta.Get(keyMarkKey) != nil {
			return errUnchanged
		}
		key := make([]byte, markKeySize)
		_, _ = rand.Read(key) // it never fails
		return meta.Put(keyMarkKey, key)
	})
	if err != nil && !errors.Is(err, errUnchanged) {
		return err
	}
	s.mark = rotation.NewCurrent(newest)
	return nil
}

// Mark is the newest state's, and a channel that closes when there is a newer one.
func (s *Store) Mark() (ca.Mark, <-chan struct{}) { return s.mark.Get() }

// HasMark reports whether the state was one of this store's. It says no only where that is certain: of what is too old to
// be known it says yes.
func (s *Store) HasMark(ctx context.Context, m ca.Mark) (bool, error) {
	has := unknownMark
	err := s.view(ctx, func(tx *bbolt.Tx) (err error) {
		has, err = lookUp(tx, m)
		return err
	})
	return has != foreignMark, err
}

// History is what the store knows of its past.
func (s *Store) History(ctx context.Context) (ca.History, error) {
	var h ca.History
	err := s.view(ctx, func(tx *bbolt.Tx) error {
		h = ca.History{}
		meta := tx.Bucket(bucketMeta)
		h.MarkKey = append(h.MarkKey, meta.Get(keyMarkKey)...)
		if v := meta.Get(keyFloor); len(v) == 8 {
			h.Floor = binary.BigEndian.Uint64(v)
		}
		if v := meta.Get(keyRestored); len(v) == 8 {
			h.RestoredAt = time.Unix(int64(binary.BigEndian.Uint64(v)), 0)
		}
		if v := meta.Get(keyLoss); v != nil {
			h.Loss = new(ca.Loss)
			return json.Unmarshal(v, h.Loss)
		}
		return nil
	})
	return h, err
}

// PutLoss notes that the store is older than what agents have followed, in place of what was noted before.
func (s *Store) PutLoss(ctx context.Context, l ca.Loss) error {
	return s.update(ctx, func(tx *bbolt.Tx) error { return putJSON(tx.Bucket(bucketMeta), keyLoss, l) })
}

// AcceptLoss forgets what was noted, and all marks: from now on the store goes on behind this generation, whatever
// agents show of those before. The bundle's sequence of now becomes the floor.
func (s *Store) AcceptLoss(ctx context.Context, beyond uint64) error {
	return s.change(ctx, func(tx *bbolt.Tx) error { return acceptLoss(tx, beyond) })
}

func acceptLoss(tx *bbolt.Tx, beyond uint64) error {
	newest, err := newestMark(tx)
	if err != nil {
		return err
	}
	if err := tx.DeleteBucket(bucketMarks); err != nil {
		return err
	}
	marks, err := tx.CreateBucket(bucketMarks)
	if err != nil {
		return err
	}
	// The change that this is part of gets the next generation.
	if err := putMark(marks, ca.Mark{Generation: max(beyond, newest.Generation), Bundle: newest.Bundle}); err != nil {
		return err
	}
	bundle, err := readBundle(tx)
	if err != nil {
		return err
	}
	meta := tx.Bucket(bucketMeta)
	if err := meta.Put(keyFloor, binary.BigEndian.AppendUint64(nil, bundle.Sequence)); err != nil {
		return err
	}
	return meta.Delete(keyLoss)
}

// change is an update of what marks name: it makes the next one in the same transaction.
func (s *Store) change(ctx context.Context, fn func(*bbolt.Tx) error) error {
	var next ca.Mark
	err := s.update(ctx, func(tx *bbolt.Tx) (err error) {
		next = ca.Mark{}
		if err := fn(tx); err != nil {
			return err
		}
		next, err = advance(tx)
		return err
	})
	if err != nil || next.Generation == 0 {
		return err
	}
	s.publishing.Lock()
	defer s.publishing.Unlock()
	if s.mark.Value().Generation < next.Generation {
		s.mark.Set(next)
	}
	return nil
}

// advance makes the mark of the state as the transaction leaves it.
func advance(tx *bbolt.Tx) (ca.Mark, error) {
	newest, err := newestMark(tx)
	if err != nil {
		return ca.Mark{}, err
	}
	bundle, err := readBundle(tx)
	if err != nil {
		return ca.Mark{}, err
	}
	next := ca.Mark{Generation: newest.Generation + 1, Bundle: bundle.Sequence}
	_, _ = rand.Read(next.Tag[:]) // it never fails
	marks := tx.Bucket(bucketMarks)
	if next.Generation > maxMarks {
		if err := marks.Delete(indexKey(next.Generation - maxMarks)); err != nil {
			return ca.Mark{}, err
		}
	}
	return next, putMark(marks, next)
}

func putMark(marks *bbolt.Bucket, m ca.Mark) error {
	return marks.Put(indexKey(m.Generation), binary.BigEndian.AppendUint64(m.Tag[:], m.Bundle))
}

// newestMark is the zero Mark in a store in which nothing was decided yet.
func newestMark(tx *bbolt.Tx) (ca.Mark, error) {
	marks := tx.Bucket(bucketMarks)
	if marks == nil { // a backup of an earlier build
		return ca.Mark{}, nil
	}
	k, v := marks.Cursor().Last()
	if k == nil {
		return ca.Mark{}, nil
	}
	return decodeMark(k, v)
}

func decodeMark(k, v []byte) (m ca.Mark, err error) {
	if len(k) != 8 || len(v) != markSize {
		return m, fmt.Errorf("a mark in the store is damaged: %d and %d bytes", len(k), len(v))
	}
	m.Generation, m.Bundle = binary.BigEndian.Uint64(k), binary.BigEndian.Uint64(v[tagSize:])
	copy(m.Tag[:], v)
	return m, nil
}

// kinship is what a store can say of a mark.
type kinship int

const (
	unknownMark kinship = iota // too old, or lost and accepted
	ownMark
	foreignMark // certainly none of this store's
)

func lookUp(tx *bbolt.Tx, m ca.Mark) (kinship, error) {
	newest, err := newestMark(tx)
	if err != nil {
		return unknownMark, err
	}
	if m.Generation > newest.Generation {
		return foreignMark, nil
	}
	marks := tx.Bucket(bucketMarks)
	if m.Generation == 0 || marks == nil {
		return unknownMark, nil
	}
	k := indexKey(m.Generation)
	v := marks.Get(k)
	if v == nil {
		return unknownMark, nil
	}
	have, err := decodeMark(k, v)
	switch {
	case err != nil:
		return unknownMark, err
	case have.Tag == m.Tag:
		return ownMark, nil
	case have.Tag == [tagSize]byte{}: // where a loss was accepted
		return unknownMark, nil
	}
	return foreignMark, nil
}
