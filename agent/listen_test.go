package agent

import (
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/meshca/meshca/api/refusal"
)

// shortDir is a directory whose path leaves room for a socket's name.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ag")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestListenRefuses(t *testing.T) {
	cases := map[string]struct {
		prepare func(t *testing.T, dir string) (path string)
		want    refusal.Reason
	}{
		"an existing file": {func(t *testing.T, dir string) string {
			must(t, os.WriteFile(filepath.Join(dir, "s"), []byte("precious"), 0o600))
			return filepath.Join(dir, "s")
		}, refusal.SocketPath},
		"a directory": {func(t *testing.T, dir string) string {
			must(t, os.Mkdir(filepath.Join(dir, "s"), 0o700))
			return filepath.Join(dir, "s")
		}, refusal.SocketPath},
		"a symlink to a stale socket": {func(t *testing.T, dir string) string {
			staleSocket(t, filepath.Join(dir, "real"))
			must(t, os.Symlink(filepath.Join(dir, "real"), filepath.Join(dir, "s")))
			return filepath.Join(dir, "s")
		}, refusal.SocketPath},
		"a dangling symlink": {func(t *testing.T, dir string) string {
			must(t, os.Symlink(filepath.Join(dir, "nowhere"), filepath.Join(dir, "s")))
			return filepath.Join(dir, "s")
		}, refusal.SocketPath},
		"a live second agent": {func(t *testing.T, dir string) string {
			s, err := listen(filepath.Join(dir, "s"), 0o600, nil, nil)
			must(t, err)
			t.Cleanup(func() { _ = s.Close() })
			return filepath.Join(dir, "s")
		}, refusal.SocketInUse},
		"a world-writable directory": {func(t *testing.T, dir string) string {
			must(t, os.Chmod(dir, 0o777))
			return filepath.Join(dir, "s")
		}, refusal.SocketUnsafeDir},
		"a group-writable directory": {func(t *testing.T, dir string) string {
			must(t, os.Chmod(dir, 0o770))
			return filepath.Join(dir, "s")
		}, refusal.SocketUnsafeDir},
		"a directory of someone else": {func(t *testing.T, dir string) string {
			if os.Geteuid() != 0 {
				t.Skip("needs root to give a directory away")
			}
			must(t, os.Chown(dir, 12345, 12345))
			return filepath.Join(dir, "s")
		}, refusal.SocketUnsafeDir},
		"a link to a world-writable directory": {func(t *testing.T, dir string) string {
			must(t, os.Mkdir(filepath.Join(dir, "d"), 0o700))
			must(t, os.Chmod(filepath.Join(dir, "d"), 0o777))
			must(t, os.Symlink(filepath.Join(dir, "d"), filepath.Join(dir, "l")))
			return filepath.Join(dir, "l", "s")
		}, refusal.SocketUnsafeDir},
		"a sticky world-writable directory of someone else": {func(t *testing.T, dir string) string {
			if os.Geteuid() != 0 {
				t.Skip("needs root to give a directory away")
			}
			must(t, os.Chmod(dir, 0o777|fs.ModeSticky))
			must(t, os.Chown(dir, 12345, 12345))
			return filepath.Join(dir, "s")
		}, refusal.SocketUnsafeDir},
		"a file for a directory": {func(t *testing.T, dir string) string {
			must(t, os.WriteFile(filepath.Join(dir, "f"), nil, 0o600))
			return filepath.Join(dir, "f", "s")
		}, refusal.SocketPath},
		"a path too long": {func(_ *testing.T, dir string) string {
			return filepath.Join(dir, strings.Repeat("s", maxSocketPath-len(dir)))
		}, refusal.SocketPath},
		"an abstract socket": {func(*testing.T, string) string { return "@meshca" }, refusal.SocketPath},
		"a NUL":              {func(_ *testing.T, dir string) string { return dir + "/a\x00b" }, refusal.SocketPath},
		"nothing":            {func(*testing.T, string) string { return "" }, refusal.SocketPath},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			path := c.prepare(t, shortDir(t))
			before, beforeErr := os.Lstat(path)
			s, err := listen(path, 0o600, nil, nil)
			if err == nil {
				_ = s.Close()
				t.Fatal("was taken")
			}
			if got := refusal.Of(err); got != c.want {
				t.Errorf("%v, want %s", err, c.want)
			}
			if after, err := os.Lstat(path); beforeErr == nil && (err != nil || !os.SameFile(before, after)) {
				t.Error("what stood there is gone")
			}
		})
	}
}

func TestLooseAbove(t *testing.T) {
	dir := shortDir(t)
	below := filepath.Join(dir, "a", "b")
	must(t, os.MkdirAll(below, 0o755))
	if got := looseAbove(below); got != "" {
		t.Errorf("found %s", got)
	}
	must(t, os.Chmod(dir, 0o777))
	if got := looseAbove(below); got != dir {
		t.Errorf("found %q, want %s", got, dir)
	}
	s, err := listen(filepath.Join(below, "s"), 0o600, nil, nil)
	must(t, err)
	must(t, s.Close())
}

func TestListenLongestPath(t *testing.T) {
	dir := shortDir(t)
	s, err := listen(filepath.Join(dir, strings.Repeat("s", maxSocketPath-len(dir)-1)), 0o600, nil, nil)
	must(t, err)
	must(t, s.Close())
}

func TestListenReplacesAStaleSocket(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	staleSocket(t, path)
	s, err := listen(path, 0o660, nil, nil)
	must(t, err)
	defer s.Close()
	conn, err := net.Dial("unix", path)
	must(t, err)
	_ = conn.Close()
	if info, _ := os.Lstat(path); info.Mode().Perm() != 0o660 {
		t.Errorf("mode %v", info.Mode())
	}
}

func TestListenInASharedStickyDirectory(t *testing.T) {
	dir := shortDir(t)
	must(t, os.Chmod(dir, 0o777|fs.ModeSticky))
	s, err := listen(filepath.Join(dir, "s"), 0o600, nil, nil)
	must(t, err)
	must(t, s.Close())
}

func TestListenSetsTheOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give a socket away")
	}
	uid, gid := 12345, 54321
	path := filepath.Join(shortDir(t), "s")
	s, err := listen(path, 0o640, &uid, &gid)
	must(t, err)
	defer s.Close()
	info, err := os.Lstat(path)
	must(t, err)
	st := info.Sys().(*syscall.Stat_t)
	if int(st.Uid) != uid || int(st.Gid) != gid || info.Mode().Perm() != 0o640 {
		t.Errorf("uid %d gid %d mode %v", st.Uid, st.Gid, info.Mode())
	}
}

// Who can write to the directory, as root in a pod that shares it, puts a link in the socket's place as often as he can. No file
// that it leads to is given away.
func TestListenGivesAwayNothingElse(t *testing.T) {
	dir, away := shortDir(t), t.TempDir()
	victim, path := filepath.Join(away, "victim"), filepath.Join(dir, "s")
	must(t, os.WriteFile(victim, nil, 0o600))
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		link := filepath.Join(dir, "link")
		for {
			select {
			case <-stop:
				return
			default:
				_ = os.Symlink(victim, link)
				_ = os.Rename(link, path)
			}
		}
	}()
	opened := 0
	for range 1500 {
		if s, _, err := TakeAt(path, 0o666); err == nil {
			opened++
			must(t, s.Close())
		}
		if info, err := os.Stat(victim); err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("the file behind the link: %v, %v", info.Mode(), err)
		}
	}
	close(stop)
	<-done
	_ = os.Remove(path)
	s, _, err := TakeAt(path, 0o666)
	must(t, err)
	defer s.Close()
	if info, err := os.Lstat(path); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("left alone, it has %v, %v", info.Mode(), err)
	}
	t.Log(opened, "opened amid that")
}

// Between bind and chmod nobody else may get in, whatever the umask.
func TestSocketsAreBornPrivate(t *testing.T) {
	before := syscall.Umask(0)
	defer syscall.Umask(before)
	path := filepath.Join(shortDir(t), "s")
	l, err := bind(path)
	must(t, err)
	defer l.Close()
	if info, _ := os.Lstat(path); info.Mode().Perm() != 0o600 {
		t.Errorf("born with mode %v", info.Mode())
	}
}

func TestCloseLeavesAnothersSocket(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	first, err := listen(path, 0o600, nil, nil)
	must(t, err)
	must(t, os.Remove(path))
	second, err := listen(path, 0o600, nil, nil)
	must(t, err)
	if first.intact() || !second.intact() {
		t.Error("who has the path is not told apart")
	}
	_ = first.Close()
	if !second.intact() {
		t.Error("closing the first removed the second's socket")
	}
	_ = second.Close()
	if _, err := os.Lstat(path); err == nil {
		t.Error("closing left the own socket")
	}
}

// staleSocket leaves a socket file that nobody listens at.
func staleSocket(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	must(t, err)
	l.SetUnlinkOnClose(false)
	must(t, l.Close())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// At its limit a listener waits for a connection to end. A socket that is gone must not wait with it.
func TestSocketThatIsGoneAtTheConnectionLimit(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	s, err := listen(path, 0o600, nil, nil)
	must(t, err)
	w := newWorkload(Workload{Socket: path}, nodeOf("n"), nil, &clock{now: machineClocks()}, slog.New(slog.DiscardHandler))
	server := grpc.NewServer()
	defer server.Stop()
	look, ended := make(chan time.Time), make(chan error, 1)
	go func() { ended <- w.accept(t.Context(), server, s, door{account{"s", 1, 1, ""}, newPlaces()}, look) }()
	for range 2 { // the second one waits to be accepted
		conn, err := net.Dial("unix", path)
		must(t, err)
		defer conn.Close()
	}
	time.Sleep(50 * time.Millisecond)
	must(t, os.Remove(path))
	look <- time.Now()
	select {
	case err := <-ended:
		if refusal.Of(err) != refusal.SocketPath {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("it waits for a connection to end")
	}
}
