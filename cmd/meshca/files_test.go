package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestAnAuditFileIsTheCAsAlone(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.log")
	line := func() {
		t.Helper()
		a, err := openAuditFile(path)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(a, "line")
		if err := a.close(); err != nil {
			t.Error(err)
		}
	}
	line()
	line()
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 || info.Size() != 10 {
		t.Errorf("two lines, mode 0600: got %v, %v", info, err)
	}
	refused := func(path, want string) {
		t.Helper()
		if _, err := openAuditFile(path); err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "audit.file: ") {
			t.Errorf("%s: got %v, want %q", path, err, want)
		}
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o602, 0o610} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		refused(path, fmt.Sprintf("%s has mode %04o", path, mode))
		refused(path, "Run: chmod 600 "+path)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	line()
	for name, to := range map[string]string{"link": path, "dangling": filepath.Join(dir, "nowhere")} {
		link := filepath.Join(dir, name)
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
		refused(link, "symlink")
	}
	if _, err := os.Lstat(filepath.Join(dir, "nowhere")); err == nil {
		t.Error("a symlink chose where a file was made")
	}
	refused(dir, "no regular file")
	refused(filepath.Join(dir, "absent", "audit.log"), "no such file")
}

// TestAHangupWhileTheCAStarts is not lost: logrotate does not know how far the start has come.
func TestAHangupWhileTheCAStarts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	a, err := openAuditFile(path)
	if err != nil {
		t.Fatal(err)
	}
	arrived := make(chan os.Signal, 1)
	signal.Notify(arrived, syscall.SIGHUP)
	defer signal.Stop(arrived)
	if err := errors.Join(os.Rename(path, path+".1"), syscall.Kill(os.Getpid(), syscall.SIGHUP)); err != nil {
		t.Fatal(err)
	}
	<-arrived
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); a.reopenOnHangup(ctx, slog.New(slog.DiscardHandler)) }()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Errorf("the file was not opened anew: %v", err)
			break
		}
	}
	stop()
	<-ended
	if err := a.close(); err != nil {
		t.Error(err)
	}
}
