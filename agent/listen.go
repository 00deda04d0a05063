package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

// maxSocketPath is sun_path of unix(7) without its final NUL.
const maxSocketPath = 107

// socket is a unix listener that knows which file it made, so that closing it never removes another's.
type socket struct {
	*net.UnixListener
	path string
	file os.FileInfo
}

// checkSocketPath looks at the path alone.
func checkSocketPath(path string) error {
	switch {
	case path == "":
		return refusal.New(refusal.SocketPath, "the path is empty")
	case strings.ContainsRune(path, 0):
		return refusal.New(refusal.SocketPath, "the path holds a NUL")
	case path[0] == '@':
		return refusal.New(refusal.SocketPath, "%s would be an abstract socket, which has neither mode nor owner", path)
	case len(path) > maxSocketPath:
		return refusal.New(refusal.SocketPath, "the path is %d bytes long, at most %d fit: %s", len(path), maxSocketPath, path)
	}
	return nil
}

// listen opens a unix socket that nobody but those whom mode and owner name can ever connect to. A stale socket of ours
// is replaced; whatever else stands there is left alone and refused: SOCKET_PATH, SOCKET_IN_USE, SOCKET_UNSAFE_DIRECTORY.
func listen(path string, mode fs.FileMode, uid, gid *int) (*socket, error) {
	if err := checkSocketPath(path); err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil { // others must reach their own socket through it
		return nil, refusal.New(refusal.SocketPath, "its directory cannot be made: %w", err)
	}
	if err := checkDir(dir); err != nil {
		return nil, err
	}
	if err := clearStale(path); err != nil {
		return nil, err
	}
	l, err := bind(path)
	if err != nil {
		return nil, refusal.New(refusal.SocketPath, "%w", err)
	}
	l.SetUnlinkOnClose(false)
	s := &socket{UnixListener: l, path: path}
	if s.file, err = os.Lstat(path); err == nil {
		err = handOver(path, mode, uid, gid)
	}
	if err != nil {
		_ = s.Close()
		return nil, refusal.New(refusal.SocketPath, "its mode and owner cannot be set: %w", err)
	}
	return s, nil
}

// Listen opens a unix socket for its owner alone, for a Source that is called through one. A stale one is replaced.
func Listen(path string) (net.Listener, error) {
	s, err := listen(path, 0o600, nil, nil)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Socket is a unix socket that a Source listens at, for others than the agent.
type Socket struct{ s *socket }

// ListenAt opens a unix socket of this mode, as those of workloads are opened. A stale one is replaced.
func ListenAt(path string, mode fs.FileMode) (*Socket, error) {
	s, err := listen(path, mode, nil, nil)
	if err != nil {
		return nil, err
	}
	return &Socket{s}, nil
}

// TakeAt is ListenAt for a directory that is ours alone, where nothing else of ours listens. Another socket in its place, or a
// symbolic link, is taken away: whoever put it there answers in our name. other says what it was; nil: there was none.
func TakeAt(path string, mode fs.FileMode) (s *Socket, other, err error) {
	s, err = ListenAt(path, mode)
	if err == nil || !alone(filepath.Dir(path)) {
		return s, nil, err
	}
	info, stat := os.Lstat(path)
	if stat != nil || info.Mode()&(fs.ModeSocket|fs.ModeSymlink) == 0 {
		return nil, nil, err // a file could be anybody's
	}
	other = err
	if err := os.Remove(path); err != nil {
		return nil, other, refusal.New(refusal.SocketPath, "what stands there cannot be removed: %w", err)
	}
	s, err = ListenAt(path, mode)
	return s, other, err
}

// alone reports whether nobody but the agent and root can put anything into a directory, by the node's own file system.
func alone(dir string) bool {
	info, err := os.Lstat(dir)
	return err == nil && info.IsDir() && looseness(info) == "" && info.Mode().Perm()&0o022 == 0
}

// Listener is the socket's. Close it by Socket.Close, which removes the file, too.
func (s *Socket) Listener() *net.UnixListener { return s.s.UnixListener }

// Intact reports whether the path still leads to this socket.
func (s *Socket) Intact() bool { return s.s.intact() }

// Close ends it.
func (s *Socket) Close() error { return s.s.Close() }

// owners are the arguments of chown(2): -1 leaves one as it is.
func owners(uid, gid *int) (u, g int) {
	u, g = -1, -1
	if uid != nil {
		u = *uid
	}
	if gid != nil {
		g = *gid
	}
	return u, g
}

// Close stops listening and removes the socket file, if it is still the one that was made.
func (s *socket) Close() error {
	if s.intact() {
		_ = os.Remove(s.path)
	}
	return s.UnixListener.Close()
}

// intact reports whether the path still leads to this socket.
func (s *socket) intact() bool {
	if s.file == nil {
		return false
	}
	now, err := os.Lstat(s.path)
	return err == nil && os.SameFile(now, s.file)
}

// checkDir refuses a directory in which others could put another socket in the place of ours.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return refusal.New(refusal.SocketPath, "%w", err)
	}
	if !info.IsDir() {
		return refusal.New(refusal.SocketPath, "%s is not a directory", dir)
	}
	if fault := looseness(info); fault != "" {
		return refusal.New(refusal.SocketUnsafeDir, "others can replace what lies in %s: %s", dir, fault)
	}
	return nil
}

// looseAbove finds the nearest directory above dir that others can write to: there dir as a whole could be replaced.
// That is the machine's fault rather than the socket's, so it is told and not refused.
func looseAbove(dir string) string {
	resolved, err := filepath.EvalSymlinks(dir)
	if err == nil {
		resolved, err = filepath.Abs(resolved)
	}
	if err != nil {
		return ""
	}
	for parent := filepath.Dir(resolved); parent != resolved; resolved, parent = parent, filepath.Dir(parent) {
		if info, err := os.Stat(parent); err == nil && looseness(info) != "" {
			return parent
		}
	}
	return ""
}

// looseness says why others than the agent and root can replace what lies in a directory; empty: nobody can. In a
// sticky directory (/tmp) only the owners of a file and of the directory can.
func looseness(info fs.FileInfo) string {
	if owner, us := ownerOf(info), os.Geteuid(); owner != 0 && owner != us {
		return fmt.Sprintf("it belongs to uid %d, this agent is uid %d", owner, us)
	}
	if info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
		return fmt.Sprintf("mode %v", info.Mode())
	}
	return ""
}

// clearStale removes a socket of ours that nobody answers at, and nothing else.
func clearStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return refusal.New(refusal.SocketPath, "%w", err)
	case info.Mode()&fs.ModeSymlink != 0:
		return refusal.New(refusal.SocketPath, "%s is a symbolic link", path)
	case info.Mode()&fs.ModeSocket == 0:
		return refusal.New(refusal.SocketPath, "%s is a file that is no socket (%v)", path, info.Mode())
	}
	conn, err := net.DialTimeout("unix", path, time.Second) //nolint:noctx // a second bounds it
	if err == nil {
		_ = conn.Close()
		return refusal.New(refusal.SocketInUse, "something answers at %s", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return refusal.New(refusal.SocketInUse, "whether something answers at %s cannot be told: %w", path, err)
	}
	if owner, us := ownerOf(info), os.Geteuid(); us != 0 && owner != us {
		return refusal.New(refusal.SocketPath, "the stale socket %s belongs to uid %d, this agent is uid %d", path, owner, us)
	}
	if err := os.Remove(path); err != nil {
		return refusal.New(refusal.SocketPath, "a stale socket cannot be removed: %w", err)
	}
	return nil
}

func ownerOf(info fs.FileInfo) int {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}
