package pods

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// mounted reports whether a process has the directory mounted, as pods do that use the socket: one that is made in its
// place they would not see, and never find the socket again. Where that cannot be told it says yes.
func mounted(dir string) bool {
	if os.Getpid() == 1 {
		return true // in a PID namespace of its own it sees nobody else
	}
	f, err := os.Open(dir)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	defer f.Close()
	at, err := placeOf(f)
	return err != nil || at.mountedBy("/proc")
}

// mountPlace is where a directory is, as mountinfo says of a mount what it is of (proc_pid_mountinfo(5)): so nothing has
// to be looked up in other processes' file systems, which may be a server's that does not answer.
type mountPlace struct {
	device string
	root   string
}

// mount is one line of mountinfo.
type mount struct {
	id, at string
	mountPlace
}

// blanks are how mountinfo writes what would end a field.
var blanks = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// mounts are the mounts that mountinfo lists.
func mounts(mountinfo string) (all []mount) {
	for line := range strings.Lines(mountinfo) {
		if f := strings.Fields(line); len(f) >= 5 {
			all = append(all, mount{f[0], blanks.Replace(f[4]), mountPlace{f[2], blanks.Replace(f[3])}})
		}
	}
	return all
}

// placeOf finds a directory's place, by the mount that the kernel says it was opened in.
func placeOf(f *os.File) (mountPlace, error) {
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return mountPlace{}, err
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", f.Fd()))
	if err != nil {
		return mountPlace{}, err
	}
	lines, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return mountPlace{}, err
	}
	_, id, _ := strings.Cut(string(info), "mnt_id:")
	id, _, _ = strings.Cut(strings.TrimSpace(id), "\n")
	for _, m := range mounts(string(lines)) {
		if m.id != id {
			continue
		}
		below, err := filepath.Rel(m.at, path)
		return mountPlace{m.device, filepath.Join(m.root, below)}, err
	}
	return mountPlace{}, fmt.Errorf("mountinfo does not have the mount of %s", path)
}

// mountedBy reports whether one of proc's processes has a mount of this very place, or may have one.
func (p mountPlace) mountedBy(proc string) bool {
	processes, err := filepath.Glob(proc + "/[0-9]*")
	if err != nil || len(processes) == 0 {
		return true
	}
	looked := map[string]bool{} // by mount namespace
	for _, process := range processes {
		namespace, unknown := os.Readlink(process + "/ns/mnt")
		if unknown == nil && looked[namespace] {
			continue
		}
		lines, err := os.ReadFile(process + "/mountinfo")
		if errors.Is(err, fs.ErrPermission) {
			return true
		}
		if err != nil {
			continue // it has ended meanwhile; others of its namespace may have not
		}
		for _, m := range mounts(string(lines)) {
			if m.mountPlace == p {
				return true
			}
		}
		looked[namespace] = unknown == nil
	}
	return false
}
