package bolt

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// openForeign opens a file that may be damaged anywhere, and viewForeign reads it: bbolt says so by panicking, and the
// kernel by a fault where the file is shorter than it says.
func openForeign(path string, o *bbolt.Options) (db *bbolt.DB, err error) {
	defer damaged(&err)()
	return bbolt.Open(path, 0o600, o)
}

func viewForeign(db *bbolt.DB, fn func(*bbolt.Tx) error) (err error) {
	defer damaged(&err)()
	return db.View(fn)
}

var errDamaged = errors.New("it is damaged")

func damaged(err *error) func() {
	before := debug.SetPanicOnFault(true)
	return func() {
		debug.SetPanicOnFault(before)
		if p := recover(); p != nil {
			*err = fmt.Errorf("%w: %v", errDamaged, p)
		}
	}
}

// openFailed says what to do about a store that cannot be opened.
func openFailed(path string, err error) error {
	cut := errors.Is(err, bolterrors.ErrInvalid) || errors.Is(err, bolterrors.ErrChecksum) || strings.Contains(err.Error(), "file size too small")
	if cut || errors.Is(err, errDamaged) {
		return fmt.Errorf("opening the store %s: %w. Keep a copy of it for whoever looks into it, and put a backup in its place: "+
			"`meshca restore --config FILE --replace --accept-rollback BACKUP`", path, err)
	}
	return fmt.Errorf("opening the store %s: %w", path, err)
}

// letGo closes a locked file of which more may be left in this process, such as a mapping: that would keep the lock.
func letGo(f *os.File) error {
	return errors.Join(unix.Flock(int(f.Fd()), unix.LOCK_UN), f.Close())
}
