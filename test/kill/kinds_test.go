package kill

import (
	"time"

	"github.com/meshca/meshca/rotation"
)

// kind is a way for authorities to be replaced: its variants differ in the step that operators speak in.
type kind struct {
	name     string
	variants []variant
}

// variant is what operators order, one after the other.
type variant struct {
	settings
	orders []order
	// ends names the root that signs in the end.
	ends end
}

// end is the place of a root in the order in which they came.
type end int

const (
	first end = iota
	second
	third
	// besideSecond: the first one signs, and the second one stays trusted and signs for nobody.
	besideSecond
)

// within is an emergency's bound, the shortest there is.
const within = 20 * time.Second

// short are settings for a Rollout that does not wait for long.
var short = settings{ttl: 5 * time.Second}

// stepsOfARollout are those in which a Rollout stands that has no canary.
var stepsOfARollout = []rotation.Step{
	rotation.StepChosen, rotation.StepPublished, rotation.StepConfirmed, rotation.StepSigning, rotation.StepRetired, rotation.StepLeaving,
}

// amid has a Rollout begun, and something ordered in a step of it.
func amid(s rotation.Step, then ...order) []order {
	if s == rotation.StepCanary {
		return append([]order{rotate(share)}, then...)
	}
	return append([]order{rotate(0)}, then...)
}

var kinds = []kind{
	{"plain", []variant{{short, []order{rotate(0)}, second}, {settings{ttl: 5 * time.Second, published: 4 * time.Second}, []order{rotate(0)}, second}}},
	{"canary", []variant{{short, []order{rotate(share), goOn()}, second}}},
	{"abort", aborts()},
	{"abort that is turned forward", turnedForward()},
	{"abort that leaves a root trusted", sparing()},
	// SVIDs that live longer than the bound, and that nothing else renews: the old root is forced out.
	{"taint", []variant{{settings{ttl: 20 * time.Minute}, []order{taint("", theFirst)}, second}}},
	{"taint of the old root", oldTainted()},
	{"taint of the new root", newTainted()},
	{"taint of both", bothTainted()},
	{"intermediate", []variant{
		{kept(short), []order{replaceIntermediates("", 0)}, first},
		{kept(short), []order{rotate(share), replaceIntermediates(rotation.StepCanary, 0), goOn()}, second},
	}},
	// SVIDs that nothing else renews.
	{"taint of the intermediate", []variant{
		{kept(settings{ttl: 10 * time.Minute}), []order{replaceIntermediates("", 3*time.Second)}, first},
		{kept(short), []order{rotate(share), replaceIntermediates(rotation.StepCanary, 2*time.Second), goOn()}, second},
	}},
}

// aborts go back from each step that can be gone back from.
func aborts() (all []variant) {
	for _, s := range []rotation.Step{rotation.StepChosen, rotation.StepPublished, rotation.StepConfirmed, rotation.StepCanary, rotation.StepSigning, rotation.StepRetired} {
		all = append(all, variant{short, amid(s, abort(s)), first})
	}
	return all
}

// turnedForward go forward again as the old root is about to sign.
func turnedForward() (all []variant) {
	for _, s := range []rotation.Step{rotation.StepCanary, rotation.StepSigning, rotation.StepRetired} {
		all = append(all, variant{short, amid(s, abort(s), turnForward()), second})
	}
	return all
}

// sparing go back from a root that an operator has taken in for its own sake: amid the rollout, or before it.
func sparing() (all []variant) {
	for _, s := range []rotation.Step{rotation.StepPublished, rotation.StepCanary, rotation.StepRetired} {
		all = append(all, variant{short, amid(s, trustSecond(s), abort(s)), besideSecond})
	}
	before := amid(rotation.StepPublished, trustSecond(rotation.StepPublished), abort(rotation.StepPublished), rotateAgain(), abort(rotation.StepSigning))
	return append(all, variant{short, before, besideSecond})
}

// oldTainted hasten a Rollout, and have roots leave that have no part in it.
func oldTainted() (all []variant) {
	for _, s := range append([]rotation.Step{rotation.StepCanary}, stepsOfARollout...) {
		all = append(all, variant{short, amid(s, taint(s, theFirst)), second})
	}
	for _, s := range []rotation.Step{rotation.StepPublished, rotation.StepRetired} {
		all = append(all, variant{short, append([]order{trust()}, amid(s, taint(s, theStranger))...), second})
	}
	return all
}

// newTainted turn a Rollout round, and one that is being aborted round again.
func newTainted() (all []variant) {
	for _, s := range append([]rotation.Step{rotation.StepCanary}, stepsOfARollout[:5]...) {
		all = append(all, variant{short, amid(s, taint(s, theSecond)), first})
	}
	for _, s := range []rotation.Step{rotation.StepConfirmed, rotation.StepSigning, rotation.StepRetired} {
		all = append(all, variant{short, []order{rotate(share), abort(rotation.StepCanary), taint(s, theFirst)}, second})
	}
	return append(all, variant{short, []order{rotate(0), abort(rotation.StepPublished), taint(rotation.StepSigning, theFirst)}, second})
}

// bothTainted have a third root take over. The root that signs is tainted as the old one leaves, too.
func bothTainted() (all []variant) {
	for i, s := range append([]rotation.Step{rotation.StepCanary}, stepsOfARollout...) {
		one, other := taint(s, theFirst), taint(s, theSecond)
		if i%2 == 0 {
			one, other = other, one
		}
		other.in = "" // at once
		all = append(all, variant{short, amid(s, one, other), third})
	}
	return append(all, variant{short, amid(rotation.StepLeaving, taint(rotation.StepLeaving, theSecond)), third})
}
