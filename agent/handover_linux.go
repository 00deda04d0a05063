package agent

import (
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// handOver hands the socket, which was born private, to its owner. A pod that shares the directory can put anything in its place at
// any moment, such as a link to a file that it would have given away: so what is handed over is held first, and looked at.
func handOver(path string, mode fs.FileMode, uid, gid *int) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	var held unix.Stat_t
	if err := unix.Fstat(fd, &held); err != nil {
		return &fs.PathError{Op: "fstat", Path: path, Err: err}
	}
	if held.Mode&unix.S_IFMT != unix.S_IFSOCK || held.Uid != uint32(os.Geteuid()) || held.Nlink > 1 {
		return fmt.Errorf("%s is not the socket that was made there: somebody has put something else in its place", path)
	}
	if uid != nil || gid != nil {
		u, g := owners(uid, gid)
		if err := unix.Fchownat(fd, "", u, g, unix.AT_EMPTY_PATH); err != nil {
			return &fs.PathError{Op: "chown", Path: path, Err: err}
		}
	}
	return os.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), mode.Perm())
}
