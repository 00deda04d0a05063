package files

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// process is what /proc says of one.
type process struct {
	name        string
	parent, uid int
	// age is how long it runs; negative where /proc shows another uptime than the kernel's, as some containers have it.
	age time.Duration
}

// tick is the unit of times in /proc/PID/stat: USER_HZ is 100 on every architecture that Go knows.
const tick = 10 * time.Millisecond

// maxComm is the length at which the kernel cuts names of processes (TASK_COMM_LEN less the NUL).
const maxComm = 15

func clipName(s string) string { return s[:min(len(s), maxComm)] }

// look reads /proc/PID/status (proc_pid_status(5)). uid is the real one.
func look(pid int) (process, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return process{}, err
	}
	p := process{parent: -1, uid: -1}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		value = strings.TrimPrefix(value, "\t")
		switch key {
		case "Name":
			p.name = value
		case "PPid":
			p.parent, err = strconv.Atoi(value)
		case "Uid":
			real, _, _ := strings.Cut(value, "\t")
			p.uid, err = strconv.Atoi(real)
		}
		if err != nil {
			return process{}, fmt.Errorf("/proc/%d/status: %w", pid, err)
		}
	}
	p.age, err = age(pid)
	return p, err
}

// age reads how long a process runs.
func age(pid int) (time.Duration, error) {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
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

// named lists the topmost processes of a name in our PID namespace: workers have their master's name, and take signals
// from it alone. Containers of the same machine have namespaces of their own; what runs in them is theirs to tell.
func named(name string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	ours, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return nil, err
	}
	found := make(map[int]process)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid <= 1 || pid == os.Getpid() {
			continue
		}
		p, err := look(pid)
		if err != nil || p.name != clipName(name) {
			continue // it ended
		}
		if ns, err := os.Readlink(filepath.Join("/proc", e.Name(), "ns/pid")); err != nil || ns != ours {
			continue
		}
		found[pid] = p
	}
	var top []int
	for pid, p := range found {
		if _, worker := found[p.parent]; !worker {
			top = append(top, pid)
		}
	}
	return top, nil
}
