package unixpeer

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test's own program, started again, plays the processes that connect: what it does is the value of roleKey.
const (
	roleKey   = "UNIXPEER_ROLE"
	socketKey = "UNIXPEER_SOCKET"
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleKey) {
	case "":
		os.Exit(m.Run())
	case "connect": // and stay
		playConnect()
		fmt.Println("connected")
		_, _ = io.Copy(io.Discard, os.Stdin)
	case "hand-over": // connect, leave the connection to a child, and end
		file := playConnect()
		child := exec.Command("/proc/self/exe")
		child.Env, child.ExtraFiles = []string{roleKey + "=sleep"}, []*os.File{file}
		play(child.Start())
		fmt.Println(child.Process.Pid)
	case "exec": // connect, and become another program
		file := playConnect()
		fd, err := unix.Dup(int(file.Fd())) // without close-on-exec
		play(err)
		fmt.Println("connected")
		play(syscall.Exec("/proc/self/exe", []string{"other", fmt.Sprint(fd)}, []string{roleKey + "=sleep"}))
	case "send": // connect, and pass the descriptor to whoever listens at the second socket
		file := playConnect()
		conn, err := net.Dial("unix", os.Getenv(socketKey)+".second")
		play(err)
		_, _, err = conn.(*net.UnixConn).WriteMsgUnix([]byte{1}, unix.UnixRights(int(file.Fd())), nil)
		play(err)
		fmt.Println("connected")
		_, _ = io.Copy(io.Discard, os.Stdin)
	case "sleep":
		time.Sleep(time.Minute)
	case "reuse":
		playReuse()
	case "blind":
		playBlind()
	}
}

// play ends a role that cannot go on.
func play(err error) {
	if err != nil {
		fmt.Println("fault:", err)
		os.Exit(1)
	}
}

// playConnect waits for a line, so that the process can be put into its place, and connects.
func playConnect() *os.File {
	_, err := bufio.NewReader(os.Stdin).ReadString('\n')
	play(err)
	conn, err := net.Dial("unix", os.Getenv(socketKey))
	play(err)
	file, err := conn.(*net.UnixConn).File()
	play(err)
	return file
}

// actor is a process in a role.
type actor struct {
	t     testing.TB
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines *bufio.Scanner
}

// start starts a role, which is ended with the test.
func start(t testing.TB, role, socket string, flags uintptr) *actor {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{roleKey + "=" + role, socketKey + "=" + socket}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Cloneflags: flags}
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // its children too
		_ = cmd.Wait()
	})
	return &actor{t, cmd, in, bufio.NewScanner(out)}
}

func (a *actor) pid() int { return a.cmd.Process.Pid }

// goOn lets it connect, and returns what it says then.
func (a *actor) goOn() string {
	a.t.Helper()
	_, err := io.WriteString(a.in, "go\n")
	must(a.t, err)
	return a.says()
}

func (a *actor) says() string {
	a.t.Helper()
	if !a.lines.Scan() || strings.HasPrefix(a.lines.Text(), "fault:") {
		a.t.Fatalf("a role: %q, %v", a.lines.Text(), a.lines.Err())
	}
	return a.lines.Text()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// groups is a real control group of this machine, below which pods are made as a kubelet does.
type groups struct {
	t    testing.TB
	dir  string // in the file system
	root string // as /proc/PID/cgroup has it
}

// newGroups skips the test where the machine lets nobody make control groups.
func newGroups(t testing.TB) *groups {
	t.Helper()
	hierarchy, own := "/sys/fs/cgroup", ""
	text, err := os.ReadFile("/proc/self/cgroup")
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if parts := strings.SplitN(strings.TrimSpace(line), ":", 3); len(parts) == 3 && (parts[1] == "pids" || own == "" && parts[0] == "0") {
			own = parts[2]
			if parts[1] == "pids" {
				hierarchy = "/sys/fs/cgroup/pids"
			}
		}
	}
	name := fmt.Sprintf("meshca-unixpeer-%d-%d", os.Getpid(), time.Now().UnixNano())
	g := &groups{t, filepath.Join(hierarchy, own, name), filepath.Join("/", own, name)}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		t.Skipf("SKIPPED: control groups cannot be made here (%v): run it as root", err)
	}
	t.Cleanup(func() {
		for range 200 {
			if removeAll(g.dir) == nil {
				return
			}
			time.Sleep(20 * time.Millisecond) // those that were killed are on their way
		}
		t.Errorf("%s cannot be removed", g.dir)
	})
	return g
}

// removeAll removes a cgroup with those below it; its files go with it.
func removeAll(dir string) error {
	below, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range below {
		if e.IsDir() {
			if err := removeAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.Remove(dir)
}

// put moves a process into a container of a pod, or into what that has below it.
func (g *groups) put(pid int, uid string, below ...string) {
	g.t.Helper()
	dir := filepath.Join(append([]string{g.dir, "kubepods", "burstable", "pod" + uid, id}, below...)...)
	must(g.t, os.MkdirAll(dir, 0o755))
	must(g.t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0))
}

// site is a socket with a listener.
type site struct {
	*Listener
	socket  string
	refused chan error
}

func newSite(t testing.TB, root string, withoutPidfd bool) *site {
	t.Helper()
	dir, err := os.MkdirTemp("", "peer")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &site{socket: filepath.Join(dir, "s"), refused: make(chan error, 100)}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.socket, Net: "unix"})
	must(t, err)
	s.Listener, err = New(l, Config{CgroupRoot: root, Refused: func(err error) { s.refused <- err }, withoutPidfd: withoutPidfd})
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// next is whose connection comes next, or why it was sent away.
func (s *site) next(t testing.TB) (string, error) {
	t.Helper()
	type answer struct {
		pod string
		err error
	}
	got := make(chan answer, 1)
	go func() {
		conn, pod, err := s.Accept()
		if err == nil {
			defer conn.Close()
		}
		got <- answer{pod, err}
	}()
	select {
	case a := <-got:
		must(t, a.err)
		return a.pod, nil
	case err := <-s.refused:
		must(t, s.listener.SetDeadline(time.Unix(1, 0)))
		_ = s.Close()
		<-got
		return "", err
	case <-time.After(20 * time.Second):
		t.Fatal("nobody came")
		return "", nil
	}
}
