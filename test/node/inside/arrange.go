package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// sysctls are what kubelet and kube-proxy want to find. They belong to the whole machine, so the node is shown files with
// these values in their place.
var sysctls = map[string]string{
	"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
	"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
}

// arrange makes the mounts of the node. nodeDir and binDir, the folders to share, are paths of the world outside.
func arrange(nodeDir, binDir string) error {
	if err := joinCgroups(filepath.Join(nodeDir, "cgroups")); err != nil {
		return err
	}
	// Nothing of what follows may reach the world outside.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making the mounts private: %w", err)
	}
	if err := mountCgroups(filepath.Join(nodeDir, "cgroups")); err != nil {
		return err
	}
	if err := mountFolders(nodeDir, binDir); err != nil {
		return err
	}
	if err := mountSysctls(); err != nil {
		return err
	}
	// Shared among the node and its pods, as systemd has it on a real one: what an agent's pod mounts with
	// mountPropagation Bidirectional is seen by kubelet, and what kubelet mounts by pods with HostToContainer.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("making the mounts shared: %w", err)
	}
	// A cgroup namespace is entered by a thread; the program that runs next has just this one. The death of who started
	// this program is told to threads too, and to this one perhaps not yet.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("a cgroup namespace: %w", err)
	}
	self := filepath.Join(dir, "inside")
	return fmt.Errorf("%s: %w", self, unix.Exec(self, []string{self, "init"}, os.Environ()))
}

// mountFolders lays folders of the node's over the machine's: /run in memory, /var/lib and /var/log out of nodeDir.
func mountFolders(nodeDir, binDir string) error {
	// Both may be below what is covered, and are reached by descriptor then.
	shared := map[string]string{}
	for target, path := range map[string]string{dir: nodeDir, bin: binDir, "/var/lib": filepath.Join(nodeDir, "lib"), "/var/log": filepath.Join(nodeDir, "log")} {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		shared[target] = "/proc/self/fd/" + strconv.Itoa(int(f.Fd()))
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("/run: %w", err)
	}
	for target, source := range shared {
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("%s: %w", target, err)
		}
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("/proc: %w", err)
	}
	return nil
}

func mountSysctls() error {
	for name, value := range sysctls {
		stand := filepath.Join("/run/sysctl", name)
		if err := os.MkdirAll(filepath.Dir(stand), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(stand, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(stand, "/proc/sys/"+name, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("sysctl %s: %w", name, err)
		}
	}
	return nil
}

// joinCgroups puts this process into the node's cgroups. list names them, one a line: the hierarchy's mount point, a tab,
// the cgroup in it.
func joinCgroups(list string) error {
	return eachCgroup(list, func(_, group string) error {
		return os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte("0"), 0)
	})
}

// mountCgroups makes each of the node's cgroups the root of its hierarchy.
func mountCgroups(list string) error {
	return eachCgroup(list, func(mountPoint, group string) error {
		if err := unix.Mount(group, mountPoint, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cgroup %s: %w", group, err)
		}
		return nil
	})
}

func eachCgroup(list string, do func(mountPoint, group string) error) error {
	text, err := os.ReadFile(list)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		mountPoint, group, ok := strings.Cut(strings.TrimSpace(line), "\t")
		if !ok {
			return fmt.Errorf("%s: cannot read %q", list, line)
		}
		if err := do(mountPoint, group); err != nil {
			return err
		}
	}
	return nil
}

// delegate lets kubelet divide what the node has, where cgroups are v2: there a group whose children have controllers
// may hold no process itself, so this one moves to a child first.
func delegate() error {
	const root = "/sys/fs/cgroup"
	controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // v1
	}
	if err != nil {
		return err
	}
	own := filepath.Join(root, "system")
	if err := os.Mkdir(own, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(own, "cgroup.procs"), []byte("0"), 0); err != nil {
		return err
	}
	for controller := range strings.FieldsSeq(string(controllers)) {
		if err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+"+controller), 0); err != nil {
			return fmt.Errorf("cgroup controller %s: %w", controller, err)
		}
	}
	return nil
}
