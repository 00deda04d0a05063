package main

import (
	"testing"
	"time"
)

// TestNothingIsPrunedAfterAJump: a clock that runs 40 days ahead must not cost the ledger its live entries.
func TestNothingIsPrunedAfterAJump(t *testing.T) {
	const days = 24 * time.Hour
	var c pruneClock
	for _, step := range []struct {
		what            string
		wall, monotonic time.Duration
		jump            time.Duration
		ok              bool
	}{
		{"at the start", 0, 0, 0, true},
		{"slewed by NTP", time.Hour + 2*time.Second, time.Hour, 0, true},
		{"40 days ahead", 40*days + 2*time.Hour, 2 * time.Hour, 40 * days, false},
		{"still so", 40*days + 3*time.Hour, 3 * time.Hour, 0, false},
		{"set right again", 4 * time.Hour, 4 * time.Hour, -40 * days, false},
		{"almost a day later", 27 * time.Hour, 27 * time.Hour, 0, false},
		{"a day later", 28 * time.Hour, 28 * time.Hour, 0, true},
	} {
		jump, ok := c.trusted(step.wall, step.monotonic)
		if jump != step.jump || ok != step.ok {
			t.Errorf("%s: jump %s, trusted %t; want %s, %t", step.what, jump, ok, step.jump, step.ok)
		}
	}
}
