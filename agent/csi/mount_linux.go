package csi

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

const readOnly = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// bind mounts dir read-only at target, by way of staged, where nobody sees it yet. A mount takes its flags along when it
// is mounted again or propagates; but when flags change later, that does not propagate: mounted at target first and made
// read-only there, it would be so in the agent's own mount namespace, and writable in the kubelet's.
func bind(dir, staged, target string) (err error) {
	if err := os.Mkdir(staged, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := unix.Mount(dir, staged, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting %s at %s: %w", dir, staged, err)
	}
	defer func() { err = errors.Join(err, unmount(staged), os.Remove(staged)) }()
	if err := unix.Mount("", staged, "", unix.MS_BIND|unix.MS_REMOUNT|readOnly, ""); err != nil {
		return fmt.Errorf("making %s read-only: %w", staged, err)
	}
	if err := unix.Mount(staged, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting %s at %s: %w", staged, target, err)
	}
	return nil
}

// mostMounts bounds how many mounts at one place are taken away at once.
const mostMounts = 64

// unmount takes away whatever is mounted at path, also when it is in use: then it goes from the tree now, and from the
// kernel when the last user has left it. Where nothing is mounted it does nothing.
func unmount(path string) error {
	for range mostMounts {
		err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
			return nil // not a mount point (any more)
		case err != nil:
			return fmt.Errorf("unmounting %s: %w", path, err)
		}
	}
	return fmt.Errorf("unmounting %s: %d mounts lie there, one over the other, and more", path, mostMounts)
}

// mounts are those of the agent's mount namespace.
func mounts() ([]mountPoint, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMounts(f)
}
