package agent

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// Reader takes trust bundles elsewhere than over SDS, such as into files. The agent tells the CA that its node has a bundle
// when its readers have taken it, too. Its methods are safe for concurrent use.
type Reader struct {
	of   *readers
	name string
	// What of.mu guards:
	sequence uint64
	fault    string
	shown    Delivery
}

// Delivery is what a reader shows of itself to operators.
type Delivery struct {
	// WrittenAt is when it last put something where it belongs; zero: not in this run.
	WrittenAt time.Time
	// After is what it does after a change, in words; empty: nothing. AfterAt is when that succeeded last.
	After   string
	AfterAt time.Time
	// Failures counts what failed, Fault is what is wrong now; empty: nothing.
	Failures uint64
	Fault    string
}

// readers are those of now.
type readers struct {
	mu      sync.Mutex
	all     map[*Reader]struct{}
	changed rotation.Current[struct{}]
}

// NewReader returns a reader that has taken nothing yet: from now on, bundles wait for it until Close. name is what
// operators are shown when it makes them wait.
func (a *Agent) NewReader(name string) *Reader {
	r := &Reader{of: &a.readers, name: name}
	a.readers.mu.Lock()
	defer a.readers.mu.Unlock()
	if a.readers.all == nil {
		a.readers.all = make(map[*Reader]struct{})
	}
	a.readers.all[r] = struct{}{}
	return r
}

// Took says that the bundle with this sequence, and so all before it, is where it belongs.
func (r *Reader) Took(sequence uint64) {
	r.of.mu.Lock()
	r.sequence, r.fault = max(r.sequence, sequence), ""
	r.of.mu.Unlock()
	r.of.changed.Set(struct{}{})
}

// Failed says why the newest bundle could not be taken.
func (r *Reader) Failed(why error) {
	r.of.mu.Lock()
	defer r.of.mu.Unlock()
	r.fault = why.Error()
}

// Show sets what operators see of this reader.
func (r *Reader) Show(d Delivery) {
	r.of.mu.Lock()
	defer r.of.mu.Unlock()
	r.shown = d
}

// Close ends the waiting for this reader.
func (r *Reader) Close() {
	r.of.mu.Lock()
	delete(r.of.all, r)
	r.of.mu.Unlock()
	r.of.changed.Set(struct{}{})
}

// lacking counts the readers without the bundle of this sequence; the channel closes when that may have changed.
func (rs *readers) lacking(sequence uint64) (n int, changed <-chan struct{}) {
	_, changed = rs.changed.Get()
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for r := range rs.all {
		if r.sequence < sequence {
			n++
		}
	}
	return n, changed
}

// waitsFor names them.
func (rs *readers) waitsFor(sequence uint64) (names []string) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for r := range rs.all {
		if r.sequence >= sequence {
			continue
		}
		why := "has not taken it yet"
		if r.fault != "" {
			why = "cannot take it: " + r.fault
		}
		names = append(names, refusal.Clip(r.name+": "+why, maxLackingBytes))
	}
	return names
}

// deliveryOf is one reader as operators see it.
type deliveryOf struct {
	Delivery
	name     string
	sequence uint64
}

// list is what all of them show, by name.
func (rs *readers) list() []deliveryOf {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	all := make([]deliveryOf, 0, len(rs.all))
	for r := range rs.all {
		all = append(all, deliveryOf{Delivery: r.shown, name: r.name, sequence: r.sequence})
	}
	slices.SortFunc(all, func(a, b deliveryOf) int { return cmp.Compare(a.name, b.name) })
	return all
}
