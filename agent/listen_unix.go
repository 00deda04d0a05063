//go:build unix

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

// bind makes the socket file with mode 0600 whatever the umask is: on Linux it takes the mode that the socket itself
// has when it is bound (unix_bind_bsd), so there is no moment in which it is open to others.
func bind(path string) (*net.UnixListener, error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		if err := raw.Control(func(fd uintptr) { failed = syscall.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return failed
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	unix, ok := l.(*net.UnixListener)
	if !ok {
		_ = l.Close()
		return nil, fmt.Errorf("%T is no unix listener", l)
	}
	return unix, nil
}

// errLocked is what lockFile says when another process has the lock.
var errLocked = errors.New("another process holds the lock")

// lockFile makes a file of mode 0600, if need be, and locks it for as long as this process lives or until unlock. A file
// that its last holder removed meanwhile locks nothing: then it is made anew.
func lockFile(path string, wait time.Duration) (unlock func(), err error) {
	for deadline := time.Now().Add(wait); ; time.Sleep(50 * time.Millisecond) {
		f, err := tryLock(path)
		switch {
		case err == nil:
			return func() { _ = f.Close() }, nil
		case !errors.Is(err, errLocked) || time.Now().After(deadline):
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
}

func tryLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = errLocked
	}
	if err == nil {
		held, statErr := f.Stat()
		there, lstatErr := os.Lstat(path)
		if err = errors.Join(statErr, lstatErr); errors.Is(err, os.ErrNotExist) || err == nil && !os.SameFile(held, there) {
			err = errLocked // by who has just removed it
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}
