package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// hierarchy is where cgroups of one kind are.
type hierarchy struct {
	mountPoint string
	// parent is the folder in which the node's cgroup is made.
	parent  string
	unified bool
}

// makeCgroups makes the node's cgroup in each hierarchy. Their list is written before the first one is made.
func (p *place) makeCgroups() error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	found, err := hierarchies(string(mounts), string(own))
	if err != nil {
		return err
	}
	var list strings.Builder
	for _, h := range found {
		fmt.Fprintf(&list, "%s\t%s\n", h.mountPoint, filepath.Join(h.parent, filepath.Base(p.dir)))
	}
	if err := os.WriteFile(filepath.Join(p.dir, "cgroups"), []byte(list.String()), 0o644); err != nil {
		return err
	}
	for _, h := range found {
		if err := h.make(filepath.Join(h.parent, filepath.Base(p.dir))); err != nil {
			return fmt.Errorf("cgroups: %w", err)
		}
	}
	return nil
}

// make makes a cgroup that can hold processes and divide what its parent has.
func (h hierarchy) make(group string) error {
	if h.unified {
		if err := passOn(h.parent); err != nil {
			return err
		}
		return os.Mkdir(group, 0o755)
	}
	if err := os.Mkdir(group, 0o755); err != nil {
		return err
	}
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // v1 leaves them empty, and takes no process then
		value, err := os.ReadFile(filepath.Join(h.parent, file))
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(group, file), value, 0); err != nil {
			return err
		}
	}
	return nil
}

// passOn gives the children of a v2 cgroup all the controllers that it has.
func passOn(parent string) error {
	controllers, err := os.ReadFile(filepath.Join(parent, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for controller := range strings.FieldsSeq(string(controllers)) {
		if err := os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+controller), 0); err != nil {
			return fmt.Errorf("controller %s: %w (in a container its own cgroup holds processes, and can have no children then)", controller, err)
		}
	}
	return nil
}

// hierarchies reads the forms of proc(5): mountinfo, and the cgroups of a process. On v1 the node's cgroup is made below
// this process's own, whose limits hold for it then. On v2 a cgroup that holds processes cannot be divided: it is made at
// the root.
func hierarchies(mounts, own string) ([]hierarchy, error) {
	var v1, v2 []hierarchy
	for line := range strings.Lines(mounts) {
		head, tail, ok := strings.Cut(strings.TrimSpace(line), " - ")
		fields, kind := strings.Fields(head), strings.Fields(tail)
		if !ok || len(fields) < 5 || len(kind) < 3 {
			continue
		}
		root, mountPoint := fields[3], fields[4]
		switch kind[0] {
		case "cgroup2":
			v2 = append(v2, hierarchy{mountPoint: mountPoint, parent: mountPoint, unified: true})
		case "cgroup":
			path, ok := ownCgroup(own, strings.Split(kind[2], ","))
			if !ok {
				continue
			}
			below, err := filepath.Rel(root, path)
			if err != nil || strings.HasPrefix(below, "..") {
				return nil, fmt.Errorf("this process's cgroup %s cannot be seen at %s, which shows what is below %s", path, mountPoint, root)
			}
			v1 = append(v1, hierarchy{mountPoint: mountPoint, parent: filepath.Join(mountPoint, below)})
		}
	}
	switch {
	case len(v1) > 0: // beside them a v2 hierarchy has no controllers
		return v1, nil
	case len(v2) > 0:
		return v2[:1], nil
	}
	return nil, errors.New("no cgroup file system is mounted")
}

// ownCgroup finds the v1 hierarchy with the options of a mount.
func ownCgroup(own string, options []string) (string, bool) {
	for line := range strings.Lines(own) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 || fields[1] == "" {
			continue
		}
		if !slices.ContainsFunc(strings.Split(fields[1], ","), func(c string) bool { return !slices.Contains(options, c) }) {
			return fields[2], true
		}
	}
	return "", false
}
