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
		r = r.there(what, r.Signer()).Expel(what, later.due(t.ID, now)) // whether it has left since is the later one's to say
	}
	for _, p := range []Party{later.Old, later.New} { // which may be tainted by their keys alone
		if _, tainted := r.tainted(p); p.ID != "" && tainted && later.due(p.ID, now).After(now) {
			r = r.Expel(p, later.due(p.ID, now))
		}
	}
	for _, o := range later.Owed {
		r = r.Owe(o)
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

// due is when an authority that is tainted is out of the set: what it signed is renewed before.
func (r Rollout) due(id string, now time.Time) time.Time {
	for _, b := range r.Behind {
		if b.ID == id {
			return b.By
		}
	}
	if r.Active() && r.Within > 0 && id == r.Goes().ID {
		return r.deadline()
	}
	return now
}

// Keep is the Rollout of a journal that was put back, whose set is ours, and the set that stood in its place is theirs.
// What those have signed lives until that moment, and nobody shall refuse it meanwhile: those that ours lacks come into it,
// which Keep returns, sign for nobody, and leave then, unless they have a part in the Rollout. What is tainted and in ours
// alone has left.
func (r Rollout) Keep(ours, theirs []Party, until time.Time) (next Rollout, come []Party) {
	in := func(set []Party, p Party) bool {
		return slices.ContainsFunc(set, func(x Party) bool { return x.ID == p.ID })
	}
	for _, p := range ours {
		if _, tainted := r.tainted(p); tainted && !in(theirs, p) && !slices.Contains(r.Gone, p.ID) {
			r = r.Forget(p.ID)
		}
	}
	r.Lives, r.Behind = map[string]time.Time{}, slices.Clone(r.Behind)
	for _, p := range theirs {
		r.Lives[p.ID] = until
		if _, tainted := r.tainted(p); tainted || in(ours, p) {
			continue
		}
		come = append(come, p)
		r.Gone = slices.DeleteFunc(slices.Clone(r.Gone), func(id string) bool { return id == p.ID })
		part := p.ID == r.Stays().ID || r.Active() && p.ID == r.Goes().ID
		if !part && !r.behind(p.ID) {
			r.Behind = append(r.Behind, Behind{Party: p, By: until, Kept: true})
		}
	}
	return r, come
}

// Stay is the Rollout when somebody wants an authority in the set for its own sake: where it was only kept, it stays.
func (r Rollout) Stay(id string) Rollout {
	if r.kept(id) {
		r.Behind = slices.DeleteFunc(slices.Clone(r.Behind), func(b Behind) bool { return b.ID == id })
	}
	return r
}

// kept reports whether an authority is in the set by Keep alone.
func (r Rollout) kept(id string) bool {
	return slices.ContainsFunc(r.Behind, func(b Behind) bool {
		_, tainted := r.tainted(b.Party)
		return b.ID == id && b.Kept && !tainted
	})
}

// PutBack is the Rollout of a journal that was put back from a backup: until unrecorded certificates may live that it knows
// nothing of, under any authority. One that has retired by it, is leaving, or was kept may have signed again, by an abort
// or by another Rollout.
func (r Rollout) PutBack(unrecorded, now time.Time) Rollout {
	if r.Step == StepRetired && unrecorded.After(r.LastEnd) {
		r.LastEnd = unrecorded
	}
	r.Behind = slices.Clone(r.Behind)
	if _, tainted := r.tainted(r.Goes()); r.Step == StepLeaving && !tainted {
		goes := r.Goes()
		r = r.enter(StepOut, r.NewShare, now).remember(r)
		r.Behind = append(r.Behind, Behind{Party: goes, By: unrecorded})
	}
	for i, b := range r.Behind {
		if _, tainted := r.tainted(b.Party); (b.Kept || !tainted) && unrecorded.After(b.By) {
			r.Behind[i].By = unrecorded
		}
	}
	return r
}

// Expel has an authority leave the set at that moment, unless it is a party that somebody has to follow, or leaves already.
func (r Rollout) Expel(p Party, by time.Time) Rollout {
	if p.ID == r.Stays().ID || r.Active() && p.ID == r.Goes().ID || r.behind(p.ID) {
		return r
	}
	r.Behind = append(slices.Clone(r.Behind), Behind{Party: p, By: by})
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
