package agent

import (
	"sync"

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
