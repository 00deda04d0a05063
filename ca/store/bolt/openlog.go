package bolt

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
)

// keyLog holds, in the bucket meta, the ID of the store's log.
var keyLog = []byte("ledger log")

// openLedger folds what the log holds that the bucket lacks, and begins the log anew.
func (s *Store) openLedger(path string) error {
	var (
		id     walID
		schema uint32
		last   uint64
	)
	err := s.db.View(func(tx *bbolt.Tx) (err error) {
		meta := tx.Bucket(bucketMeta)
		copy(id[:], meta.Get(keyLog))
		last = tx.Bucket(bucketLedger).Sequence()
		schema, err = readSchema(meta.Get(keySchema), path)
		return err
	})
	if err != nil {
		return err
	}
	if id == (walID{}) {
		_, _ = rand.Read(id[:]) // it never fails
	}
	file, groups, err := readyLog(path+walSuffix, id, schema == schemaLogged, last)
	if err != nil {
		return err
	}
	if len(groups) > 0 {
		last = groups[len(groups)-1].last
	}
	log := &wal{file: file, size: walArea}
	err = s.db.Update(func(tx *bbolt.Tx) error {
		if err := putGroups(tx, groups); err != nil {
			return err
		}
		if err := tx.Bucket(bucketMeta).Put(keyLog, id[:]); err != nil {
			return err
		}
		return putSchema(tx, schemaLogged)
	})
	if err == nil {
		err = log.reset()
	}
	if err != nil {
		return errors.Join(err, file.Close())
	}
	s.young.db, s.young.log, s.young.last = s.db, log, last
	s.young.later = time.AfterFunc(foldAfter, func() { _ = s.young.fold() }) // who appends next hears of it
	return nil
}

// readyLog opens a store's log, and reads what it holds behind the index folded. It makes an empty one where none can hold
// anything: the store was closed, or somebody has put an empty file there to say that what is lost is lost.
func readyLog(path string, id walID, inUse bool, folded uint64) (walFile, []group, error) {
	if err := checkMode(path); err != nil {
		return nil, nil, err
	}
	file, found, err := openLog(path, id)
	if err != nil {
		return nil, nil, err
	}
	if found == ownLog {
		groups, err := readLog(file, walArea, folded)
		if err == nil && (inUse || len(groups) == 0) {
			return file, groups, nil
		}
		// A store that was closed has all of its log. This one is from before, and the log is from after.
		if err := errors.Join(err, file.Close()); inUse {
			return nil, nil, notWhole(path, err)
		}
	}
	switch {
	case inUse && found != emptyLog:
		return nil, nil, notWhole(path, fmt.Errorf("%w: %s", ErrLog, found))
	case found == ownLog, found == otherLog:
		if err := os.Rename(path, path+".replaced-"+time.Now().UTC().Format("20060102T150405Z")); err != nil {
			return nil, nil, err
		}
	}
	if err := createLog(path, id); err != nil {
		return nil, nil, fmt.Errorf("making the ledger's log, which takes %d MiB: %w", walArea.file()>>20, err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, nil, err
	}
	file, _, err = openLog(path, id)
	return file, nil, err
}

// notWhole says what to do where entries are missing that somebody was told are recorded.
func notWhole(path string, why error) error {
	return fmt.Errorf("%w. The store was not closed, so what was issued in the last second before may be recorded in its log alone, %s. "+
		"Put that file back as it was. If it is lost, move aside what is there and make an empty file of that name (mode 0600): the "+
		"CA starts then, without those entries", why, path)
}

// logKind is what stands where a store's log belongs.
type logKind string

const (
	noLog    logKind = "there is none"
	emptyLog logKind = "it is empty"
	otherLog logKind = "what is there is not this store's log"
	ownLog   logKind = "it is this store's"
)

// openLog opens a log that is this store's; else there is no file.
func openLog(path string, id walID) (walFile, logKind, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, noLog, nil
	case err != nil:
		return nil, noLog, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, noLog, errors.Join(err, f.Close())
	}
	if info.Size() == 0 {
		return nil, emptyLog, f.Close()
	}
	if have, whole := readHead(f); !whole || have != id || info.Size() != walArea.file() {
		return nil, otherLog, f.Close()
	}
	return dataFile{f}, ownLog, nil
}
