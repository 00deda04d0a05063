package main

import (
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
