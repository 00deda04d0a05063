package files

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test's own program, started again, plays the processes that a signal is about: what it does is the value of
// MESHCA_FILES_ROLE.
const (
	roleKey    = "MESHCA_FILES_ROLE"
	nameKey    = "MESHCA_FILES_NAME"    // a daemon's name
	uidKey     = "MESHCA_FILES_UID"     // and its user
	signalKey  = "MESHCA_FILES_SIGNAL"  // what the agent does, as JSON
	powersKey  = "MESHCA_FILES_POWERS"  // the capabilities that it does it with, as hexadecimal of /proc/PID/status
	pidFileKey = "MESHCA_FILES_PIDFILE" // where a node writes its daemon's number
	procKey    = "MESHCA_FILES_PROC"    // and the options of its own /proc; unset: it has none
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleKey) {
	case "":
		os.Exit(m.Run())
	case "daemon":
		playDaemon()
	case "agent":
		playAgent()
	case "tell":
		playTell()
	case "node":
		playNode()
	}
}

// play ends a role that cannot go on.
func play(err error) {
	if err != nil {
		fmt.Println("fault:", err)
		os.Exit(1)
	}
}

// as is the test's program in a role, with those of the environment given as KEY=value.
func as(role string, env ...string) *exec.Cmd {
	c := exec.Command("/proc/self/exe")
	c.Env, c.Stderr = append(env, roleKey+"="+role), os.Stderr
	return c
}

// playDaemon has a name and a user, and runs until it is signalled or its standard input ends.
func playDaemon() {
	play(os.WriteFile("/proc/self/comm", []byte(os.Getenv(nameKey)), 0))
	uid, err := strconv.Atoi(os.Getenv(uidKey))
	play(err)
	if uid != 0 {
		play(syscall.Setgroups(nil))
		play(syscall.Setgid(uid))
		play(syscall.Setuid(uid))
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// playAgent gives up all powers but those it is to have, for good, as systemd has a unit's process do.
func playAgent() {
	runtime.LockOSThread()
	powers, err := strconv.ParseUint(os.Getenv(powersKey), 16, 64)
	play(err)
	for power := range uintptr(64) {
		if powers&(1<<power) != 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, power, 0, 0, 0); errors.Is(err, unix.EINVAL) {
			break // that is beyond the last that this kernel knows
		} else if err != nil {
			play(err)
		}
	}
	play(unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	play(os.Setenv(roleKey, "tell"))
	play(unix.Exec("/proc/self/exe", []string{"agent"}, os.Environ()))
}

// playTell tells as Keep does, and says what came of it.
func playTell() {
	status, err := os.ReadFile("/proc/self/status")
	play(err)
	if want := "CapEff:\t" + os.Getenv(powersKey) + "\n"; !strings.Contains(string(status), want) {
		play(fmt.Errorf("these are not the powers it was to have, %q: %s", want, status))
	}
	var s Signal
	play(json.Unmarshal([]byte(os.Getenv(signalKey)), &s))
	for {
		switch err := s.tell(context.Background(), nil); {
		case errors.Is(err, errStarting):
			time.Sleep(100 * time.Millisecond)
			continue
		case errors.Is(err, errNobody):
			fmt.Println("nobody")
		case err != nil:
			fmt.Println(err)
		default:
			fmt.Println("told")
		}
		return
	}
}

// playNode is the first process in namespaces of its own, in which it has a daemon and an agent.
func playNode() {
	err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if options, own := os.LookupEnv(procKey); own && err == nil {
		err = unix.Mount("proc", "/proc", "proc", 0, options)
	}
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) { // root may not, or this kernel knows no such option
		fmt.Println("unable:", err)
		return
	}
	play(err)
	daemon := as("daemon", os.Environ()...)
	in, err := daemon.StdinPipe()
	play(err)
	out, err := daemon.StdoutPipe()
	play(err)
	play(daemon.Start())
	_, err = io.ReadFull(out, make([]byte, len("ready\n")))
	play(err)
	play(os.WriteFile(os.Getenv(pidFileKey), []byte(strconv.Itoa(daemon.Process.Pid)), 0o644))
	agent := as("agent", os.Environ()...)
	agent.Stdout = os.Stdout
	play(agent.Run())
	_ = in.Close()
	_ = daemon.Wait()
	fmt.Println("the daemon:", daemon.ProcessState)
}
