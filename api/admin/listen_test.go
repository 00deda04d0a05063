package admin

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.sock")
	l, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 || info.Mode().Type() != os.ModeSocket {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	_, err = Listen(t.Context(), path)
	wantReason(t, err, refusal.SocketInUse)

	// Left behind by a process that is gone.
	unix, ok := l.(*limited).Listener.(*net.UnixListener)
	if !ok {
		t.Fatal("no unix listener")
	}
	unix.SetUnlinkOnClose(false)
	_ = l.Close()
	l, err = Listen(t.Context(), path)
	if err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	_ = l.Close()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]refusal.Reason{
		file: refusal.SocketPath, link: refusal.SocketPath, dir: refusal.SocketPath, filepath.Join(dir, "none", "at-all", "a.sock"): refusal.SocketPath,
		filepath.Join(dir, strings.Repeat("x", 107)): refusal.SocketPath, filepath.Join(open, "a.sock"): refusal.SocketUnsafeDir,
	} {
		_, err := Listen(t.Context(), path)
		if got := refusal.Of(err); got != want {
			t.Errorf("%s: %v, want %s", path, err, want)
		}
	}
	made, err := Listen(t.Context(), filepath.Join(dir, "made", "a.sock"))
	if err != nil {
		t.Fatalf("where the socket's own directory is missing: %v", err)
	}
	_ = made.Close()
	if info, err := os.Stat(filepath.Join(dir, "made")); err != nil || info.Mode().Perm()&0o022 != 0 {
		t.Errorf("its directory is %v, %v", info, err)
	}
}

// Connections over the limit are closed at once, and the slots come back.
func TestListenLimit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.sock")
	l, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 2*maxConnections)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	var clients []net.Conn
	for range maxConnections {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		clients = append(clients, c)
	}
	var held []net.Conn
	for range clients {
		held = append(held, <-accepted)
	}
	over, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer over.Close()
	if _, err := over.Read(make([]byte, 1)); err == nil {
		t.Error("a connection over the limit was kept")
	}
	_ = held[0].Close()
	_ = held[0].Close() // twice gives one slot back
	again, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	select {
	case <-accepted:
	case <-time.After(5 * time.Second):
		t.Error("the slot did not come back")
	}
}
