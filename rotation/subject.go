package rotation

import (
	"context"
	"time"
)

// Term is the life of one credential as measured when it was received. Durations, not moments: they are run down on
// the monotonic clock, so that a wall clock that jumps neither ends a credential early nor keeps a dead one.
type Term struct {
	// Life is T: from the moment of issue to the end.
	Life time.Duration
	// Left is what was left of it at Received.
	Left time.Duration
	// Received is when the credential came, with Go's monotonic reading where it came in this process.
	Received time.Time
	// NotBefore is since when verifiers take it, by the wall clock; zero: that is not looked at.
	NotBefore time.Time
}

// End is when the credential ends, by the monotonic clock where Received has one.
func (t Term) End() time.Time { return t.Received.Add(t.Left) }

// Remaining is what is left at now; negative once it has ended.
func (t Term) Remaining(now time.Time) time.Duration { return t.Left - now.Sub(t.Received) }

// Issued is the moment of issue, on the clock of Received.
func (t Term) Issued() time.Time { return t.Received.Add(t.Left - t.Life) }

// Subject is a credential that Keep keeps fresh.
type Subject interface {
	// Renew replaces the credential and puts the new one into use before it returns its term. It returns before ctx
	// ends. An error leaves the old credential in use; what errs with refusal.Error's RetryAfter is tried no sooner.
	Renew(ctx context.Context) (Term, error)
	// Due says when the successor of a credential with this term is to be fetched; a pure function, see Schedule.
	Due(t Term) time.Time
	// Expired is told once when the credential's term ends with no successor: whoever serves it must stop.
	Expired()
}
