package unixpeer

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/api/refusal"
)

// process is one that is held by its pidfd: whatever becomes of its number, the pidfd is of no other.
type process struct {
	pidfd int
	pid   int
}

// hold takes over a pidfd of a process with this number, which must live.
func hold(pidfd, pid int) (*process, error) {
	p := &process{pidfd, pid}
	if err := p.alive(); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *process) close() { _ = unix.Close(p.pidfd) }

// alive refuses one that has ended: its pidfd can be read then (pidfd_open(2)), a zombie's too.
func (p *process) alive() error {
	fds := []unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return refusal.New(refusal.PeerUnknown, "poll: %w", err)
		case n > 0:
			return gone(nil)
		}
		return nil
	}
}

// read reads a file of /proc/PID. The process lived after it was read, so its number was no other's while it was.
func (p *process) read(name string, most int64) (string, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/%s", p.pid, name))
	if err != nil {
		return "", gone(err)
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, most+1))
	if err != nil {
		return "", gone(err)
	}
	if err := p.alive(); err != nil {
		return "", err
	}
	if int64(len(text)) > most {
		return "", refusal.New(refusal.PeerUnknown, "/proc/%d/%s is larger than %d bytes", p.pid, name, most)
	}
	return string(text), nil
}

// tick is the unit of times in /proc: USER_HZ, which Linux shows as a hundredth of a second on all its architectures.
const tick = 10 * time.Millisecond

// began is when the process was started, at the latest, since the machine's start (proc_pid_stat(5), field 22).
func (p *process) began() (time.Duration, error) {
	stat, err := p.read("stat", 4<<10)
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in parentheses, which may hold spaces and parentheses.
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	const behindName = 22 - 3
	if len(fields) > behindName {
		if ticks, err := strconv.ParseInt(fields[behindName], 10, 64); err == nil && ticks >= 0 && ticks < 1<<40 {
			return time.Duration(ticks+1) * tick, nil
		}
	}
	return 0, refusal.New(refusal.PeerUnknown, "/proc/%d/stat cannot be read", p.pid)
}

func gone(cause error) error {
	if cause == nil {
		return refusal.New(refusal.PeerUnknown, "the process that connected has ended")
	}
	return refusal.New(refusal.PeerUnknown, "the process that connected has ended, or cannot be looked at: %w", cause)
}
