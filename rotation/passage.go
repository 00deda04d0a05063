package rotation

import (
	"slices"
	"time"
)

// Passage is a step that is over.
type Passage struct {
	Step    Step      `json:"step"`
	Entered time.Time `json:"entered"`
	// Had is what the Rollout had in the step; nil: it is not known, the journal is of before that was kept.
	Had *Had `json:"had,omitempty"`
}

// Had is what a Rollout had in a step, until what ended it: each is the Rollout's. Orders that come later change that in
// the Rollout, and a step that is over is told by what it was then.
type Had struct {
	Aborted   bool          `json:"aborted,omitempty"`
	AbortedBy string        `json:"abortedBy,omitempty"`
	NewShare  int           `json:"newShare,omitempty"`
	Set       uint64        `json:"set,omitempty"`
	Within    time.Duration `json:"within,omitempty"`
	// GivenUp says that it went on despite some.
	GivenUp bool      `json:"givenUp,omitempty"`
	LastEnd time.Time `json:"lastEnd,omitzero"`
	// Spared is what Spares reported.
	Spared bool `json:"spared,omitempty"`
}

// remember is the Rollout with what before, which stands in the journal, had in the step that this one has ended, if it
// has.
func (r Rollout) remember(before Rollout) Rollout {
	last := len(before.Passed)
	if len(r.Passed) != last+1 {
		return r
	}
	r.Passed = slices.Clone(r.Passed)
	r.Passed[last].Had = &Had{
		Aborted: before.Aborted, AbortedBy: before.AbortedBy, NewShare: before.NewShare, Set: before.Set, Within: before.Within,
		GivenUp: len(before.Despite) > 0, LastEnd: before.LastEnd, Spared: before.Spares(),
	}
	return r
}
