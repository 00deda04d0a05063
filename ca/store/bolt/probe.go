package bolt

import (
	"context"

	"go.etcd.io/bbolt"
)

// probeSize is what Probe writes: more than a small group takes, so that a store which passes has room for the next.
// Pages that other transactions left free would take a few bytes even where the disk is full.
const probeSize = 64 << 10

var keyProbe = []byte("probe")

// Probe tells whether the store can write: it makes an entry durable and takes it away again.
func (s *Store) Probe(ctx context.Context) error {
	if err := unavailable(s.young.probe()); err != nil {
		return err
	}
	err := s.update(ctx, func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketMeta).Put(keyProbe, make([]byte, probeSize))
	})
	if err != nil {
		return err
	}
	return s.update(ctx, func(tx *bbolt.Tx) error { return tx.Bucket(bucketMeta).Delete(keyProbe) })
}
