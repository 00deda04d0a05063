package registration

import (
	"bytes"
	"cmp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Ring remembers recent decisions, a fixed number of each of three kinds: what was issued, what was refused to someone
// proven (a token or an agent), and what was refused to strangers. They do not push each other out, so neither a busy
// fleet nor a stranger with made-up tokens can make the CA forget why a proxy was refused. A decision takes some 600 bytes
// of memory, with the longest names that can be 8 KiB, and the place of one that is still to come 32 bytes.
type Ring struct {
	mu    sync.Mutex
	count uint64 // of decisions so far: clocks are set, and do not tell which came first
	kinds [3]circle
	// between lets others have the lock between two pieces of a search: a processor that goes on at once has it again before
	// one that waits is awake.
	between func()
}

// circle holds decisions in their encoded form, which has no pointers: as structs they would be most of what the
// collector has to walk in a busy CA, at every collection.
type circle struct {
	slots []slot
	next  int
	full  bool
}

type slot struct {
	number  uint64
	decided []byte
}

// NewRing returns a Ring that remembers size decisions of each kind.
func NewRing(size int) *Ring {
	r := &Ring{between: runtime.Gosched}
	for i := range r.kinds {
		r.kinds[i].slots = make([]slot, max(size, 1))
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
	var room [1 << 10]byte
	encoded := d.encode(room[:0])
	r.mu.Lock()
	defer r.mu.Unlock()
	c := &r.kinds[kind]
	s := &c.slots[c.next]
	r.count++
	s.number = r.count
	// The room of the one before, unless it was so long that it would be held for nothing.
	if have, want := cap(s.decided), len(encoded); have < want || have > 2*want {
		s.decided = make([]byte, 0, want)
	}
	s.decided = append(s.decided[:0], encoded...)
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
	names := []string{id}
	if plain {
		names = append(names, account)
	}
	return r.find(n, names, func(d *Decision) bool {
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
	return r.find(n, []string{name}, func(d *Decision) bool {
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
			since = later(since, decode(c.slots[c.next].decided).Time)
		}
	}
	return since
}

// find returns the newest n of those that are wanted. Only those that have one of the names somewhere are looked at in full.
func (r *Ring) find(n int, names []string, wanted func(*Decision) bool) []Decision {
	type hit struct {
		number   uint64
		decision Decision
	}
	var found []hit
	for i := range r.kinds {
		hits := 0
		r.look(&r.kinds[i], func(s *slot) bool {
			if !slices.ContainsFunc(names, func(name string) bool { return bytes.Contains(s.decided, []byte(name)) }) {
				return true
			}
			if d := decode(s.decided); wanted(&d) {
				found = append(found, hit{s.number, d})
				hits++
			}
			return hits < n
		})
	}
	slices.SortFunc(found, func(x, y hit) int { return cmp.Compare(y.number, x.number) })
	decisions := make([]Decision, min(n, len(found)))
	for i := range decisions {
		decisions[i] = found[i].decision
	}
	return decisions
}

// looked is how many decisions are looked at at a time. Who issues waits meanwhile, about as long as an issuance takes; who
// searches gets its turn again after some milliseconds in a busy CA, so pieces must not be many either.
const looked = 512

// look calls fn for those that are remembered of a kind as it begins, the newest first, until it says no. What is added
// meanwhile takes the places of the oldest, at which it ends.
func (r *Ring) look(c *circle, fn func(*slot) bool) {
	r.mu.Lock()
	newest, last, held := c.next-1, r.count, c.next
	if c.full {
		held = len(c.slots)
	}
	r.mu.Unlock()
	for k := 0; k < held; k += looked {
		if !r.some(c, newest-k, min(looked, held-k), last, fn) {
			return
		}
		r.between()
	}
}

// some calls fn for n of them, back from a place, and reports whether to go on.
func (r *Ring) some(c *circle, newest, n int, last uint64, fn func(*slot) bool) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k := range n {
		if s := &c.slots[(newest-k+len(c.slots))%len(c.slots)]; s.number > last || !fn(s) {
			return false
		}
	}
	return true
}
