package agent

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/meshca/meshca/api/refusal"
)

// condition is the state of a workload as status and metrics name it.
type condition string

const (
	conditionPending   condition = "pending"   // the first SVID is on its way
	conditionFresh     condition = "fresh"     // an SVID is held, and nothing is wrong
	conditionStale     condition = "stale"     // an SVID is held, and its renewal fails
	conditionUntrusted condition = "untrusted" // an SVID is held that the trust bundle refuses
	conditionExpired   condition = "expired"   // the SVID ended before there was a new one
	conditionDenied    condition = "denied"    // an operator denied the identity
	conditionRefused   condition = "refused"   // nothing is held, and time alone will not change that
	conditionBroken    condition = "broken"    // the socket, or with nothing held the token file, cannot be used
)

var conditions = [...]condition{
	conditionPending, conditionFresh, conditionStale, conditionUntrusted, conditionExpired, conditionDenied, conditionRefused, conditionBroken,
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
	case s.held != nil && s.untrusted != nil:
		return conditionUntrusted
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

// verify holds what is held against the bundle that is served with it, and against the CA's clock; w.mu is held. What they
// refuse peers refuse as well, so it is renewed whatever its schedule says.
func (w *workload) verify(b *spiffebundle.Bundle) {
	h, before := w.state.held, w.state.untrusted
	if w.state.untrusted = w.refusedBy(b); w.state.untrusted == nil {
		w.mend.cancel()
		return
	}
	if before == nil {
		w.log.Warn("an SVID that is held verifies for nobody; it is renewed now", "spiffe_id", h.svid.ID.String(), "error", w.state.untrusted)
	}
	w.mend.after(placeIn(h.soon(), w.place()), w.renewNow)
}

// refusedBy is why peers with the bundle, and a clock like the CA's, refuse what is held; w.mu is held. That it has ended is
// another matter, and that there is no bundle, too.
func (w *workload) refusedBy(b *spiffebundle.Bundle) *refusal.Error {
	h, now := w.state.held, w.now()
	if h == nil || h.ended(now) || len(b.X509Authorities()) == 0 {
		return nil
	}
	if err := h.verify(b, now); err != nil {
		sequence, _ := b.SequenceNumber()
		return refusal.New(refusal.SVIDUntrusted, "the trust bundle (sequence %d) that is served with %s refuses it: %w", sequence, h.svid.ID, err)
	}
	if ahead := h.ahead(w.theirs, now); ahead > datedBack {
		return refusal.New(refusal.SVIDUntrusted, "%s is valid in %s only: the CA's clock was ahead when it issued it", h.svid.ID, ahead.Round(time.Second))
	}
	return nil
}

// doubt is why the bundle refuses what is held, and why that is not renewed; nil: it does not.
func (s *state) doubt() error {
	switch {
	case s.held == nil || s.untrusted == nil:
		return nil
	case s.failing && s.refused != nil:
		return refusal.New(refusal.SVIDUntrusted, "%s; its renewal fails: %v", s.untrusted.Detail, s.refused)
	}
	return s.untrusted
}

// neverOpened reports whether the socket has not been tried yet.
func (w *workload) neverOpened() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.state.tried
}
