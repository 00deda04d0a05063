package sds

import (
	"strings"
	"testing"
	"time"
)

type faultyWire struct{ wire }

func (faultyWire) send(*answer) error { panic("a fault") }

// TestAFaultWhileSendingEndsItsStreamAlone: the sender's goroutine is its own, so a panic there would end the process.
func TestAFaultWhileSendingEndsItsStreamAlone(t *testing.T) {
	st := &stream{
		server: &Server{config: Config{Limits: Limits{Send: time.Minute}}},
		wire:   faultyWire{},
		sub:    subscription{delta: true},
		unread: sendsAtOnce,
	}
	defer st.clearDeadline()
	if err := st.send(&answer{size: 1}); err != nil {
		t.Fatalf("sent at once: %v", err)
	}
	if err := <-st.sent; err == nil || !strings.Contains(err.Error(), "a fault") {
		t.Errorf("the stream heard %v", err)
	}
}
