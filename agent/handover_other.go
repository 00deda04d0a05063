//go:build !linux

package agent

import (
	"io/fs"
	"os"
)

// handOver hands the socket, which was born private, to its owner.
func handOver(path string, mode fs.FileMode, uid, gid *int) error {
	if uid != nil || gid != nil {
		u, g := owners(uid, gid)
		if err := os.Lchown(path, u, g); err != nil {
			return err
		}
	}
	return os.Chmod(path, mode.Perm())
}
