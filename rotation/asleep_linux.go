package rotation

import (
	"syscall"
	"time"
	"unsafe"
)

// Clock ids of clock_gettime(2): CLOCK_BOOTTIME is CLOCK_MONOTONIC and the time that the machine was suspended.
const (
	clockMonotonic = 1
	clockBoottime  = 7
)

// asleep is how long the machine was suspended since it booted; 0 where the kernel does not tell.
func asleep() time.Duration {
	boot, ok := clock(clockBoottime)
	if !ok {
		return 0
	}
	mono, ok := clock(clockMonotonic)
	if !ok {
		return 0
	}
	return boot - mono
}

func clock(id uintptr) (time.Duration, bool) {
	var ts syscall.Timespec
	_, _, errno := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, id, uintptr(unsafe.Pointer(&ts)), 0) //nolint:gosec // clock_gettime(2) fills ts
	return time.Duration(ts.Nano()), errno == 0
}
