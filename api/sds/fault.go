package sds

import (
	"fmt"
	"runtime/debug"

	"github.com/meshca/meshca/api/refusal"
)

// fault is a panic of a goroutine that works for a stream. The stream's own goroutine panics with it again: there the
// server's interceptors can log it and refuse the call, elsewhere it would end the process.
type fault struct {
	value any
	stack []byte
}

var _ error = (*fault)(nil)

// caught makes a fault of what recover returned, in the goroutine that panicked; nil where it did not.
func caught(value any) error {
	if value == nil {
		return nil
	}
	return &fault{value: value, stack: debug.Stack()}
}

// Panicked is what whoever recovers may log: what happened, and where.
func (f *fault) Panicked() string { return fmt.Sprintf("%s\n\n%s", refusal.Panicked(f.value), f.stack) }

// Error is the same: it is for whoever recovers, and never sent.
func (f *fault) Error() string { return f.Panicked() }

// raise panics with a fault that another goroutine handed over; any other err it leaves alone.
func raise(err error) {
	if f, ok := err.(*fault); ok { //nolint:errorlint // faults are handed over as they are
		panic(f)
	}
}
