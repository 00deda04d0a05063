package agent

import (
	"errors"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/sds"
)

// verdict is what the CA says of one request for an SVID. An error of the call as a whole is none: it speaks of the
// agent, or of the CA; nor is one that can be meant for nobody but the agent (meetsCaller).
type verdict struct{ error }

func (v verdict) Unwrap() error { return v.error }

func isVerdict(err error) bool {
	var v verdict
	return errors.As(err, &v)
}

// endsGrant reports whether a refusal says that policy grants the identity no longer. A condition that errs
// (POLICY_ERROR) says nothing of the kind: it is as likely a slip in the policy as the workload's doing.
func endsGrant(r refusal.Reason) bool {
	switch r {
	case refusal.IdentityDenied, refusal.PolicyDenied, refusal.PolicyNoRule, refusal.NodeVouchedNotAllowed:
		return true
	}
	return false
}

// judge does what a refused renewal means for what is held. now is whose the token was. Most refusals mean nothing: what
// is held was given for good reason and lasts until its end.
func (w *workload) judge(now Bearer, refused error) {
	reason := refusal.Of(refused)
	switch {
	case isVerdict(refused) && endsGrant(reason):
		w.drop(refused)
	case isVerdict(refused) && reason.EndsLife():
		w.end(refused)
	case isVerdict(refused):
		w.handedOver(now, refused)
	}
}

// handedOver withdraws what is held, or what an earlier run held, if it was given to somebody else than the bearer of
// now, whom the CA refuses for good: who is at the socket now must not have the identity of who was there before. While
// the CA cannot be asked, what is held is served on. Files that an earlier run left are judged by who keeps them: see
// Materials.
func (w *workload) handedOver(now Bearer, refused error) {
	e, ok := refusal.From(refused)
	if !ok || e.Reason.Passing() || e.Reason.Code() == codes.Internal {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state.turnedAway != now {
		w.state.turnedAway = now
		w.changed.Set(struct{}{})
	}
	if h := w.state.held; h != nil && h.bearer.Other(now) {
		w.log.Warn("the token file names somebody else, who is refused; the SVID given for the token before is served no longer",
			"spiffe_id", h.svid.ID.String(), "error", refused)
		w.withdraw()
	} else if h == nil && w.state.former.Other(now) {
		w.log.Warn("the token file names somebody else than before the agent's restart, who is refused; what is left of the one before goes", "error", refused)
		w.state.had, w.state.former = true, Bearer{}
		w.withdraw()
	}
}

// Expired withdraws the SVID: nothing is served that has ended.
func (w *workload) Expired() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state.held != nil { // or it was withdrawn before
		w.expire()
	}
}

// expire withdraws what is held, because it has ended; w.mu is held.
func (w *workload) expire() {
	w.log.Error("an SVID has ended before a new one could be had; it is served no longer", "spiffe_id", w.state.held.svid.ID.String())
	w.state.expired = true
	w.withdraw()
}

// drop withdraws the SVID because the identity is denied, by an operator or by policy, and ends the streams that had it: a
// proxy's log says why then. Those that come back are served the bundle.
func (w *workload) drop(why error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.state.held != nil:
		w.log.Warn("an SVID is dropped, and the streams that had it end", "spiffe_id", w.state.held.svid.ID.String(), "why", why.Error())
		w.state.parting = &sds.Parting{Why: why}
	case refusal.Of(w.state.refused) != refusal.Of(why):
		w.log.Warn("no SVID is granted", "why", why.Error())
	}
	w.state.denied = true
	w.state.refused, w.state.refusedAt = why, time.Now()
	w.withdraw()
}

// end withdraws the SVID and ends the streams, because there is nobody any more whom it could be served to. The socket
// stays open: the next pod's token may take the place of this one's, and then all is served again.
func (w *workload) end(why error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state.gone == nil {
		w.log.Warn("the workload is gone; nothing is served to it any more, and its streams end", "spiffe_id", w.state.lastID.String(), "why", why.Error())
	}
	w.state.gone = why
	w.state.refused, w.state.refusedAt = why, time.Now()
	w.withdraw()
}

// withdraw forgets what is held, on disk too; w.mu is held.
func (w *workload) withdraw() {
	w.state.held, w.state.withheld = nil, false
	if err := w.home.keep(w, nil); err != nil {
		w.log.Error("a withdrawn SVID cannot be removed from the runtime directory", "error", err)
	}
	w.publish()
}

// denials looks at what is denied now: what is held must go, what was withheld until now may be served, and what was
// denied and is no longer is asked for again.
func (w *workload) denials() {
	w.mu.Lock()
	h, was := w.state.held, w.state.denied
	w.mu.Unlock()
	switch {
	case h != nil && w.home.denied(h.svid.ID):
		w.drop(refusal.New(refusal.IdentityDenied, "an operator denied %s", h.svid.ID))
	case h != nil:
		w.release()
	case was:
		// Whose the token is only the CA knows, so ask it: it still says no when another denial was lifted.
		w.renewNow()
	}
}

// release serves what was withheld.
func (w *workload) release() {
	w.mu.Lock()
	defer w.mu.Unlock()
	// Asked again under the lock, as install does.
	if h := w.state.held; h == nil || !w.state.withheld || w.home.denied(h.svid.ID) {
		return
	}
	w.state.withheld, w.state.had = false, true
	w.publish()
}

// condemned reports whether a verdict stands because of which nothing is held.
func (s *state) condemned() bool { return s.held == nil && (s.denied || s.gone != nil) }
