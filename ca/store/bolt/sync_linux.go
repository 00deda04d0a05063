package bolt

import (
	"errors"

	"golang.org/x/sys/unix"
)

// sync makes what was written durable; of metadata only what is needed to read it again (fdatasync(2)).
func (f dataFile) sync() error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
