package unixpeer

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/api/refusal"
)

// endedProcess is a pidfd of a process that has ended.
func endedProcess(t *testing.T) int {
	t.Helper()
	child := exec.CommandContext(t.Context(), "true")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	pidfd, err := unix.PidfdOpen(child.Process.Pid, 0) // not waited for, so the number is its own
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(pidfd) })
	if err := child.Wait(); err != nil {
		t.Fatal(err)
	}
	return pidfd
}

// A number may be another process's by now: here it is this one's, which can be read all the time.
func TestAnEndedProcessIsNotHeld(t *testing.T) {
	fd, err := unix.Dup(endedProcess(t))
	if err != nil {
		t.Fatal(err)
	}
	if p, err := hold(fd, os.Getpid()); refusal.Of(err) != refusal.PeerUnknown {
		t.Errorf("it is held: %v, %v", p, err)
	}
}

// The process lived when it was looked at first, and its number is used again when its file is read.
func TestWhatIsReadIsOfTheProcessThatIsHeld(t *testing.T) {
	p := &process{endedProcess(t), os.Getpid()}
	if text, err := p.read("cgroup", maxCgroup); refusal.Of(err) != refusal.PeerUnknown {
		t.Errorf("read %q, %v", text, err)
	}
}
