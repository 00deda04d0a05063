package files

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Signal sends a signal to a process: the one whose number stands in a file, or those of a name.
type Signal struct {
	// Name is HUP, USR1, USR2, INT, QUIT, TERM or WINCH; "SIG" may stand before it. Required.
	Name string
	// PIDFile holds the process's number. Only root, the agent's user and the process's own user may own it.
	PIDFile string
	// Process is the name of a program, as `ps -o comm` shows it. Alone: the processes of that name in the agent's PID
	// namespace get the signal, but for those whose parent has the same name, which are its workers. With PIDFile: the
	// process must have that name.
	Process string
}

var _ teller = Signal{}

// signals are those that tell a process something, by name.
func signals(name string) (syscall.Signal, bool) {
	switch strings.TrimPrefix(name, "SIG") {
	case "HUP":
		return syscall.SIGHUP, true
	case "USR1":
		return syscall.SIGUSR1, true
	case "USR2":
		return syscall.SIGUSR2, true
	case "INT":
		return syscall.SIGINT, true
	case "QUIT":
		return syscall.SIGQUIT, true
	case "TERM":
		return syscall.SIGTERM, true
	case "WINCH":
		return syscall.SIGWINCH, true
	}
	return 0, false
}

func (s *Signal) check() error {
	var errs []error
	if _, ok := signals(s.Name); !ok {
		errs = append(errs, fmt.Errorf("signal: %.20q is none of HUP, USR1, USR2, INT, QUIT, TERM, WINCH", s.Name))
	}
	switch {
	case s.PIDFile == "" && s.Process == "":
		errs = append(errs, errors.New("signal: name a pidFile, a process, or both"))
	case s.PIDFile != "" && !filepath.IsAbs(s.PIDFile):
		errs = append(errs, fmt.Errorf("signal: pidFile %q is not an absolute path", s.PIDFile))
	}
	if strings.ContainsAny(s.Process, "/\x00\n") {
		errs = append(errs, fmt.Errorf("signal: process %.40q is a path: give the name that `ps -o comm` shows", s.Process))
	}
	return errors.Join(errs...)
}

// String says what is done.
func (s Signal) String() string {
	to := s.Process
	if to == "" || s.PIDFile != "" {
		to = s.PIDFile
	}
	return "signal " + strings.TrimPrefix(s.Name, "SIG") + " to " + to
}

func (s Signal) tell(context.Context, []string) error {
	number, _ := signals(s.Name)
	if err := checkProc(); err != nil {
		return err
	}
	pids, owner, err := s.find()
	if err != nil {
		return err
	}
	told := 0
	for _, pid := range pids {
		err := s.send(pid, owner, number)
		switch {
		case errors.Is(err, errNobody):
		case err != nil:
			return err
		default:
			told++
		}
	}
	if told == 0 {
		return errNobody
	}
	return nil
}

// find lists the processes, and who owns the file that names them; -1: no file does.
func (s Signal) find() (pids []int, owner int, err error) {
	if s.PIDFile == "" {
		pids, err = named(s.Process)
		return pids, -1, err
	}
	f, err := os.OpenFile(s.PIDFile, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, -1, errNobody
	}
	if err != nil {
		return nil, -1, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, -1, err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o022 != 0 {
		return nil, -1, fmt.Errorf("%s is not a plain file that only its owner can write (%v): whoever can write it would say whom this agent signals", s.PIDFile, info.Mode())
	}
	data, err := io.ReadAll(io.LimitReader(f, 64))
	if err != nil {
		return nil, -1, err
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(data)), "\n")
	if line == "" {
		return nil, -1, errNobody // it is being written
	}
	pid, err := strconv.Atoi(line)
	if err != nil || pid <= 1 || pid == os.Getpid() {
		return nil, -1, fmt.Errorf("%s holds %.20q, which is no process that may be signalled", s.PIDFile, line)
	}
	return []int{pid}, ownerOf(info), nil
}

// send signals one process. The handle (pidfd) is opened before the process is looked at: what is looked at is what is
// signalled, whatever becomes of the number.
func (s Signal) send(pid, owner int, number syscall.Signal) error {
	handle, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	defer func() { _ = handle.Release() }()
	p, err := look(pid)
	if errors.Is(err, errUnseen) && errors.Is(handle.Signal(syscall.Signal(0)), os.ErrProcessDone) {
		return errNobody
	}
	if err != nil {
		return fmt.Errorf("process %d cannot be looked at: %w", pid, err)
	}
	switch {
	case s.Process != "" && p.name != clipName(s.Process):
		return fmt.Errorf("process %d, which %s names, is %q and not %q", pid, s.PIDFile, p.name, s.Process)
	case owner > 0 && owner != os.Geteuid() && owner != p.uid:
		return fmt.Errorf("%s belongs to uid %d, and process %d to uid %d: who may not signal it may not name it either", s.PIDFile, owner, pid, p.uid)
	case p.age >= 0 && p.age <= settle: // both of its ends were cut to a tick, so it may be younger by almost one
		return errStarting
	}
	err = handle.Signal(number)
	if errors.Is(err, os.ErrProcessDone) {
		return errNobody
	}
	if err != nil {
		return fmt.Errorf("process %d cannot be signalled: %w", pid, err)
	}
	return nil
}
