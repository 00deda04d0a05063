//go:build !linux

package agent

import (
	"io/fs"
	"os"
)

// open hands the socket, which was born private, to its owner.
func open(path string, mode fs.FileMode, uid, gid *int) error {
	if uid != nil || gid != nil {
		u, g := -1, -1
		if uid != nil {
			u = *uid
		}
		if gid != nil {
			g = *gid
		}
		if err := os.Lchown(path, u, g); err != nil {
			return err
		}
	}
	return os.Chmod(path, mode.Perm())
}
