package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// newLog returns the daemon's log: JSON lines.
func newLog(w io.Writer, level string) (*slog.Logger, error) {
	l, err := logLevel(level)
	if err != nil {
		return nil, err
	}
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: l})), nil
}

func logLevel(s string) (slog.Level, error) {
	switch strings.ToLower(s) {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("logLevel: %q is none of debug, info, warn, error", s)
}

// auditFile appends audit lines to a file, and opens it anew on SIGHUP, after logrotate moved it away.
type auditFile struct {
	path   string
	hangup chan os.Signal
	mu     sync.Mutex
	file   *os.File
}

// openAuditFile takes SIGHUP from here until close: logrotate may send it while the CA still starts, or drains, and nobody's
// listening would end the process.
func openAuditFile(path string) (*auditFile, error) {
	a := &auditFile{path: path, hangup: make(chan os.Signal, 1)}
	if err := a.reopen(); err != nil {
		return nil, err
	}
	signal.Notify(a.hangup, syscall.SIGHUP)
	return a, nil
}

func (a *auditFile) reopen() error {
	f, err := openPrivate(a.path)
	if err != nil {
		return fmt.Errorf("audit.file: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.file != nil {
		_ = a.file.Close()
	}
	a.file = f
	return nil
}

// openPrivate opens a file to append to it, or makes it with mode 0600. It refuses one that others can use, and a symlink:
// whoever may change that would choose which file the CA writes to.
func openPrivate(path string) (*os.File, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	case err != nil:
		return nil, err
	case info.Mode()&fs.ModeSymlink != 0:
		return nil, fmt.Errorf("%s is a symlink: name the file that it leads to", path)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no regular file", path)
	case info.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("%s has mode %04o: others could read or change the record of who got which identity. Run: chmod 600 %s",
			path, info.Mode().Perm(), path)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	if opened, err := f.Stat(); err != nil || !os.SameFile(info, opened) {
		_ = f.Close()
		return nil, errors.Join(fmt.Errorf("%s was replaced while it was opened", path), err)
	}
	return f, nil
}

// Write appends one line.
func (a *auditFile) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.file.Write(p)
}

func (a *auditFile) close() error {
	signal.Stop(a.hangup)
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.file.Close()
}

func (a *auditFile) reopenOnHangup(ctx context.Context, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.hangup:
			if err := a.reopen(); err != nil {
				log.Error("the audit log could not be opened anew; it goes on in the old file", "err", err)
			}
		}
	}
}

// replaceFile swaps a file's content as a whole: a reader sees the old one or the new one.
func replaceFile(path string, data []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // gone after a rename
	if _, err = f.Write(data); err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if closing := f.Close(); err == nil {
		err = closing
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
