package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// prefix is of the names of the folder and the cgroup that a node has on this machine.
const prefix = "meshca-node-"

// place is a node's folder, which names its cgroups. It is locked as long as its owner lives.
type place struct {
	dir  string
	lock *os.File
}

// claim makes a new one below parent.
func claim(parent string) (*place, error) {
	for {
		dir, err := os.MkdirTemp(parent, prefix)
		if err != nil {
			return nil, err
		}
		if err := os.Chmod(dir, 0o755); err != nil { // pods of other users have files in it
			return nil, err
		}
		p, err := seize(dir)
		if err == nil && p != nil {
			return p, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		// Another program's sweep found it before it was locked.
	}
}

// seize locks a folder; nil says that its owner lives.
func seize(dir string) (*place, error) {
	lock, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, err
	}
	if _, err := os.Stat(dir); err != nil { // its owner removed it meanwhile
		lock.Close()
		return nil, err
	}
	return &place{dir: dir, lock: lock}, nil
}

// sweep takes away what nodes left whose program was killed.
func sweep(parent string) error {
	found, err := filepath.Glob(filepath.Join(parent, prefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range found {
		p, err := seize(dir)
		if p == nil {
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			continue
		}
		if err := p.remove(); err != nil {
			return fmt.Errorf("taking away what a node that was killed left: %w", err)
		}
	}
	return nil
}

// remove takes away the cgroups, then the folder that names them.
func (p *place) remove() error {
	defer p.lock.Close()
	list, err := os.ReadFile(filepath.Join(p.dir, "cgroups"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for line := range strings.Lines(string(list)) {
		if _, group, ok := strings.Cut(strings.TrimSpace(line), "\t"); ok && strings.HasPrefix(filepath.Base(group), prefix) {
			if err := removeCgroup(group); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(p.dir)
}

// removeCgroup ends what is left in a cgroup and removes it with all below it.
func removeCgroup(group string) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := tryRemoveCgroup(group)
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(20 * time.Millisecond) // those that were killed are on their way
	}
}

func tryRemoveCgroup(group string) error {
	var folders []string
	err := filepath.WalkDir(group, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if entry.IsDir() {
			folders = append(folders, path)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, folder := range slices.Backward(folders) {
		procs, _ := os.ReadFile(filepath.Join(folder, "cgroup.procs"))
		for pid := range strings.FieldsSeq(string(procs)) {
			if n, err := strconv.Atoi(pid); err == nil && n > 1 {
				_ = unix.Kill(n, unix.SIGKILL)
			}
		}
		if err := unix.Rmdir(folder); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("removing the cgroup %s: %w", folder, err)
		}
	}
	return nil
}
