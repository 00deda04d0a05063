package issuance

import (
	"fmt"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

const (
	// tellEvery is how often a refusal of a peer's calls for the same reason leaves a line: the audit log must not become
	// the attack.
	tellEvery = 10 * time.Second
	// maxTold bounds the tallies of an account by name: those beyond it, of one address, share what is left.
	maxTold = 256
)

// told is when a refusal was last recorded, and how many came since.
type told map[subject]*tally

// subject is who was refused, and why.
type subject struct {
	name   string
	reason refusal.Reason
}

type tally struct {
	last time.Time
	left int
}

// of finds or opens a tally.
func (t told) of(s subject) *tally {
	if t[s] == nil && len(t) >= maxTold {
		s.name = ""
	}
	if t[s] == nil {
		t[s] = &tally{}
	}
	return t[s]
}

// tell records that a call was refused as a whole, for each name and reason now and then, and returns err.
func (a *accounts) tell(c *party, cluster string, err error) error {
	if left, say := a.due(c, refusal.Of(err), time.Now()); say {
		recorded := err
		if e, ok := refusal.From(err); ok && left > 0 {
			recorded = &refusal.Error{Reason: e.Reason, Claim: e.Claim, Detail: fmt.Sprintf("%s; %d more calls were refused for this since the last line", e.Detail, left)}
		}
		a.record(c.Caller, cluster, recorded)
	}
	return err
}

// due reports whether a refusal is to be recorded now, and how many were not since the last one that was.
func (a *accounts) due(c *party, reason refusal.Reason, now time.Time) (left int, say bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	all, in := a.crowd, a.addresses
	if c.agent {
		in = a.agents
	}
	if p := in[c.account]; p != nil {
		all = p.told
	}
	t := all.of(subject{c.name, reason})
	if now.Sub(t.last) < tellEvery {
		t.left++
		return 0, false
	}
	left, t.left, t.last = t.left, 0, now
	return left, true
}
