package csi

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestReadOnlyEverywhere: the agent mounts in its container's namespace, and the kubelet sees what propagates.
func TestReadOnlyEverywhere(t *testing.T) {
	needMounts(t)
	dir := t.TempDir()
	for _, name := range []string{"ours", "kubelets", "volume"} {
		must(t, os.Mkdir(filepath.Join(dir, name), 0o700))
	}
	ours, kubelets := filepath.Join(dir, "ours"), filepath.Join(dir, "kubelets")
	must(t, unix.Mount("tmpfs", ours, "tmpfs", 0, ""))
	defer func() { must(t, unmount(ours)) }()
	must(t, unix.Mount("", ours, "", unix.MS_SHARED, ""))
	must(t, unix.Mount(ours, kubelets, "", unix.MS_BIND, "")) // a peer, as the kubelet's namespace has it
	defer func() { must(t, unmount(kubelets)) }()
	must(t, os.Mkdir(filepath.Join(ours, "target"), 0o700))

	staged := filepath.Join(dir, "staged")
	must(t, bind(filepath.Join(dir, "volume"), staged, filepath.Join(ours, "target")))
	for _, at := range []string{ours, kubelets} {
		err := os.WriteFile(filepath.Join(at, "target", "file"), nil, 0o600)
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("writing in %s: %v", at, err)
		}
	}
	if _, err := os.Lstat(staged); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the stage stays: %v", err)
	}
	must(t, unmount(filepath.Join(ours, "target")))
	must(t, unmount(filepath.Join(ours, "target")))
	must(t, unmount(filepath.Join(ours, "nowhere")))
	must(t, os.WriteFile(filepath.Join(kubelets, "target", "file"), nil, 0o600))
}
