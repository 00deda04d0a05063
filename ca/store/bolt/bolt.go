// Package bolt is the store of a CA with one replica: one bbolt file, owned by one process, and beside it the log of the
// ledger's young end (see wal.go).
//
// Buckets: meta (schema version, bundle, rollout, history, how far the ledger has ended and is unbroken), ledger (one value a group, see
// group.go), denials, renewals, agents (JSON), marks (see history.go).
// Each call is one transaction, or one record of the log: what returned nil is on the disk.
package bolt

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// SchemaVersion is the newest layout that this build reads and writes. An older build refuses a newer one.
const SchemaVersion = schemaLogged

// A store that is in use, or was when its process was killed, may have a part of its ledger in the log alone: a build that
// knows no log must not go on with it. Closed, a store is whole in its one file, as such builds left it.
const (
	schemaWhole  = 1
	schemaLogged = 2
)

// lockWait is how long Open waits for another process to let go of the file: a predecessor that is stopping.
const lockWait = 3 * time.Second

var (
	bucketMeta     = []byte("meta")
	bucketLedger   = []byte("ledger")
	bucketDenials  = []byte("denials")
	bucketRenewals = []byte("renewals")
	bucketAgents   = []byte("agents")
	bucketMarks    = []byte("marks")

	keySchema = []byte("schema")
	keyBundle = []byte("bundle")
)

// ErrInUse is wrapped by Open's error when another process holds the file.
var ErrInUse = errors.New("the store is in use by another process")

// ErrSchema is wrapped by Open's error for a file that a newer build wrote.
var ErrSchema = errors.New("the store was written by a newer meshca")

// Store is one open file. It is safe for concurrent use.
type Store struct {
	db *bbolt.DB
	// writes is what all that writes goes through.
	writes *committer
	// young is the ledger's young end, logPath where its log is.
	young   appender
	logPath string
	// opened and own are the files that the store and its log are.
	opened, own os.FileInfo
	notices     []string
	closing     sync.Mutex
	closed      bool
	// ended is how far the ledger has ended; see living.go.
	ended atomic.Pointer[floor]
	// mark is the newest; see history.go.
	mark *rotation.Current[ca.Mark]
	// publishing keeps mark in the order of the commits.
	publishing sync.Mutex
}

// Open opens the file, or makes it with mode 0600. It refuses a file that others can read, one that another process
// holds (ErrInUse), and one with a newer schema (ErrSchema).
func Open(path string) (*Store, error) {
	if err := checkMode(path); err != nil {
		return nil, err
	}
	var (
		file   dataFile
		opened os.FileInfo
	)
	db, err := openForeign(path, &bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType,
		OpenFile: func(path string, flag int, mode fs.FileMode) (*os.File, error) {
			f, err := os.OpenFile(path, flag, mode)
			if err == nil {
				file = dataFile{f}
				opened, err = f.Stat()
			}
			return f, err
		}})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("%w: %s stayed locked for %s. Stop the other meshca that uses it (`fuser %s` names it), "+
			"or give this one a state directory of its own", ErrInUse, path, lockWait, path)
	case errors.Is(err, errDamaged):
		return nil, openFailed(path, errors.Join(err, letGo(file.File)))
	case err != nil:
		return nil, openFailed(path, err)
	}
	// Who waited for the lock while a backup was restored has the file that was put aside.
	if named, err := os.Stat(path); err != nil || !os.SameFile(opened, named) {
		return nil, errors.Join(fmt.Errorf("the store %s was replaced while it was opened: start again", path), err, db.Close())
	}
	s := &Store{db: db, writes: newCommitter(db, file), opened: opened}
	switch err := s.open(path); {
	case errors.Is(err, errDamaged): // where bbolt has panicked it may hold its own locks, and closing it would wait for them
		return nil, openFailed(path, errors.Join(err, letGo(file.File)))
	case err != nil:
		return nil, errors.Join(err, db.Close())
	}
	return s, nil
}

func (s *Store) open(path string) (err error) {
	defer damaged(&err)()
	if err := s.prepare(path); err != nil {
		return err
	}
	if err := s.openHistory(); err != nil {
		return openFailed(path, err)
	}
	if err := s.openFloor(); err != nil {
		return openFailed(path, err)
	}
	if err := s.openLedger(path); err != nil {
		return openFailed(path, err)
	}
	return nil
}

// Close lets go of the file, in which the whole ledger is then. Calls that come later fail. After an error nothing is lost
// that was durable: the next Open finds it in the log.
func (s *Store) Close() error {
	s.closing.Lock()
	defer s.closing.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	err := s.young.close()
	if err == nil {
		err = s.writes.update(func(tx *bbolt.Tx) error { return putSchema(tx, schemaWhole) })
	}
	if err == nil && s.ours() == nil { // else it is another's
		err = gone(os.Remove(s.logPath))
	}
	return errors.Join(err, s.db.Close())
}

// Ready says why the store takes nothing: what is in the ledger's log cannot be folded into it, or nobody knows whether what it
// shows is durable; nil when it takes what comes, as far as is known.
func (s *Store) Ready() error { return unavailable(cmp.Or(s.young.ready(), s.writes.ready())) }

// checkMode refuses a file that others than its owner can use; a file that is not there yet is fine.
func checkMode(path string) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(filepath.Dir(path)); err != nil {
			return fmt.Errorf("the store's directory: %w. Make it, for the CA's user alone: install -d -m 0700 %s", err, filepath.Dir(path))
		}
		return nil
	case err != nil:
		return fmt.Errorf("opening the store: %w", err)
	case !info.Mode().IsRegular():
		return fmt.Errorf("the store %s is no regular file", path)
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("the store %s has mode %04o: others could read or change who gets which identity. Run: chmod 600 %s",
			path, info.Mode().Perm(), path)
	}
	return nil
}

// prepare checks the schema, and lays it in a new file.
func (s *Store) prepare(path string) error {
	return s.writes.update(func(tx *bbolt.Tx) error {
		meta, err := tx.CreateBucketIfNotExists(bucketMeta)
		if err != nil {
			return err
		}
		if v := meta.Get(keySchema); v != nil {
			if _, err := readSchema(v, path); err != nil {
				return err
			}
		} else if err := putSchema(tx, schemaWhole); err != nil {
			return err
		}
		if meta.Get(keyLog) == nil { // no log has this ID, so none that is found can pass for the store's
			id := make([]byte, walIDSize)
			_, _ = rand.Read(id) // it never fails
			if err := meta.Put(keyLog, id); err != nil {
				return err
			}
		}
		for _, name := range [][]byte{bucketLedger, bucketDenials, bucketRenewals, bucketAgents, bucketMarks} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
}

func putSchema(tx *bbolt.Tx, version uint32) error {
	return tx.Bucket(bucketMeta).Put(keySchema, binary.BigEndian.AppendUint32(nil, version))
}

// readSchema decodes the schema version of a file, and refuses a newer one.
func readSchema(v []byte, path string) (uint32, error) {
	if len(v) != 4 {
		return 0, fmt.Errorf("the store %s holds no schema version that can be read", path)
	}
	have := binary.BigEndian.Uint32(v)
	if have > SchemaVersion {
		return have, fmt.Errorf("%w: %s has schema %d, this build knows %d. Run the newer meshca, or restore a backup from before it",
			ErrSchema, path, have, SchemaVersion)
	}
	return have, nil
}

// errUnchanged ends an update that has nothing to write: it is rolled back, which costs no write to the disk.
var errUnchanged = errors.New("nothing changed")

// update runs a durable transaction; view a reading one. Failures of the file become STORE_UNAVAILABLE; its own words
// stay beside the refusal, for the log.
func (s *Store) update(ctx context.Context, fn func(*bbolt.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.writes.update(fn); !errors.Is(err, errUnchanged) {
		return unavailable(err)
	}
	return nil
}

func (s *Store) view(ctx context.Context, fn func(*bbolt.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return unavailable(s.db.View(fn))
}

// passed is an error of the caller's own that goes through a transaction as it is.
type passed struct{ error }

func (p passed) Unwrap() error { return p.error }

func unavailable(err error) error {
	var p passed
	switch {
	case err == nil:
		return nil
	case errors.As(err, &p):
		return p.error
	}
	return fmt.Errorf("%w: %w", refusal.New(refusal.StoreUnavailable, "the store failed"), err)
}

var (
	_ ca.BundleStore = (*Store)(nil)
	_ ca.LedgerStore = (*Store)(nil)
)
