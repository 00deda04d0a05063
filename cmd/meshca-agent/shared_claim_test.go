package main

import (
	"log/slog"
	"testing"

	"github.com/meshca/meshca/agent/pods"
	"github.com/meshca/meshca/attestor/unixpeer"
)

// The two do not know each other, and must mean the same.
func TestThePeersThatNobodySees(t *testing.T) {
	if pods.Invisible != unixpeer.Invisible {
		t.Errorf("%q is not %q", pods.Invisible, unixpeer.Invisible)
	}
}

// Switched off, the agent takes away what one before it left where the socket is by default, unless something else is there.
func TestASharedSocketThatIsOff(t *testing.T) {
	whole := &Config{RuntimeDir: "/run/meshca-agent", StateDir: "/var/lib/meshca-agent", AdminSocket: "/run/meshca-agent/admin.sock"}
	if _, is := whole.SharedSocket.source(whole, slog.New(slog.DiscardHandler)).(pods.Leftovers); !is {
		t.Error("what is left stays")
	}
	whole.Workloads = []WorkloadConfig{{Socket: "/run/meshca-agent/shared/agent.sock"}}
	if s := whole.SharedSocket.source(whole, slog.New(slog.DiscardHandler)); s != nil {
		t.Errorf("a workload's socket is taken for what is left: %v", s)
	}
	whole.Workloads, whole.SharedSocket.Enabled = nil, true
	if _, is := whole.SharedSocket.source(whole, slog.New(slog.DiscardHandler)).(*pods.Source); !is {
		t.Error("switched on, it is not there")
	}
}
