package rotation

import (
	"slices"
	"time"
)

// Owed is the renewal of all that was issued, to be ordered when something else signs below an authority than did when that
// was said to be stolen.
type Owed struct {
	// ID is the authority's.
	ID string `json:"id"`
	// Signer names what signed below it; it means nothing here.
	Signer string    `json:"signer"`
	At     time.Time `json:"at"`
	// Within is what the renewals are spread over.
	Within time.Duration `json:"within"`
}

// Owe notes one, in the place of an earlier one of the same authority.
func (r Rollout) Owe(o Owed) Rollout {
	r.Owed = append(slices.DeleteFunc(slices.Clone(r.Owed), func(x Owed) bool { return x.ID == o.ID }), o)
	return r
}

// Settled is the Rollout when these have been ordered.
func (r Rollout) Settled(all []Owed) Rollout {
	r.Owed = slices.DeleteFunc(slices.Clone(r.Owed), func(x Owed) bool { return slices.Contains(all, x) })
	return r
}
