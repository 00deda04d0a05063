package rollout

import (
	"time"

	"github.com/meshca/meshca/rotation"
)

// Reader is someone who reads the trust bundle and cannot acknowledge it: it is given its refresh time.
type Reader struct {
	// Name is for people.
	Name string
	// Refresh is how old a bundle it may use.
	Refresh time.Duration
}

// Publication is a Reader of a place that the CA writes the trust bundle to by itself.
type Publication struct {
	Reader
	// Since is when the place first held a bundle of the sequence that was asked about; zero: it does not yet.
	Since time.Time
	// Fault is why it could not be written, or looked at, the last time; empty when it could.
	Fault string
}

// ReaderView is a Reader, and when it has the root that is published for certain; zero: nobody knows, for it is not where
// the reader looks yet. Fault is why.
type ReaderView struct {
	Reader
	Until time.Time
	Fault string
}

// unknownAgents stands for agents that came between a backup and its being put back: they hold what nobody knows of, for as
// long as that can live.
const unknownAgents = "agents-since-the-backup"

// readers are all those that are given their time for a set of this sequence, published at since.
func (x *Roots) readers(set uint64, since time.Time) []ReaderView {
	var all []ReaderView
	if until := x.c.Unrecorded; x.c.Now().Before(until) {
		all = append(all, ReaderView{Reader: Reader{Name: unknownAgents, Refresh: until.Sub(since)}, Until: until})
	}
	for _, r := range x.c.Readers {
		all = append(all, ReaderView{Reader: r, Until: since.Add(r.Refresh)})
	}
	for _, p := range x.c.Published(set) {
		v := ReaderView{Reader: p.Reader, Fault: p.Fault}
		if !p.Since.IsZero() {
			v.Until = p.Since.Add(p.Refresh)
		}
		all = append(all, v)
	}
	return all
}

// readers are those that are given their time, while a root is published.
func (o *Operator) readers(r rotation.Rollout) []ReaderView {
	if r.Step != rotation.StepPublished {
		return nil
	}
	return o.roots.readers(r.Set, r.Entered)
}
