package bolt

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
)

var (
	// keyLog holds, in the bucket meta, the ID of the store's log; or one that no log has, where there was none yet.
	keyLog = []byte("ledger log")
	// keyPassed holds the index of the last entry that came into the bucket without having been in a log.
	keyPassed = []byte("ledger passed")
)

// lostSuffix is behind the log's name in that of the file by which somebody says that what is lost is lost.
const lostSuffix = ".lost"

// openLedger reads what the log holds that the bucket lacks, and begins a new log. If it cannot, for the disk is full, the
// store is open all the same: what is recorded can be read, and what is to be is refused until it can be written.
func (s *Store) openLedger(path string) error {
	s.logPath = path + walSuffix
	have, err := s.knownLog(path)
	if err != nil {
		return err
	}
	found, err := findLog(s.logPath, have.last)
	if err != nil {
		return err
	}
	defer found.close()
	if found.file != nil {
		if s.own, err = found.file.Stat(); err != nil {
			return err
		}
	}
	groups, err := s.taken(have, found)
	if err != nil {
		return err
	}
	s.young = appender{db: s.db, update: s.writes.update, renew: s.beginLog, log: &wal{torn: true}, pending: groups, last: have.last}
	if n := len(groups); n > 0 {
		s.young.last = groups[n-1].last
	}
	s.young.later = time.AfterFunc(foldAfter, func() { _ = s.young.fold() }) // Ready tells of it
	if err := s.young.mend(); err != nil {
		s.note("nothing can be recorded, so nothing is issued: %v", err)
	}
	return nil
}

// known is what the store says of its log.
type known struct {
	id walID
	// inUse says that the store was not closed: its log may have more than the bucket, whose last index is last.
	inUse bool
	last  uint64
	// passed says that the last entry was never in the log.
	passed bool
}

func (s *Store) knownLog(path string) (k known, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		copy(k.id[:], meta.Get(keyLog))
		k.last = tx.Bucket(bucketLedger).Sequence()
		k.passed = bytes.Equal(meta.Get(keyPassed), indexKey(k.last))
		schema, err := readSchema(meta.Get(keySchema), path)
		k.inUse = schema == schemaLogged
		return err
	})
	return k, err
}

// foundLog is what stands where the log belongs.
type foundLog struct {
	file walFile // nil: nothing
	head walHead
	// groups are those behind what the bucket has; why says that there are others, or that nobody can know.
	groups []group
	why    error
	// end is the index of the last entry that can be read.
	end uint64
}

// findLog looks at a log of a store whose bucket ends at the index last.
func findLog(path string, last uint64) (l foundLog, err error) {
	if err := checkMode(path); err != nil {
		return l, err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		l.why = fmt.Errorf("%w: there is none", ErrLog)
		return l, nil
	case err != nil:
		return l, err
	}
	l.file = dataFile{f}
	if err := lockFile(f); err != nil {
		return l, errors.Join(err, f.Close())
	}
	info, err := f.Stat()
	named, err2 := os.Stat(path)
	if err := errors.Join(err, err2); err != nil {
		return l, errors.Join(err, f.Close())
	}
	if !os.SameFile(info, named) {
		return l, errors.Join(fmt.Errorf("the log %s was replaced while it was opened: start again", path), f.Close())
	}
	var whole bool
	if l.head, whole = readHead(f); !whole || info.Size() != walArea.file() {
		l.why = fmt.Errorf("%w: the file begins or ends as none does", ErrLog)
		return l, nil
	}
	l.groups, l.end, l.why = readLog(f, walArea, last)
	return l, nil
}

func (l foundLog) close() {
	if l.file != nil {
		_ = l.file.Close()
	}
}

// of says why this is not the log that a store in use needs; nil: it is. It can be the next one after the log that the store
// knows: that comes into place before the store knows it.
func (l foundLog) of(k known) error {
	switch {
	case l.why != nil:
		return l.why
	case l.head.id != k.id && l.head.prev != k.id:
		return fmt.Errorf("%w: it is that of another store, or of another time", ErrLog)
	case l.head.base > k.last:
		return fmt.Errorf("%w: entry %d is followed by entry %d", ErrLog, k.last, l.head.base+1)
	case max(l.head.base, l.end) < k.last && !k.passed:
		return fmt.Errorf("%w: it is that of an earlier moment, and ends with entry %d: the store has entry %d", ErrLog, max(l.head.base, l.end), k.last)
	}
	return nil
}

// taken are the groups of the log that found is, if the store needs one. What was found and is not taken is kept.
func (s *Store) taken(k known, found foundLog) ([]group, error) {
	why := found.of(k)
	switch {
	case k.inUse && why == nil:
		return found.groups, nil
	case found.file == nil && !k.inUse:
		return nil, nil
	case !k.inUse: // closed, the store has all. What its own log has beyond was refused
		if found.head.id == k.id || why == nil && len(found.groups) == 0 {
			return nil, nil
		}
		return nil, s.keepLog("a log stood beside the store that is not its own")
	}
	if _, err := os.Lstat(s.logPath + lostSuffix); err != nil {
		return nil, fmt.Errorf("%w. The store was not closed, so what was recorded in the second before may be in its log alone, %s. "+
			"Put that file back as it was, with the store of the same moment. If it is lost, say so as meshca's user, touch %s, and the CA "+
			"starts without what is missing; those serials are in the audit log", why, s.logPath, s.logPath+lostSuffix)
	}
	var groups []group
	if found.head.id == k.id {
		groups = found.groups // what comes before the gap
	}
	last := k.last
	if n := len(groups); n > 0 {
		last = groups[n-1].last
	}
	s.note("the store goes on without a part of its log, as %s says: the ledger ends at entry %d", s.logPath+lostSuffix, last)
	if found.file == nil {
		return groups, nil
	}
	if n := countBehind(found.file, walArea, last); n > 0 {
		s.note("the log that is kept has %d entries behind that which can be read; their indexes are given out again, and the audit log has what was issued", n)
	}
	return groups, s.keepLog("a part of the log cannot be read")
}

// keepLog gives what stands in the log's place a second name, that nothing has, and tells why.
func (s *Store) keepLog(why string) error {
	name := s.logPath + ".replaced-" + time.Now().UTC().Format("20060102T150405Z")
	aside := name
	for i := 2; ; i++ {
		err := os.Link(s.logPath, aside)
		switch {
		case err == nil:
			s.note("%s: it is kept as %s", why, aside)
			return nil
		case !errors.Is(err, fs.ErrExist):
			return fmt.Errorf("%s, and it cannot be kept under another name (%w). Move it away, and start again", why, err)
		}
		aside = fmt.Sprintf("%s-%d", name, i)
	}
}

// errReplaced says that somebody has put other files in the place of an open store's.
var errReplaced = errors.New("the store's files were replaced while it is in use: restart the CA")

// ours says that what is called by the names of the store and its log is this store's; where there is no log, it is missed
// by nobody.
func (s *Store) ours() error {
	db, err := os.Stat(s.db.Path())
	if err != nil || !os.SameFile(db, s.opened) {
		return errors.Join(errReplaced, err)
	}
	log, err := os.Stat(s.logPath)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case s.own == nil || !os.SameFile(log, s.own):
		return errReplaced
	}
	return nil
}

// beginLog puts an empty log in place, behind the index base, and has the store know it. All that bbolt shows is durable.
func (s *Store) beginLog(base uint64) (*wal, error) {
	head := walHead{base: base}
	_, _ = rand.Read(head.id[:]) // it never fails
	err := s.db.View(func(tx *bbolt.Tx) error { copy(head.prev[:], tx.Bucket(bucketMeta).Get(keyLog)); return nil })
	if err != nil {
		return nil, err
	}
	if err := s.ours(); err != nil {
		return nil, err
	}
	file, err := createLog(s.logPath, head)
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(s.logPath)
	if s.own, err = file.Stat(); err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	err = s.writes.update(func(tx *bbolt.Tx) error {
		if err := tx.Bucket(bucketMeta).Put(keyLog, head.id[:]); err != nil {
			return err
		}
		return putSchema(tx, schemaLogged)
	})
	if err == nil { // it was said of what was lost until now
		err = gone(os.Remove(s.logPath + lostSuffix))
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &wal{file: file, size: walArea}, nil
}

func (s *Store) note(format string, args ...any) {
	s.notices = append(s.notices, fmt.Sprintf(format, args...))
}

// Notices say what Open did that somebody should know.
func (s *Store) Notices() []string { return s.notices }
