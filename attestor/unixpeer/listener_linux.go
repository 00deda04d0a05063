package unixpeer

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/api/refusal"
)

// emptyEvery is how often it is noted that nobody waits to be accepted.
const emptyEvery = 200 * time.Millisecond

// Config is what a Listener is made of.
type Config struct {
	// CgroupRoot is the kubelet's --cgroup-root; "/" where it is empty.
	CgroupRoot string
	// Refused is told of each peer that is sent away, with a refusal. It must not block.
	Refused func(err error)

	withoutPidfd bool // as on a kernel before 6.5
}

// Listener accepts connections of processes in pods, and knows whose they are.
//
// Without a pidfd of the socket's own there is only the number of the process that connected, which may be another's by
// now. That one began after the connection was made, and the connection was made after the queue of those that wait was last
// seen empty. So a process is believed to be the one that connected if it is older than that moment; a younger one is sent
// away, and finds itself old enough when it comes again.
type Listener struct {
	listener *net.UnixListener
	config   Config
	layout   layout

	empty time.Duration // since boot: when nobody waited last; Accept's own
}

// New attests whoever connects to the listener, which it takes over.
func New(l *net.UnixListener, c Config) (*Listener, error) {
	if c.CgroupRoot == "" {
		c.CgroupRoot = "/"
	}
	if c.Refused == nil {
		c.Refused = func(error) {}
	}
	at, ok := newLayout(c.CgroupRoot)
	if !ok {
		return nil, fmt.Errorf("cgroupRoot: %q is no absolute path without detours: name the kubelet's --cgroup-root", c.CgroupRoot)
	}
	return &Listener{listener: l, config: c, layout: at}, nil
}

// Accept waits for the next connection of a process in a pod, and returns it with the pod's UID. Others are closed and told to
// Config.Refused. It is to be called again at once, and by one goroutine: who waits is looked at when it is accepted.
func (l *Listener) Accept() (net.Conn, string, error) {
	for {
		l.look()
		if err := l.listener.SetDeadline(time.Now().Add(emptyEvery)); err != nil {
			return nil, "", err
		}
		conn, err := l.listener.AcceptUnix()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue
		case err != nil:
			return nil, "", err
		}
		pod, err := l.podOf(conn)
		if err == nil {
			return conn, pod, nil
		}
		_ = conn.Close()
		l.config.Refused(err)
	}
}

// look notes the moment if nobody waits to be accepted.
func (l *Listener) look() {
	raw, err := l.listener.SyscallConn()
	if err != nil {
		return
	}
	asked := sinceBoot()
	_ = raw.Control(func(fd uintptr) {
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); err == nil && n == 0 {
			l.empty = asked
		}
	})
}

// Addr is the socket's.
func (l *Listener) Addr() net.Addr { return l.listener.Addr() }

// Close ends Accept.
func (l *Listener) Close() error { return l.listener.Close() }

func (l *Listener) podOf(conn *net.UnixConn) (string, error) {
	p, err := l.peer(conn)
	if err != nil {
		return "", err
	}
	defer p.close()
	text, err := p.read("cgroup", maxCgroup)
	if err != nil {
		return "", err
	}
	return l.layout.podOf(text)
}

func (l *Listener) peer(conn *net.UnixConn) (*process, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, refusal.New(refusal.PeerUnknown, "its connection is gone: %w", err)
	}
	var p *process
	var failed error
	err = raw.Control(func(fd uintptr) { p, failed = l.processOf(int(fd)) })
	if err != nil {
		return nil, refusal.New(refusal.PeerUnknown, "its connection is gone: %w", err)
	}
	return p, failed
}

// processOf holds the process that connected.
func (l *Listener) processOf(socket int) (*process, error) {
	cred, err := unix.GetsockoptUcred(socket, unix.SOL_SOCKET, unix.SO_PEERCRED)
	switch {
	case err != nil:
		return nil, refusal.New(refusal.PeerUnknown, "SO_PEERCRED: %w", err)
	case cred.Pid <= 0:
		return nil, refusal.New(refusal.PeerUnknown, "the agent does not see its process: the agent's pod must have hostPID: true").On(Invisible)
	}
	if !l.config.withoutPidfd {
		pidfd, err := unix.GetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
		if err == nil {
			unix.CloseOnExec(pidfd)
			return hold(pidfd, int(cred.Pid))
		}
		if !errors.Is(err, unix.ENOPROTOOPT) {
			return nil, gone(fmt.Errorf("SO_PEERPIDFD: %w", err))
		}
	}
	pidfd, err := unix.PidfdOpen(int(cred.Pid), 0)
	if err != nil {
		return nil, gone(fmt.Errorf("pidfd_open: %w", err))
	}
	p, err := hold(pidfd, int(cred.Pid))
	if err != nil {
		return nil, err
	}
	began, err := p.began()
	switch {
	case err == nil && began < l.empty:
		return p, nil
	case err == nil:
		err = refusal.New(refusal.PeerUnknown, "process %d is younger than its connection may be, so it can be another one than connected; it is believed when it connects again", cred.Pid)
	}
	p.close()
	return nil, err
}

// sinceBoot is the time since the machine's start, suspends included (CLOCK_BOOTTIME).
func sinceBoot() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) // it cannot fail: the clock exists since 2.6.39
	return time.Duration(t.Nano())
}
