package unixpeer

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/api/refusal"
)

// is fails unless the next connection is that pod's, or was refused so.
func (s *site) is(t *testing.T, what, pod string, no refusal.Reason) {
	t.Helper()
	if got, err := s.next(t); got != pod || refusal.Of(err) != no {
		t.Errorf("%s: got %q, %v; want %q, %s", what, got, err, pod, no)
	}
}

func inBothWays(t *testing.T, f func(t *testing.T, g *groups, withoutPidfd bool)) {
	for _, without := range []bool{false, true} {
		t.Run(map[bool]string{false: "pidfd", true: "older kernel"}[without], func(t *testing.T) { f(t, newGroups(t), without) })
	}
}

// old waits until a process that runs is old enough to be believed without a pidfd of the socket's own.
func (s *site) old() {
	time.Sleep(3 * tick)
	s.look()
}

func TestAProcessInAPod(t *testing.T) {
	inBothWays(t, func(t *testing.T, g *groups, without bool) {
		s := newSite(t, g.root, without)
		a := start(t, "connect", s.socket, 0)
		g.put(a.pid(), uidA)
		s.old()
		a.goOn()
		s.is(t, "a pod's process", uidA, "")
	})
}

func TestAProcessOfTheHost(t *testing.T) {
	inBothWays(t, func(t *testing.T, g *groups, without bool) {
		s := newSite(t, g.root, without)
		a := start(t, "connect", s.socket, 0)
		s.old()
		a.goOn()
		s.is(t, "no pod's process", "", refusal.PeerNotInPod)
	})
}

// A container that makes control groups below its own cannot take another pod's name.
func TestANestedGroupOfAnothersName(t *testing.T) {
	inBothWays(t, func(t *testing.T, g *groups, without bool) {
		s := newSite(t, g.root, without)
		a := start(t, "connect", s.socket, 0)
		g.put(a.pid(), uidA, "kubepods", "burstable", "pod"+uidB, id)
		s.old()
		a.goOn()
		s.is(t, "a nested group", uidA, "")
	})
}

// What a process becomes stays in its pod.
func TestExecAfterConnect(t *testing.T) {
	inBothWays(t, func(t *testing.T, g *groups, without bool) {
		s := newSite(t, g.root, without)
		a := start(t, "exec", s.socket, 0)
		g.put(a.pid(), uidA)
		s.old()
		a.goOn()
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) { // until it is another program
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", a.pid()))
			if strings.HasPrefix(string(line), "other") {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("it is still %q", line)
			}
		}
		s.is(t, "after exec", uidA, "")
	})
}

// A descriptor that is passed on stays whose it was: the receiver gets what the sender could have told it.
func TestAPassedDescriptor(t *testing.T) {
	inBothWays(t, func(t *testing.T, g *groups, without bool) {
		s := newSite(t, g.root, without)
		second, err := net.Listen("unix", s.socket+".second")
		must(t, err)
		defer second.Close()
		a := start(t, "send", s.socket, 0) // we receive it, and are in no pod
		g.put(a.pid(), uidA)
		s.old()
		a.goOn()
		conn, err := second.Accept()
		must(t, err)
		defer conn.Close()
		rights := make([]byte, 64)
		_, n, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(make([]byte, 1), rights)
		must(t, err)
		if n == 0 {
			t.Fatal("no descriptor came")
		}
		s.is(t, "passed on", uidA, "")
	})
}

// Who connected and ended is nobody, whoever has the connection now.
func TestWhoConnectedHasEnded(t *testing.T) {
	inBothWays(t, func(t *testing.T, g *groups, without bool) {
		s := newSite(t, g.root, without)
		a := start(t, "hand-over", s.socket, 0)
		g.put(a.pid(), uidA)
		s.old()
		child, err := strconv.Atoi(a.goOn())
		must(t, err)
		g.put(child, uidB) // holds the connection, in another pod
		must(t, a.cmd.Wait())
		s.is(t, "it has ended", "", refusal.PeerUnknown)
	})
}

// A zombie is no process either.
func TestWhoConnectedIsAZombie(t *testing.T) {
	inBothWays(t, func(t *testing.T, g *groups, without bool) {
		s := newSite(t, g.root, without)
		a := start(t, "connect", s.socket, 0)
		g.put(a.pid(), uidA)
		s.old()
		a.goOn()
		must(t, a.cmd.Process.Kill())
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", a.pid()))
			if strings.Contains(string(stat), ") Z ") {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("it is %q", stat)
			}
		}
		// Its last threads may be on their way out still; it has left its control group then.
		if pod, err := s.next(t); pod != "" || refusal.Of(err) != refusal.PeerUnknown && refusal.Of(err) != refusal.PeerNotInPod {
			t.Errorf("a zombie: got %q, %v", pod, err)
		}
	})
}

// Namespaces of a process's own change nothing of what the host sees of it.
func TestForeignNamespaces(t *testing.T) {
	inBothWays(t, func(t *testing.T, g *groups, without bool) {
		s := newSite(t, g.root, without)
		a := start(t, "connect", s.socket, unix.CLONE_NEWPID|unix.CLONE_NEWNS|unix.CLONE_NEWNET|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC|unix.CLONE_NEWCGROUP)
		g.put(a.pid(), uidA)
		s.old()
		a.goOn()
		s.is(t, "in namespaces of its own", uidA, "")
	})
}

// An agent without hostPID sees nobody, and says so.
func TestAnAgentThatSeesNoProcesses(t *testing.T) {
	g := newGroups(t)
	dir, err := os.MkdirTemp("", "peer")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	blind := start(t, "blind", socket, unix.CLONE_NEWPID)
	if blind.says() != "listens" {
		t.Fatal("it does not listen")
	}
	a := start(t, "connect", socket, 0)
	g.put(a.pid(), uidA)
	a.goOn()
	if got := blind.says(); !strings.Contains(got, "PEER_UNKNOWN") || !strings.Contains(got, "turns on hostPID") {
		t.Errorf("it says %q", got)
	}
}

// playBlind is an agent in a pid namespace of its own.
func playBlind() {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: os.Getenv(socketKey), Net: "unix"})
	play(err)
	listener, err := New(l, Config{Refused: func(err error) {
		e, _ := refusal.From(err)
		fmt.Println(err, "turns on", e.Claim)
		os.Exit(0)
	}})
	play(err)
	fmt.Println("listens")
	_, pod, err := listener.Accept()
	fmt.Println("accepted", pod, err)
}

// Without a pidfd of the socket's own a process must be older than its connection can be; then it is believed.
func TestAYoungProcessComesAgain(t *testing.T) {
	g := newGroups(t)
	s := newSite(t, g.root, true)
	a := start(t, "connect", s.socket, 0)
	g.put(a.pid(), uidA)
	a.goOn() // nobody has looked at the queue since it began
	got, err := s.next(t)
	if got != "" || refusal.Of(err) != refusal.PeerUnknown || !strings.Contains(err.Error(), "younger") {
		t.Fatalf("got %q, %v", got, err)
	}
	s = newSite(t, g.root, true)
	b := start(t, "connect", s.socket, 0)
	g.put(b.pid(), uidA)
	pods := make(chan string, 1)
	go func() {
		conn, pod, err := s.Accept() // which looks at the queue by itself
		if err == nil {
			defer conn.Close()
		}
		pods <- pod
	}()
	time.Sleep(3 * emptyEvery)
	b.goOn()
	if got := <-pods; got != uidA {
		t.Errorf("got %q", got)
	}
}

// A process id that is used again, in another pod, while the connection waits: the worst case, made for sure by setting the
// kernel's counter in a pid namespace of the test's own.
func TestAPIDThatIsUsedAgain(t *testing.T) {
	for _, way := range []string{"pidfd", "older kernel"} {
		t.Run(way, func(t *testing.T) {
			got := notAgain
			for try := 0; got == notAgain && try < 20; try++ {
				g := newGroups(t)
				got = start(t, "reuse", way+"\n"+g.dir+"\n"+g.root, unix.CLONE_NEWPID|unix.CLONE_NEWNS).says()
			}
			if !strings.HasPrefix(got, "refused PEER_UNKNOWN") {
				t.Errorf("the pod whose process has the number now: %s", got)
			}
		})
	}
}

// notAgain is said when a thread of Go's took the number first, which then stays its own.
const notAgain = "the number was not given again"

func playReuse() {
	args := strings.Split(os.Getenv(socketKey), "\n")
	play(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	play(unix.Mount("proc", "/proc", "proc", 0, ""))
	dir, err := os.MkdirTemp("", "peer")
	play(err)
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	play(err)
	listener, err := New(l, Config{CgroupRoot: args[2], withoutPidfd: args[0] != "pidfd", Refused: func(err error) {
		_ = os.RemoveAll(dir)
		fmt.Println("refused", err)
		os.Exit(0)
	}})
	play(err)

	// The attacker connects, leaves the connection to a child, and ends.
	time.Sleep(3 * tick)
	attacker := exec.Command("/proc/self/exe")
	attacker.Env = []string{roleKey + "=hand-over", socketKey + "=" + socket}
	attacker.Stdin = strings.NewReader("go\n")
	listener.look() // the last moment before the attack at which the queue is empty
	_, err = attacker.Output()
	play(err)
	number := attacker.ProcessState.Pid()

	// The victim gets its number.
	var victim *exec.Cmd
	for range 100 {
		play(os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(number-1)), 0))
		victim = exec.Command("/proc/self/exe")
		victim.Env = []string{roleKey + "=sleep"}
		play(victim.Start())
		if victim.Process.Pid == number {
			break
		}
		play(victim.Process.Kill())
		_ = victim.Wait()
	}
	if victim.Process.Pid != number {
		fmt.Println(notAgain)
		return
	}
	group := filepath.Join(args[1], "kubepods", "burstable", "pod"+uidB, id)
	play(os.MkdirAll(group, 0o755))
	play(os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(number)), 0))
	_, pod, err := listener.Accept()
	fmt.Println("accepted", pod, err)
}

// Whatever is wrong with one of them, the next is served.
func TestTheNextOneIsServed(t *testing.T) {
	g := newGroups(t)
	s := newSite(t, g.root, false)
	for range 5 { // of the host
		conn, err := net.Dial("unix", s.socket)
		must(t, err)
		defer conn.Close()
	}
	a := start(t, "connect", s.socket, 0)
	g.put(a.pid(), uidA)
	a.goOn()
	conn, pod, err := s.Accept()
	if err != nil || pod != uidA || len(s.refused) != 5 {
		t.Fatalf("%q, %v, and %d were sent away", pod, err, len(s.refused))
	}
	_ = conn.Close()
	must(t, s.Close())
	if _, _, err := s.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}
