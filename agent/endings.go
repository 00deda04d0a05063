package agent

import (
	"math/big"
	"sync/atomic"
	"time"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/serial"
)

// askAfterEnd is within what time a workload that has ended with its cause is asked for again, each at a moment of its own:
// whoever comes next at its socket may have come already. A namespace of a thousand pods ends at once.
const askAfterEnd = 30 * time.Second

// endings are the SVIDs that have ended with their cause, as the CA said last, by serial number. The zero value is ready.
type endings struct {
	// whys is the whole set of now; a set is not changed once it is in it.
	whys atomic.Pointer[map[string]*refusal.Error]
}

// why is the reason for which the SVID has ended, or nil.
func (e *endings) why(h *held) error {
	if set := e.whys.Load(); set != nil {
		if why, ok := (*set)[h.serial()]; ok {
			return why
		}
	}
	return nil
}

// set takes the whole set. Only reasons that end a life count: whatever else a newer CA may mean by another reason, it cannot
// mean that nobody is there any more.
func (e *endings) set(list []*meshcav1.Ending) {
	set := make(map[string]*refusal.Error, len(list))
	for _, ending := range list {
		reason := refusal.Reason(ending.GetReason())
		if !reason.EndsLife() {
			continue
		}
		why := &refusal.Error{Reason: reason, Detail: ending.GetMessage()}
		for _, number := range ending.GetSerials() {
			set[serial.String(new(big.Int).SetBytes(number))] = why
		}
	}
	e.whys.Store(&set)
}

// applyEndings ends what the CA says has ended.
func (a *Agent) applyEndings(list []*meshcav1.Ending) {
	a.endings.set(list)
	for _, w := range a.roster.list() {
		if h := w.holds(); h != nil {
			a.die(w, a.endings.why(h))
		}
	}
}

// uprooted ends all that is held: the CA says of this agent itself that its node is no more, and nothing that runs on it can
// be what it was.
func (a *Agent) uprooted(why error) {
	for _, w := range a.roster.list() {
		if w.holds() != nil {
			a.die(w, why)
		}
	}
}

// die ends what a workload holds, unasked, and has it asked for again in a while. A nil why ends nothing.
func (a *Agent) die(w *workload, why error) {
	if why == nil {
		return
	}
	phase := w.phase()
	w.end(why)
	a.proxies.forget(w.Socket)
	a.metrics.ended.WithLabelValues(outcome(why)).Inc()
	w.retries.after(placeIn(askAfterEnd, phase), w.renewNow)
}

// ended is why an SVID has ended with its cause, or nil.
func (a *Agent) ended(h *held) error { return a.endings.why(h) }
