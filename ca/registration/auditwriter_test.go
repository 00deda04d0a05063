package registration

import (
	"errors"
	"testing"
)

type broken struct{ err error }

func (b broken) Write([]byte) (int, error) { return 0, b.err }

// TestAFaultOutlivesWhatWasToldOfIt: a line that is lost while the others are told is a new fault.
func TestAFaultOutlivesWhatWasToldOfIt(t *testing.T) {
	full := errors.New("full")
	a := &auditWriter{w: broken{full}}
	_, _ = a.Write([]byte("one\n"))
	told, _ := a.state()
	_, _ = a.Write([]byte("two\n"))
	a.restored(told)
	if lost, fault := a.state(); lost != 1 || !errors.Is(fault, full) {
		t.Errorf("%d lost (%v), want 1", lost, fault)
	}
	a.restored(1)
	if lost, fault := a.state(); lost != 0 || fault != nil {
		t.Errorf("%d lost (%v), want none", lost, fault)
	}
}
