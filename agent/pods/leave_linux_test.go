package pods

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Whether somebody has the directory mounted is read from the mounts of all processes; this one's own are among them.
func TestMounted(t *testing.T) {
	if os.Geteuid() != 0 || os.Getpid() == 1 {
		t.Skip("needs root, and to be one process among others")
	}
	dir, other, at := filepath.Join(t.TempDir(), "shared"), filepath.Join(t.TempDir(), "shared"), filepath.Join(t.TempDir(), "in a pod")
	for _, d := range []string{dir, other, at} {
		must(t, os.Mkdir(d, 0o755))
	}
	if mounted(dir) {
		t.Error("nobody has it mounted")
	}
	if err := unix.Mount(dir, at, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	if !mounted(dir) {
		t.Error("that it is mounted is not seen")
	}
	// Here there may be processes that this one may not look at, and then nobody knows.
	if _, err := os.Readlink("/proc/1/ns/mnt"); err == nil && mounted(other) {
		t.Error("another one of that name is said to be mounted")
	}
	if mounted(filepath.Join(dir, "gone")) {
		t.Error("what is not there is said to be mounted")
	}
}

// A process may end while its mounts are read: that says nothing of the others in its namespace.
func TestMountedBehindAProcessThatEnds(t *testing.T) {
	proc := t.TempDir()
	for _, process := range []string{"10", "11", "12"} {
		must(t, os.MkdirAll(filepath.Join(proc, process, "ns"), 0o755))
		must(t, os.Symlink("mnt:[1]", filepath.Join(proc, process, "ns/mnt")))
	}
	at := mountPlace{"0:25", "/meshca agent/shared"}
	list := func(process, device string) {
		line := fmt.Sprintf(`100 99 %s /meshca\040agent/shared /run/meshca-agent ro,relatime - tmpfs tmpfs rw`+"\n", device)
		must(t, os.WriteFile(filepath.Join(proc, process, "mountinfo"), []byte(line), 0o600))
	}
	if list("12", "0:26"); at.mountedBy(proc) {
		t.Error("a directory of another file system is said to be this one")
	}
	if list("12", "0:25"); !at.mountedBy(proc) {
		t.Error("it is not seen behind two processes of its namespace that have ended")
	}
	if list("11", "0:26"); at.mountedBy(proc) {
		t.Error("a namespace is looked at again")
	}
}

// A mount of any pod's can be below a file system whose server does not answer: looking at it would never end.
func TestMountedDoesNotWaitForFileSystems(t *testing.T) {
	if os.Geteuid() != 0 || os.Getpid() == 1 {
		t.Skip("needs root, and to be one process among others")
	}
	dir, other, dead := filepath.Join(t.TempDir(), "shared"), filepath.Join(t.TempDir(), "shared"), t.TempDir()
	for _, d := range []string{dir, other, filepath.Join(dead, "at")} {
		must(t, os.Mkdir(d, 0o755))
	}
	if err := unix.Mount(other, filepath.Join(dead, "at"), "", unix.MS_BIND, ""); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(filepath.Join(dead, "at"), unix.MNT_DETACH) })
	server, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	if err := unix.Mount("fuse", dead, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", server.Fd())); err != nil {
		t.Skipf("cannot mount: %v", err)
	}
	t.Cleanup(func() {
		_ = server.Close() // who waits for it is told
		_ = unix.Unmount(dead, unix.MNT_DETACH)
	})
	proc := t.TempDir() // there may be processes that this one may not look at, which ends the search
	must(t, os.Symlink(fmt.Sprintf("/proc/%d", os.Getpid()), filepath.Join(proc, "1")))
	own, err := os.Open(dir)
	must(t, err)
	defer own.Close()
	at, err := placeOf(own)
	must(t, err)
	said := make(chan bool, 1)
	go func() { said <- at.mountedBy(proc) }()
	select {
	case is := <-said:
		if is {
			t.Error("another one of that name is said to be this one")
		}
	case <-time.After(30 * time.Second):
		t.Error("it waits for a file system that does not answer")
	}
}
