// Package selinux labels what pods share with the agent.
package selinux

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Label gives a directory that pods mount the label that containers may read, where SELinux is on. Its level has no categories,
// so it lies below that of every container; what is made in the directory later takes the label over from it.
func Label(path string) error { return labelWhere("/sys/fs/selinux", path, unix.Lsetxattr) }

const fileLabel = "system_u:object_r:container_file_t:s0"

// labelWhere asks by the directory that the kernel makes for selinuxfs when SELinux is on, mounted or not.
func labelWhere(selinux, path string, setxattr func(path, attr string, data []byte, flags int) error) error {
	if _, err := os.Stat(selinux); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	err := setxattr(path, "security.selinux", []byte(fileLabel+"\x00"), 0)
	if err != nil && !errors.Is(err, unix.ENOTSUP) {
		return fmt.Errorf("the SELinux label of %s: %w", path, err)
	}
	return nil
}
