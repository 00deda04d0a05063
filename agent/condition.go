package agent

import "github.com/meshca/meshca/api/refusal"

// condition is the state of a workload as status and metrics name it.
type condition string

const (
	conditionPending condition = "pending" // the first SVID is on its way
	conditionFresh   condition = "fresh"   // an SVID is held, and nothing is wrong
	conditionStale   condition = "stale"   // an SVID is held, and its renewal fails
	conditionExpired condition = "expired" // the SVID ended before there was a new one
	conditionDenied  condition = "denied"  // an operator denied the identity
	conditionRefused condition = "refused" // nothing is held, and time alone will not change that
	conditionBroken  condition = "broken"  // the socket, or with nothing held the token file, cannot be used
)

var conditions = [...]condition{
	conditionPending, conditionFresh, conditionStale, conditionExpired, conditionDenied, conditionRefused, conditionBroken,
}

func (w *workload) condition() condition {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.standing()
}

// standing is the condition; w.mu is held.
func (w *workload) standing() condition {
	s := &w.state
	reason := refusal.Of(s.refused)
	switch {
	case s.tried && s.listening != nil:
		return conditionBroken
	case s.held != nil && s.withheld:
		return conditionPending
	case s.held != nil && s.failing:
		return conditionStale
	case s.held != nil:
		return conditionFresh
	case s.gone != nil:
		return conditionRefused
	case s.denied && (reason == refusal.IdentityDenied || w.home.denied(s.lastID)): // whatever else the CA refused it for since
		return conditionDenied
	case s.denied:
		return conditionRefused
	case s.expired:
		return conditionExpired
	case reason == refusal.TokenUnreadable, reason == refusal.TokenMissing, reason == refusal.TokenTooLarge:
		return conditionBroken
	case reason != "" && !reason.Passing() && reason != refusal.Internal:
		return conditionRefused
	default:
		return conditionPending
	}
}

// neverOpened reports whether the socket has not been tried yet.
func (w *workload) neverOpened() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.state.tried
}
