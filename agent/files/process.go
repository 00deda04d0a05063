package files

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is what /proc says of one.
type process struct {
	name        string
	parent, uid int
	// depth is how many PID namespaces it has a number in, counted from that of /proc on: with 1 it is in that very one,
	// with more in one below, as a container has. 0: the kernel does not say.
	depth int
	// age is how long it runs; negative where /proc shows another uptime than the kernel's, as some containers have it.
	age time.Duration
}

// errUnseen is what look says of a process that /proc does not show: it ended, or is hidden (hidepid in proc(5)).
var errUnseen = errors.New("/proc does not show it")

// tick is the unit of times in /proc/PID/stat: USER_HZ is 100 on every architecture that Go knows.
const tick = 10 * time.Millisecond

// maxComm is the length at which the kernel cuts names of processes (TASK_COMM_LEN less the NUL).
const maxComm = 15

func clipName(s string) string { return s[:min(len(s), maxComm)] }

// look reads what everybody may of a process, be it another user's or one with more powers: /proc/PID/status and stat.
// What is of use to ptrace alone, such as the links in /proc/PID/ns, cannot be read without CAP_SYS_PTRACE.
func look(pid int) (process, error) {
	data, err := read(pid, "status")
	if err != nil {
		return process{}, err
	}
	p, err := parseStatus(data)
	if err != nil {
		return process{}, fmt.Errorf("/proc/%d/status: %w", pid, err)
	}
	p.age, err = age(pid)
	return p, err
}

func read(pid int, name string) ([]byte, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), name))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return nil, errUnseen
	}
	return data, err
}

// parseStatus reads /proc/PID/status (proc_pid_status(5)). uid is the real one.
func parseStatus(data []byte) (process, error) {
	p := process{parent: -1, uid: -1}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		value = strings.TrimPrefix(value, "\t")
		var err error
		switch key {
		case "Name":
			p.name = value
		case "PPid":
			p.parent, err = strconv.Atoi(value)
		case "Uid":
			real, _, _ := strings.Cut(value, "\t")
			p.uid, err = strconv.Atoi(real)
		case "NSpid":
			p.depth = len(strings.Fields(value))
		}
		if err != nil {
			return process{}, err
		}
	}
	return p, nil
}

// age reads how long a process runs.
func age(pid int) (time.Duration, error) {
	stat, err := read(pid, "stat")
	if err != nil {
		return 0, err
	}
	up, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return 0, err
	}
	return ageOf(stat, up)
}

// ageOf counts in ticks, which both files do (the uptime as hundredths of a second): a fraction that no float has exactly
// would make a process that began just now one of a negative age.
func ageOf(stat, uptime []byte) (time.Duration, error) {
	// The start is field 22 (proc_pid_stat(5)), counted from the name's closing parenthesis, for names may hold anything.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const start = 22 - 3 // after the name comes field 3
	if len(fields) <= start {
		return 0, fmt.Errorf("a process's stat file has %d fields after its name", len(fields))
	}
	began, err := strconv.ParseInt(fields[start], 10, 64)
	if err != nil {
		return 0, err
	}
	up, _, _ := strings.Cut(string(uptime), " ")
	seconds, hundredths, _ := strings.Cut(up, ".")
	now, err := strconv.ParseInt(seconds+hundredths, 10, 64)
	if err != nil || len(hundredths) != 2 {
		return 0, fmt.Errorf("/proc/uptime begins with %.20q, which is no seconds and hundredths", up)
	}
	return time.Duration(now-began) * tick, nil
}

// checkProc says whether the numbers in /proc are those by which we signal. They are not where a container has its host's
// /proc: processes would be looked at there, and others signalled here.
func checkProc() error {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return fmt.Errorf("/proc does not show the agent itself: %w", err)
	}
	p, err := parseStatus(data)
	if err != nil {
		return fmt.Errorf("/proc/self/status: %w", err)
	}
	if p.depth > 1 {
		return errors.New("/proc is that of another PID namespace than the agent's, so it does not say whom a signal would reach")
	}
	return nil
}

// named lists the topmost processes of a name in our PID namespace, once checkProc has said that /proc is of it: workers
// have their master's name, and take signals from it alone. Containers of the same machine have namespaces of their own;
// what runs in them is theirs to tell. It is an error when somebody of that name may run whom it cannot list.
func named(name string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	first := false // process 1 is always there: who is not shown it is not shown others either
	found := make(map[int]process)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		p, err := look(pid)
		if errors.Is(err, errUnseen) {
			continue // it ended
		}
		if err != nil {
			return nil, fmt.Errorf("process %d cannot be looked at, and may be %q: %w", pid, name, err)
		}
		first = first || pid == 1
		if p.name != clipName(name) {
			continue
		}
		switch p.depth {
		case 0:
			return nil, fmt.Errorf("process %d is %q, and nothing says whether it is a container's: /proc/%d/status has no NSpid", pid, p.name, pid)
		case 1:
			found[pid] = p
		}
	}
	if !first && os.Getpid() != 1 {
		return nil, fmt.Errorf("/proc does not show all processes (process 1 is missing), so %q may run", name)
	}
	if _, ok := found[1]; ok {
		return nil, fmt.Errorf("process 1 is %q, and is never signalled: use a command", name)
	}
	var top []int
	for pid, p := range found {
		if _, worker := found[p.parent]; !worker {
			top = append(top, pid)
		}
	}
	return top, nil
}
