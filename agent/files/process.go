package files

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// process is what /proc says of one.
type process struct {
	name        string
	parent, uid int
}

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
	return p, nil
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
