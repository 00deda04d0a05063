package main

import (
	"fmt"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// stepSays tells what a step means.
func stepSays(r *meshcav1.RolloutStatus) string {
	stays, goes := shortID(stays(r)), shortID(goes(r))
	switch r.GetStep() {
	case "chosen":
		return fmt.Sprintf("%s is chosen, and about to come into the trust bundle", stays)
	case "published":
		return fmt.Sprintf("%s is in trust bundle %d, and signs for nobody before all who count have that", stays, r.GetBundleSequence())
	case "confirmed":
		if r.GetAborted() {
			return fmt.Sprintf("%s is trusted still; it signs for all as soon as it has an intermediate", stays)
		}
		if r.GetWithin() != nil || len(r.GetDespite()) > 0 {
			return fmt.Sprintf("confirmations are waited for no longer; %s signs as soon as it has an intermediate", stays)
		}
		return fmt.Sprintf("all who count trust %s; it signs as soon as it has an intermediate", stays)
	case "canary":
		return fmt.Sprintf("%s signs for %d %% of the identities, and for all when an operator says so", stays, r.GetNewShare())
	case "signing":
		return fmt.Sprintf("%s signs for all; what %s has begun is being finished", stays, goes)
	case "retired":
		switch {
		case r.GetSpared():
			return fmt.Sprintf("%s signs for all; %s was trusted before, and stays in the trust bundle when the last certificate of this rollout has ended", stays, goes)
		case r.GetLastEnd() == nil:
			return fmt.Sprintf("%s signs for all; nothing lives under %s, and it leaves the trust bundle", stays, goes)
		case r.GetWithin() != nil:
			return fmt.Sprintf("%s signs for all, and SVIDs are renewed under it; %s leaves the trust bundle soon, whatever still lives under it", stays, goes)
		}
		return fmt.Sprintf("%s signs for all; %s is trusted until the last certificate under it has ended", stays, goes)
	case "leaving":
		return fmt.Sprintf("%s is being taken out of the trust bundle; there is no way back any more", goes)
	case "out":
		if r.GetSpared() {
			return fmt.Sprintf("%s signs for all, and %s, which was trusted before, stays in the trust bundle", stays, goes)
		}
		return fmt.Sprintf("%s signs for all, and %s has left the trust bundle", stays, goes)
	}
	return "a step that this certctl does not know: it is older than the CA"
}

// asItWas is the rollout in a step that is over: what came later is not told of it.
func asItWas(r *meshcav1.RolloutStatus, x *meshcav1.RolloutPassage) *meshcav1.RolloutStatus {
	had := x.GetHad()
	was := &meshcav1.RolloutStatus{
		OldRoot: r.GetOldRoot(), NewRoot: r.GetNewRoot(), Step: x.GetStep(), Aborted: x.GetAborted(), AbortedBy: had.GetAbortedBy(), NewShare: had.GetNewShare(),
		BundleSequence: had.GetBundleSequence(), Within: had.GetWithin(), LastEnd: had.GetLastEnd(), Spared: had.GetSpared(),
	}
	switch {
	case had == nil:
		was.AbortedBy = r.GetAbortedBy()
	case had.GetGivenUp():
		was.Despite = r.GetDespite()
	}
	return was
}

// passageSays tells of a step that is over. Where the CA does not know what the rollout had then, it says nothing of that.
func passageSays(r *meshcav1.RolloutStatus, x *meshcav1.RolloutPassage) string {
	was := asItWas(r, x)
	stays, goes := shortID(stays(was)), shortID(goes(was))
	says := stepSays(was)
	if x.GetHad() == nil {
		switch {
		case x.GetStep() == "published":
			says = fmt.Sprintf("%s is in the trust bundle, and signs for nobody before all who count have that", stays)
		case x.GetStep() == "confirmed" && !x.GetAborted():
			says = fmt.Sprintf("%s signs as soon as it has an intermediate", stays)
		case x.GetStep() == "canary":
			says = fmt.Sprintf("%s signs for a share of the identities, and for all when an operator says so", stays)
		case x.GetStep() == "retired":
			says = fmt.Sprintf("%s signs for all, and %s for nobody any more", stays, goes)
		}
	}
	return inStep(was, says)
}

// inStep is a line about a step, with who turned the rollout round before it.
func inStep(r *meshcav1.RolloutStatus, says string) string {
	line := r.GetStep() + ": " + says
	if r.GetAborted() {
		line = "aborted by " + r.GetAbortedBy() + ", " + line
	}
	return line
}
