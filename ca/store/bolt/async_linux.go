//go:build linux && (amd64 || arm64)

package bolt

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// asyncFile has the kernel sync what was written asynchronously (io_submit(2)): who waits is parked, as for a network. In
// fdatasync(2) it would keep one of Go's processors from all others until the runtime notices, and a CA under load is in there
// a tenth of its time.
type asyncFile struct {
	*os.File
	done   *os.File // an eventfd, which counts what has ended
	queue  uintptr  // aio_context_t
	order  iocb
	orders [1]*iocb
}

// iocb and ioEvent are the kernel's (linux/aio_abi.h), on little-endian machines.
type iocb struct {
	_       uint64
	_       uint64
	opcode  uint16
	_       int16
	fd      uint32
	_       [4]uint64
	flags   uint32 // IOCB_FLAG_…
	eventfd uint32
}

type ioEvent struct {
	_, _ uint64
	res  int64
	_    int64
}

const (
	iocbFdsync = 3
	iocbResFD  = 1
)

// openAsync makes f such a file, or says why that is not to be had: old kernels and some sandboxes lack it.
func openAsync(f *os.File) (walFile, error) {
	a := &asyncFile{File: f}
	if err := a.open(); err != nil {
		return nil, errors.Join(err, a.release())
	}
	if err := a.sync(); err != nil { // some say only now that they cannot
		return nil, errors.Join(err, a.release())
	}
	return a, nil
}

func (a *asyncFile) open() error {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return err
	}
	a.done = os.NewFile(uintptr(fd), "eventfd")
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&a.queue)), 0); errno != 0 { //nolint:gosec // the kernel's interface takes addresses
		return fmt.Errorf("io_setup: %w", errno)
	}
	// Asked again, the eventfd's number would make it a blocking file.
	a.order = iocb{opcode: iocbFdsync, fd: uint32(a.Fd()), flags: iocbResFD, eventfd: uint32(fd)}
	a.orders[0] = &a.order
	return nil
}

// WriteDurably implements walFile.
func (a *asyncFile) WriteDurably(p []byte, at int64) error {
	if _, err := a.WriteAt(p, at); err != nil {
		return err
	}
	return a.sync()
}

// sync is fdatasync(2).
func (a *asyncFile) sync() error {
	if _, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, a.queue, 1, uintptr(unsafe.Pointer(&a.orders[0]))); errno != 0 { //nolint:gosec // as above
		return fmt.Errorf("io_submit: %w", errno)
	}
	// This is to be parked. If it fails, the next call waits.
	var count [8]byte
	_, _ = a.done.Read(count[:])
	for {
		var event ioEvent
		n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, a.queue, 1, 1, uintptr(unsafe.Pointer(&event)), 0, 0) //nolint:gosec // as above
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return fmt.Errorf("io_getevents: %w", errno)
		case n != 1:
			return fmt.Errorf("io_getevents: %d events", n)
		case event.res < 0:
			return unix.Errno(-event.res)
		}
		return nil
	}
}

// Close lets go of the file, too. Nothing is under way.
func (a *asyncFile) Close() error { return errors.Join(a.release(), a.File.Close()) }

func (a *asyncFile) release() (err error) {
	if queue := a.queue; queue != 0 {
		go func() { _, _, _ = unix.Syscall(unix.SYS_IO_DESTROY, queue, 0, 0) }() // the kernel takes some 20 ms for it
		a.queue = 0
	}
	if a.done != nil {
		err = a.done.Close()
		a.done = nil
	}
	return err
}
