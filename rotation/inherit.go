package rotation

import (
	"slices"
	"time"
)

// Inherit is the Rollout of a journal that was put back from a backup, with what a later one, the one that stood in its
// place, knows of authorities that must not come back. Of those that are tainted the parties stay where they are, for
// somebody has to follow them: they are barred. The others leave the set.
func (r Rollout) Inherit(later Rollout, now time.Time) Rollout {
	r.Taints = r.taints()
	r.Behind = slices.Clone(r.Behind)
	for _, t := range later.taints() {
		if _, known := r.Tainted(t.ID); known {
			continue
		}
		r.Taints = append(r.Taints, t)
		if party := t.ID == r.Stays().ID || r.Active() && t.ID == r.Goes().ID; !party && !r.behind(t.ID) {
			r.Behind = append(r.Behind, Behind{Party: Party{ID: t.ID}, By: now})
		}
	}
	for _, id := range later.Gone {
		if !slices.Contains(r.Gone, id) {
			r = r.Forget(id)
		}
	}
	return r
}

// Barred says why the authority with this ID must not sign, though the journal says that it does; nil when it may. One that
// is tainted signs for as long as an emergency needs to bring in another, and no journal comes elsewhere by itself: only
// one that was put back from a backup does.
func (r Rollout) Barred(id string) error {
	t, tainted := r.Tainted(id)
	if !tainted || r.Active() && id == r.Goes().ID && r.Within > 0 {
		return nil
	}
	return t.refused("nothing is signed under it")
}
