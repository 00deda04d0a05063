package pods

import (
	"os"
	"path/filepath"
	"testing"

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
