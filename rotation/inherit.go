package rotation

import (
	"slices"
	"time"
)

// Inherit is the Rollout of a journal that was put back from a backup, with what a later one, the one that stood in its
// place, knows of authorities that must not come back. Of those that are tainted the parties stay where they are, for
// somebody has to follow them: they are barred, and the Roller brings the Rollout to its end without them. The others leave
// the set.
func (r Rollout) Inherit(later Rollout, now time.Time) Rollout {
	r.Taints = r.taints()
	for _, t := range later.taints() {
		if _, known := r.Tainted(t.ID); known {
			continue
		}
		r.Taints = append(r.Taints, t)
		what := Party{ID: t.ID, Key: t.Key}
		r = r.there(what, r.Signer()).Expel(what, now) // whether it has left since is the later one's to say
	}
	for _, id := range later.left(now) {
		if !slices.Contains(r.Gone, id) {
			r = r.Forget(id)
		}
	}
	return r
}

// left are those that have left the set, or may have: it is changed before the journal says so.
func (r Rollout) left(now time.Time) []string {
	all := slices.Clone(r.Gone)
	for _, b := range r.Behind {
		if !now.Before(b.By) {
			all = append(all, b.ID)
		}
	}
	if r.Step == StepLeaving {
		all = append(all, r.Goes().ID)
	}
	return all
}

// PutBack is the Rollout of a journal that was put back from a backup: until this moment certificates may live that it knows
// nothing of, under any authority. One that has retired by it may have signed again, by an abort or by another Rollout.
func (r Rollout) PutBack(unrecorded time.Time) Rollout {
	if r.Step == StepRetired && unrecorded.After(r.LastEnd) {
		r.LastEnd = unrecorded
	}
	return r
}

// Expel has an authority leave the set at once, unless it is a party that somebody has to follow, or leaves already.
func (r Rollout) Expel(p Party, now time.Time) Rollout {
	if p.ID == r.Stays().ID || r.Active() && p.ID == r.Goes().ID || r.behind(p.ID) {
		return r
	}
	r.Behind = append(slices.Clone(r.Behind), Behind{p, now})
	return r
}

// Keyed is the Rollout with the keys that it does not name, where keyOf knows them by the authority's ID; a journal of before
// keys were named has none.
func (r Rollout) Keyed(keyOf func(id string) string) Rollout {
	name := func(p *Party) {
		if p.Key == "" && p.ID != "" {
			p.Key = keyOf(p.ID)
		}
	}
	name(&r.Old)
	name(&r.New)
	r.Behind, r.Taints = slices.Clone(r.Behind), slices.Clone(r.Taints)
	for i := range r.Behind {
		name(&r.Behind[i].Party)
	}
	for i, t := range r.Taints {
		p := Party{ID: t.ID, Key: t.Key}
		name(&p)
		r.Taints[i].Key = p.Key
	}
	return r
}

// Barred says why the authority with this ID must not sign, though the journal says that it does; nil when it may. One that
// is tainted signs for as long as an emergency needs to bring in another, and no journal comes elsewhere by itself: only
// one that was put back from a backup does. Nor does an emergency need one that had left the set before, and one whose
// successor is tainted, too, brings in nobody.
func (r Rollout) Barred(id string) error {
	p := Party{ID: id}
	for _, of := range []Party{r.Old, r.New} {
		if of.ID == id {
			p = of
		}
	}
	t, tainted := r.tainted(p)
	_, successor := r.tainted(r.Stays())
	if !tainted || r.Active() && id == r.Goes().ID && r.Within > 0 && !successor && !r.returned(p) {
		return nil
	}
	return t.refused(id, "nothing is signed under it")
}

// returned reports whether an authority is tainted, has left the set, and is back by a backup of before: nobody trusts it any
// more, and nobody is to do so again.
func (r Rollout) returned(p Party) bool {
	_, tainted := r.tainted(p)
	return tainted && slices.Contains(r.Gone, p.ID)
}

// Heir is the party that a Rollout brings in by itself in the place of one that must not sign; false: that takes an order.
func (r Rollout) Heir() (Party, bool) {
	r, _ = r.turned(time.Time{})
	_, tainted := r.tainted(r.Stays())
	return r.Stays(), r.Active() && !tainted
}

// Returned says why nobody may be told of a set that has this authority; nil when that does not bar it.
func (r Rollout) Returned(p Party) error {
	if !r.returned(p) {
		return nil
	}
	t, _ := r.tainted(p)
	return t.refused(p.ID, "it had left the trusted set, and is back in it by a backup")
}

// expelled are the parties that returned and that nobody needs: those that sign for nobody, and the one that goes as soon as
// the other one is in the set.
func (r Rollout) expelled() (all []Party) {
	if !r.Active() {
		return nil
	}
	for _, p := range []Party{r.Old, r.New} {
		if r.returned(p) && (!r.Signs(p.ID) || p.ID == r.Goes().ID && r.Step != StepChosen) {
			all = append(all, p)
		}
	}
	return all
}

// turned is the Rollout of a journal that was put back, whose staying party was tainted since: it goes to the other one, as
// an order to do without that party would have it. It reports false where it stands still until a third one is named: the
// other one is tainted, too, or on its way out of the set.
func (r Rollout) turned(now time.Time) (Rollout, bool) {
	t, tainted := r.tainted(r.Stays())
	_, other := r.tainted(r.Goes())
	switch {
	case !tainted || other || !r.Active() || r.Step == StepLeaving:
		return r, false
	case r.Aborted:
		return r.forth(now), true
	}
	return r.back(t.By, now), true
}
