package rotation

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

// Taint says that an authority is not to be trusted any more. It is never taken back.
type Taint struct {
	// ID is the authority's, Key names its key: another authority of the same key is tainted too. They mean nothing here.
	ID  string    `json:"id"`
	Key string    `json:"key,omitempty"`
	At  time.Time `json:"at"`
	By  string    `json:"by"`
}

// refused is the refusal to do with an authority what its taint, or that of another one of its key, forbids.
func (t Taint) refused(id, why string, args ...any) error {
	which := ""
	if id != t.ID {
		which = fmt.Sprintf("the root %s has its key, and ", id)
	}
	return refusal.New(refusal.RootTainted, "the root %s was tainted at %s by %s: %s%s", t.ID, t.At.UTC().Format(time.RFC3339), t.By, which, fmt.Sprintf(why, args...))
}

// Behind is an authority that signs for nobody and leaves the trusted set at a moment.
type Behind struct {
	Party
	// By is when it leaves: what it signed is to be renewed before.
	By time.Time `json:"by"`
	// Kept says that it is there for what it signed by a journal that a backup took the place of, and by nobody's decision:
	// see Keep.
	Kept bool `json:"kept,omitempty"`
}

const (
	// maxTaints bounds what a journal remembers of tainted authorities, maxGone of those that left.
	maxTaints, maxGone = 256, 256
)

// ErrNeedsSuccessor is returned by Taint where none of the parties can sign: an Emergency with a Successor is needed.
var ErrNeedsSuccessor = errors.New("none of the authorities there are can take over: a third one is needed")

// Emergency is the order to do without an authority.
type Emergency struct {
	By string
	// Within is until when it leaves the set at the latest; see Rollout.
	Within time.Duration
	// First is who signs where no Rollout was ever begun. Else the Rollout says who does: whoever looked before the order is
	// entered may have seen another.
	First Party
	// Successor takes over where neither party can; it is of no use elsewhere.
	Successor Party
	// Twins are the other authorities of the set that have the key of the tainted one.
	Twins []Party
}

// Taint marks an authority and its key for good, and has all authorities of that key leave the trusted set. What that takes
// depends on what they do now:
//
//   - one goes anyway: that is hastened, its canary ends, what it signed is renewed within the bound;
//   - one is to sign, or signs: the Rollout turns round to the other party, if that is trusted, and else (the other one
//     is tainted too, or already leaving) a Rollout to the Successor takes this one's place;
//   - one signs for nobody: it leaves at once.
func (r Rollout) Taint(what Party, e Emergency, now time.Time) (Rollout, error) {
	if what.ID == "" || e.Within <= 0 {
		return Rollout{}, errors.New("an emergency needs an authority and a bound")
	}
	next, err := r.mark(Taint{ID: what.ID, Key: what.Key, At: now, By: e.By})
	if err != nil {
		return Rollout{}, err
	}
	signs := r.signer(e.First)
	if _, known := r.tainted(what); !known {
		next = next.there(what, signs)
	}
	for _, p := range append([]Party{what}, e.Twins...) {
		if signs := !r.Active() && p.ID == signs.ID; !signs && (!r.Active() || p.ID != r.Old.ID && p.ID != r.New.ID) {
			next = next.leave(p, e.Within, now)
		}
	}
	switch {
	case !r.Active() && what.same(signs):
		return next.supersede(signs, e, now)
	case !r.Active() || !what.same(r.Old) && !what.same(r.New):
		return next, nil
	case !what.same(r.Stays()) && r.Step == StepLeaving:
		return next, nil
	case !what.same(r.Stays()):
		return next.hasten(e, now)
	}
	if _, tainted := next.tainted(r.Goes()); tainted || r.Step == StepLeaving {
		return next.supersede(r.Signer(), e, now)
	}
	return next.turn(e, now), nil
}

// Tainted reports whether an authority was tainted, by its ID.
func (r Rollout) Tainted(id string) (Taint, bool) {
	for _, t := range r.taints() {
		if t.ID == id {
			return t, true
		}
	}
	return Taint{}, false
}

// TaintedKey reports whether an authority of this key was tainted.
func (r Rollout) TaintedKey(key string) (Taint, bool) {
	for _, t := range r.taints() {
		if key != "" && t.Key == key {
			return t, true
		}
	}
	return Taint{}, false
}

// tainted reports whether an authority was tainted, or another one of its key.
func (r Rollout) tainted(p Party) (Taint, bool) {
	if t, tainted := r.Tainted(p.ID); tainted {
		return t, true
	}
	return r.TaintedKey(p.Key)
}

// taints are all taints; a journal of before they were listed has that of its emergency alone.
func (r Rollout) taints() []Taint {
	all := slices.Clone(r.Taints)
	known := func(t Taint) bool { return t.ID == r.Goes().ID }
	if r.Within > 0 && !slices.ContainsFunc(all, known) {
		all = append(all, Taint{ID: r.Goes().ID, Key: r.Goes().Key, At: r.since(), By: r.By})
	}
	return all
}

// mark adds a taint. The first one of an authority stands.
func (r Rollout) mark(t Taint) (Rollout, error) {
	r.Taints = r.taints()
	for i, have := range r.Taints {
		if have.ID == t.ID {
			r.Taints[i].Key = cmp.Or(have.Key, t.Key)
			return r, nil
		}
	}
	if len(r.Taints) >= maxTaints {
		return Rollout{}, fmt.Errorf("%d authorities are tainted, and no more are remembered: use another upstream", maxTaints)
	}
	r.Taints = append(r.Taints, t)
	return r, nil
}

// hasten sets a bound for the one that goes. A bound is never put off.
func (r Rollout) hasten(e Emergency, now time.Time) (Rollout, error) {
	if r.Within > 0 && (e.Within >= r.Within || !now.Add(e.Within/2).Before(r.half())) {
		return Rollout{}, fmt.Errorf("%s is tainted already, and a bound of %s from now on would not end sooner than the one of %s since %s", r.Goes().ID,
			e.Within, r.Within, r.since().UTC().Format(time.RFC3339))
	}
	r.Within, r.Since, r.Canary = e.Within, now, 0
	switch r.Step {
	case StepCanary, StepSigning, StepRetired: // once more, for the renewals that an emergency orders
		r.LastEnd = time.Time{}
		return r.enter(StepSigning, r.all(), now), nil
	}
	return r, nil
}

// turn has the party that was to go sign for all, and the other one go.
func (r Rollout) turn(e Emergency, now time.Time) Rollout {
	r.Within, r.Since, r.Canary = e.Within, now, 0
	switch {
	case !r.Aborted && r.NewShare == 0 && !now.Before(r.Lives[r.New.ID]): // it has signed for nobody: there is nothing to renew
		r.Aborted, r.AbortedBy, r.AbortedAt = true, e.By, now
		return r.enter(StepLeaving, 0, now)
	case !r.Aborted:
		return r.back(e.By, now)
	}
	return r.forth(now)
}

// forth turns an aborted Rollout round to New again.
func (r Rollout) forth(now time.Time) Rollout {
	r.Aborted, r.AbortedBy, r.AbortedAt, r.LastEnd = false, "", time.Time{}, time.Time{}
	if r.NewShare > 0 { // whom it signs for, and all others, have confirmed it
		return r.enter(StepConfirmed, r.NewShare, now)
	}
	return r.enter(StepChosen, 0, now)
}

// supersede begins a Rollout from the one that signs to the Successor. A party that signs no more leaves behind it.
func (r Rollout) supersede(signs Party, e Emergency, now time.Time) (Rollout, error) {
	if e.Successor.ID == "" {
		return Rollout{}, ErrNeedsSuccessor
	}
	next := r.successor(signs, e.Successor, e.By, now)
	next.Within, next.Since = e.Within, now
	if r.Active() {
		other := r.Old
		if signs.ID == r.Old.ID {
			other = r.New
		}
		by := now.Add(e.Within)
		switch {
		case r.Step == StepLeaving, r.Step == StepChosen && len(r.Passed) == 0 && !now.Before(r.Lives[r.New.ID]): // which has signed for nobody, and is in the set for moments at most
			by = now
		case other.ID == r.Goes().ID && r.Within > 0: // which has a bound of its own
			by = r.deadline()
		}
		next = next.later(Behind{Party: other, By: by})
	}
	if err := next.takes(signs, e.Successor); err != nil {
		return Rollout{}, err
	}
	return next, nil
}

// leave takes out an authority that is no party: at once, or within the bound where others still need it.
func (r Rollout) leave(what Party, within time.Duration, now time.Time) Rollout {
	by := now
	if r.behind(what.ID) || now.Before(r.Lives[what.ID]) {
		by = now.Add(within)
	}
	return r.later(Behind{Party: what, By: by})
}

// later adds one that leaves, or has it leave sooner.
func (r Rollout) later(b Behind) Rollout {
	r.Behind = slices.Clone(r.Behind)
	for i, have := range r.Behind {
		if have.ID == b.ID {
			r.Behind[i].Kept = have.Kept && b.Kept
			if b.By.Before(have.By) {
				r.Behind[i].By = b.By
			}
			return r
		}
	}
	r.Behind = append(r.Behind, b)
	return r
}

// Leaves reports whether an authority is on its way out of the set, or has left it, by somebody's decision.
func (r Rollout) Leaves(id string) bool {
	return r.behind(id) && !r.kept(id) || slices.Contains(r.Gone, id) || r.Active() && id == r.Goes().ID && !r.Spares()
}

func (r Rollout) behind(id string) bool {
	return slices.ContainsFunc(r.Behind, func(b Behind) bool { return b.ID == id })
}

// Forget notes that an authority has left the set.
func (r Rollout) Forget(id string) Rollout {
	r.Gone = append(r.come(id).Gone, id)
	r.Gone = r.Gone[max(0, len(r.Gone)-maxGone):]
	return r
}

// come is the Rollout when an authority comes into the set by somebody's decision: it is not gone any more.
func (r Rollout) come(id string) Rollout {
	r.Gone = slices.DeleteFunc(slices.Clone(r.Gone), func(g string) bool { return g == id })
	return r
}

// there is the Rollout in which the parties of a key that is tainted just now count as having left only when they do: one that
// had left the set before was brought back since, by a backup, and others rely on it.
func (r Rollout) there(key, signs Party) Rollout {
	in := []Party{signs}
	if r.Active() {
		in = append(in, r.Old)
	}
	if r.Active() && r.Step != StepChosen {
		in = append(in, r.New)
	}
	r.Gone = slices.DeleteFunc(slices.Clone(r.Gone), func(id string) bool {
		return slices.ContainsFunc(in, func(p Party) bool { return p.ID == id && p.same(key) })
	})
	return r
}

// without is the Rollout when one of those behind has left.
func (r Rollout) without(b Behind) Rollout {
	r.Behind = slices.DeleteFunc(slices.Clone(r.Behind), func(x Behind) bool { return x.ID == b.ID })
	return r.Forget(b.ID)
}

// Signer is who signs for most.
func (r Rollout) Signer() Party {
	if r.NewShare == 100 {
		return r.New
	}
	return r.Old
}

// signer is Signer, or first where no Rollout was ever begun.
func (r Rollout) signer(first Party) Party {
	if r.Step == "" {
		return first
	}
	return r.Signer()
}

// all is New's share when the one that stays signs for all.
func (r Rollout) all() int {
	if r.Aborted {
		return 0
	}
	return 100
}

// since is when the emergency began.
func (r Rollout) since() time.Time {
	if r.Since.IsZero() {
		return r.Begun
	}
	return r.Since
}

// half is the end of the half of an emergency's bound that its step is in.
func (r Rollout) half() time.Time {
	switch r.Step {
	case StepChosen, StepPublished:
		return r.confirmedBy()
	case StepConfirmed:
		return r.since().Add(r.Within)
	case StepRetired:
		return r.outBy()
	}
	return r.Entered.Add(r.Within / 2)
}

// deadline is when the one that goes is out in an emergency, as far as that is known.
func (r Rollout) deadline() time.Time {
	if r.Step == StepRetired {
		return r.outBy()
	}
	return r.since().Add(r.Within)
}
