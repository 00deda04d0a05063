package admin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

// socketMode lets the CA's own user in, and root.
const socketMode fs.FileMode = 0o600

// maxSocketPath is what sockaddr_un holds, without its final NUL (unix(7)).
const maxSocketPath = 107

// Listen opens the admin socket, and makes its directory where that alone is missing, as it is in a container. A stale
// socket of a CA that is gone is replaced; a file, a symlink, a socket that someone answers at and a directory in which
// anyone could put another socket are refused, each with its reason.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, refusal.New(refusal.SocketPath, "%.40s... has %d bytes, a socket's path at most %d", path, len(path), maxSocketPath)
	}
	if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, refusal.New(refusal.SocketPath, "the directory of %s: %w", path, err)
	}
	dir, err := os.Stat(filepath.Dir(path))
	switch {
	case err != nil:
		return nil, refusal.New(refusal.SocketPath, "the directory of %s: %w", path, err)
	case dir.Mode()&0o002 != 0:
		return nil, refusal.New(refusal.SocketUnsafeDir, "%s has mode %s", filepath.Dir(path), dir.Mode())
	}
	if err := makeRoom(ctx, path); err != nil {
		return nil, err
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// The socket takes its mode from the descriptor when it is bound, so it is never open to more.
		var failed error
		if err := c.Control(func(fd uintptr) { failed = syscall.Fchmod(int(fd), uint32(socketMode)) }); err != nil {
			return err
		}
		return failed
	}}
	l, err := config.Listen(ctx, "unix", path)
	if err != nil {
		return nil, refusal.New(refusal.SocketPath, "%s: %w", path, err)
	}
	if err := os.Chmod(path, socketMode); err != nil {
		_ = l.Close()
		return nil, refusal.New(refusal.SocketPath, "%s: %w", path, err)
	}
	return &limited{Listener: l, slots: make(chan struct{}, maxConnections)}, nil
}

// makeRoom takes a stale socket away: one that nobody answers at.
func makeRoom(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return refusal.New(refusal.SocketPath, "%s: %w", path, err)
	case info.Mode().Type() != fs.ModeSocket:
		return refusal.New(refusal.SocketPath, "%s is there and is no socket (%s)", path, info.Mode())
	}
	dialer := net.Dialer{Timeout: time.Second}
	conn, err := dialer.DialContext(ctx, "unix", path)
	if err == nil {
		_ = conn.Close()
		return refusal.New(refusal.SocketInUse, "another process answers at %s", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return refusal.New(refusal.SocketPath, "whether the socket at %s is stale is not known: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return refusal.New(refusal.SocketPath, "the stale socket: %w", err)
	}
	return nil
}

// limited accepts at most as many connections at a time as it has slots.
type limited struct {
	net.Listener
	slots chan struct{}
}

// Accept closes what comes over the limit: an operator sees an error rather than a command that hangs.
func (l *limited) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		socket, ok := conn.(*net.UnixConn)
		if !ok {
			_ = conn.Close()
			return nil, fmt.Errorf("%T is no unix socket", conn)
		}
		select {
		case l.slots <- struct{}{}:
			return &counted{UnixConn: socket, free: sync.OnceFunc(func() { <-l.slots })}, nil
		default:
			_ = conn.Close()
		}
	}
}

// counted gives its slot back when it is closed. It stays a syscall.Conn, so that the peer can be asked for.
type counted struct {
	*net.UnixConn
	free func()
}

func (c *counted) Close() error {
	defer c.free()
	return c.UnixConn.Close()
}
