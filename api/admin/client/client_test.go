package client

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestOpenFaults(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]Fault{
		filepath.Join(dir, "none"): Absent, stale: Refused, file: NotASocket, dir: NotASocket, filepath.Join(file, "below"): Unreachable,
	} {
		c, err := Open(t.Context(), path)
		var e *Error
		if !errors.As(err, &e) || e.Fault != want || e.Socket != path || c != nil {
			t.Errorf("%s: %v (fault %d), want fault %d", path, err, e.Fault, want)
		}
	}
	ctx, stop := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer stop()
	var e *Error
	if _, err := Open(ctx, stale); !errors.As(err, &e) || e.Fault != NoAnswer {
		t.Errorf("too late: %v", err)
	}
}

// A connection that no call was made on is closed all the same.
func TestCloseUnused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	c, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	peer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	_ = peer.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := peer.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("still open: %v", err)
	}
}
