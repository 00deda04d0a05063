//go:build linux && (amd64 || arm64)

package bolt

import (
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// asyncFile writes by the kernel's asynchronous I/O (io_submit(2)): who waits is parked, as for a network. In pwrite(2) and
// fdatasync(2) it would keep one of Go's processors from all others until the runtime notices, and a CA under load is in
// there a tenth of its time.
type asyncFile struct {
	*os.File
	direct *os.File // opened with O_DIRECT, without which the kernel waits in io_submit
	done   *os.File // an eventfd, which counts what has ended
	// Of these two the numbers are kept, as asking a file for it makes it a blocking one.
	directFD, doneFD uint32
	queue            uintptr // aio_context_t
	buffer           []byte  // in a mapping of its own, as O_DIRECT wants whole pages
	order            iocb
	orders           [1]*iocb
}

// iocb and ioEvent are the kernel's (linux/aio_abi.h), on little-endian machines.
type iocb struct {
	_       uint64
	_       uint32
	flags   uint32 // RWF_…
	opcode  uint16
	_       int16
	fd      uint32
	buf     uint64
	bytes   uint64
	offset  int64
	_       uint64
	extra   uint32 // IOCB_FLAG_…
	eventfd uint32
}

type ioEvent struct {
	_, _ uint64
	res  int64
	_    int64
}

const (
	iocbPwrite = 1
	iocbResFD  = 1
	rwfDsync   = 2
)

// openAsync opens a file a second time, for writing as above, or says why that is not to be had: file systems, kernels and
// sandboxes may lack it.
func openAsync(f *os.File, size areaSize) (walFile, error) {
	a := &asyncFile{File: f}
	if err := a.open(size); err != nil {
		return nil, errors.Join(err, a.release())
	}
	// Some say only now that they cannot.
	if err := a.WriteDurably(make([]byte, walBlock), size.start(0)); err != nil {
		return nil, errors.Join(err, a.release())
	}
	return a, nil
}

func (a *asyncFile) open(size areaSize) (err error) {
	if a.direct, err = os.OpenFile(a.Name(), os.O_WRONLY|unix.O_DIRECT, 0); err != nil {
		return err
	}
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return err
	}
	a.done = os.NewFile(uintptr(fd), "eventfd")
	a.directFD, a.doneFD = uint32(a.direct.Fd()), uint32(fd)
	if a.buffer, err = unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&a.queue)), 0); errno != 0 { //nolint:gosec // the kernel's interface takes addresses
		return fmt.Errorf("io_setup: %w", errno)
	}
	a.orders[0] = &a.order
	return nil
}

// WriteDurably implements walFile.
func (a *asyncFile) WriteDurably(p []byte, at int64) error {
	if len(p) > len(a.buffer) {
		return io.ErrShortBuffer
	}
	n := copy(a.buffer, p)
	address := uint64(uintptr(unsafe.Pointer(&a.buffer[0]))) //nolint:gosec // the kernel's interface takes addresses
	a.order = iocb{opcode: iocbPwrite, flags: rwfDsync, fd: a.directFD, buf: address, bytes: uint64(n), offset: at, extra: iocbResFD, eventfd: a.doneFD}
	if _, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, a.queue, 1, uintptr(unsafe.Pointer(&a.orders[0]))); errno != 0 { //nolint:gosec // the kernel's interface takes addresses
		return fmt.Errorf("io_submit: %w", errno)
	}
	var count [8]byte
	if _, err := a.done.Read(count[:]); err != nil {
		return err
	}
	var event ioEvent
	if _, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, a.queue, 1, 1, uintptr(unsafe.Pointer(&event)), 0, 0); errno != 0 { //nolint:gosec // the kernel's interface takes addresses
		return fmt.Errorf("io_getevents: %w", errno)
	}
	switch {
	case event.res < 0:
		return unix.Errno(-event.res)
	case event.res != int64(n):
		return io.ErrShortWrite
	}
	return nil
}

// Close lets go of the file, too. Nothing is under way.
func (a *asyncFile) Close() error { return errors.Join(a.release(), a.File.Close()) }

func (a *asyncFile) release() error {
	var errs []error
	if queue := a.queue; queue != 0 {
		go func() { _, _, _ = unix.Syscall(unix.SYS_IO_DESTROY, queue, 0, 0) }() // the kernel takes some 20 ms for it
		a.queue = 0
	}
	if a.buffer != nil {
		errs = append(errs, unix.Munmap(a.buffer))
		a.buffer = nil
	}
	for _, f := range []*os.File{a.direct, a.done} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	a.direct, a.done = nil, nil
	return errors.Join(errs...)
}
