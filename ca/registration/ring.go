package registration

import (
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Ring remembers recent decisions, a fixed number of each of three kinds: what was issued, what was refused to someone
// proven (a token or an agent), and what was refused to strangers. They do not push each other out, so neither a busy
// fleet nor a stranger with made-up tokens can make the CA forget why a proxy was refused. A decision takes half a
// kilobyte of memory, the place of one that is still to come included, and with the longest names that can be, 8 KiB.
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
	kept := *d
	// The message says what was untrusted; the error would hold a stranger's whole certificate. And a message may be the
	// beginning of a longer text, all of which it would hold.
	kept.Caller.Untrusted = nil
	kept.Evidence.Facts = nil // a pod's labels and annotations, of which nothing is shown
	kept.Message = strings.Clone(kept.Message)
	r.mu.Lock()
	defer r.mu.Unlock()
	c := &r.kinds[kind]
	c.slots[c.next] = kept
	c.next++
	if c.next == len(c.slots) {
		c.next, c.full = 0, true
	}
}

// ByID returns up to n decisions about a SPIFFE ID, newest first: those in which policy granted it, and of those that were
// refused before policy granted any, the ones about the service account that the ID names in its plain form
// (policy.DefaultTemplate), and the ones about an agent whose own ID it is.
func (r *Ring) ByID(id string, n int) []Decision {
	namespace, account, plain := plainForm(id)
	return r.find(n, func(d *Decision) bool {
		if !d.ID.IsZero() {
			return d.ID.String() == id
		}
		if who := d.Evidence.Identity; d.Event == eventIssue && !who.IsZero() {
			return plain && who.Namespace() == namespace && who.ServiceAccount() == account
		}
		return d.agent() == id
	})
}

// plainForm takes a SPIFFE ID apart that has the path /ns/NAMESPACE/sa/ACCOUNT.
func plainForm(id string) (namespace, account string, ok bool) {
	parsed, err := spiffeid.FromString(id)
	if err != nil {
		return "", "", false
	}
	parts := strings.Split(parsed.Path(), "/")
	if len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" {
		return "", "", false
	}
	return parts[2], parts[4], true
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
