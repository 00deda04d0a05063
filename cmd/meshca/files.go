package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/meshca/meshca/ca"
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
	path string
	mu   sync.Mutex
	file *os.File
}

func openAuditFile(path string) (*auditFile, error) {
	a := &auditFile{path: path}
	return a, a.reopen()
}

func (a *auditFile) reopen() error {
	f, err := os.OpenFile(a.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
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

// Write appends one line.
func (a *auditFile) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.file.Write(p)
}

func (a *auditFile) close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.file.Close()
}

func (a *auditFile) reopenOnHangup(ctx context.Context, log *slog.Logger) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangup:
			if err := a.reopen(); err != nil {
				log.Error("the audit log could not be opened anew; it goes on in the old file", "err", err)
			}
		}
	}
}

// keepBundleFile keeps the file equal to the trust bundle until ctx ends.
func keepBundleFile(ctx context.Context, path string, trust *ca.Trust, log *slog.Logger) {
	for {
		bundle, stale := trust.Bundle()
		data, err := bundle.Marshal()
		if err == nil {
			err = replaceFile(path, data, 0o644)
		}
		if err != nil {
			log.Error("the bundle file could not be written", "file", path, "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-stale:
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
