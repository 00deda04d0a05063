package registration

import (
	"slices"
	"sync"
	"time"
)

// Ring remembers recent decisions, a fixed number of each kind: what was issued, what was refused to someone proven (a
// token or an agent), and what was refused to strangers. They do not push each other out, so neither a busy fleet nor a
// stranger with made-up tokens can make the CA forget why a proxy was refused.
type Ring struct {
	mu    sync.Mutex
	kinds [3]circle
}

type circle struct {
	slots []Decision
	next  int
	full  bool
}

// NewRing returns a Ring that remembers size decisions of each kind.
func NewRing(size int) *Ring {
	r := &Ring{}
	for i := range r.kinds {
		r.kinds[i].slots = make([]Decision, max(size, 1))
	}
	return r
}

func (r *Ring) add(d *Decision) {
	kind := 1
	switch {
	case d.Outcome == OutcomeIssued:
		kind = 0
	case !d.Evidence.Proven && d.Caller.ID.IsZero():
		kind = 2
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c := &r.kinds[kind]
	c.slots[c.next] = *d
	c.next++
	if c.next == len(c.slots) {
		c.next, c.full = 0, true
	}
}

// ByID returns up to n decisions about a SPIFFE ID (as what was granted, or as the caller's own), newest first.
func (r *Ring) ByID(id string, n int) []Decision {
	return r.find(n, func(d *Decision) bool {
		if !d.ID.IsZero() {
			return d.ID.String() == id
		}
		// Refused before policy was asked: of what is not about a workload's token, the caller is the one it is about.
		return d.agent() == id && (d.Event != eventIssue || d.Evidence.Identity.IsZero())
	})
}

// ByPod returns up to n decisions about a pod, newest first.
func (r *Ring) ByPod(namespace, name string, n int) []Decision {
	return r.find(n, func(d *Decision) bool {
		return d.Evidence.PodName == name && d.Evidence.Identity.Namespace() == namespace
	})
}

// Since is the time of the oldest decision that is certain to be remembered; zero when none was forgotten yet.
func (r *Ring) Since() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	var since time.Time
	for i := range r.kinds {
		if c := &r.kinds[i]; c.full {
			since = later(since, c.slots[c.next].Time)
		}
	}
	return since
}

func (r *Ring) find(n int, wanted func(*Decision) bool) []Decision {
	var found []Decision
	r.mu.Lock()
	for i := range r.kinds {
		c := &r.kinds[i]
		held := c.next
		if c.full {
			held = len(c.slots)
		}
		for k, hits := 0, 0; k < held && hits < n; k++ {
			if d := &c.slots[(c.next-1-k+len(c.slots))%len(c.slots)]; wanted(d) {
				found = append(found, *d)
				hits++
			}
		}
	}
	r.mu.Unlock()
	slices.SortStableFunc(found, func(x, y Decision) int { return y.Time.Compare(x.Time) })
	return found[:min(n, len(found))]
}
