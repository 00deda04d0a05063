package admin

import (
	"fmt"
	"time"

	"github.com/meshca/meshca/rotation"
)

// plan says what is going to happen, a sentence a step. tainted is the root that was tainted; empty: none. now is by the clock
// that rollouts go by.
func plan(r rotation.Rollout, tainted string, now time.Time) []string {
	if atOnce(r, tainted, now) {
		return []string{"out: it signs for nobody here, and is taken out of the trust bundle at once, if it is in there", "it is never trusted again"}
	}
	var also []string
	t, _ := r.Tainted(tainted)
	for _, b := range r.Behind {
		if b.ID == tainted || t.Key != "" && b.Key == t.Key {
			also = append(also, fmt.Sprintf("out: root %.12s leaves the trust bundle by %s, whatever still lives under it", b.ID, b.By.UTC().Format(time.RFC3339)))
		}
	}
	if !r.Active() {
		return append(also, "all SVIDs are renewed before, spread over a part of that", "it is never trusted again")
	}
	return append(append(begins(r), ends(r)...), also...)
}

// atOnce reports whether the root that was tainted, and others of its key, have no part in the rollout, and leave at once.
func atOnce(r rotation.Rollout, tainted string, now time.Time) bool {
	t, _ := r.Tainted(tainted)
	if tainted == "" || r.Active() && (tainted == r.Goes().ID || t.Key != "" && t.Key == r.Goes().Key) {
		return false
	}
	by, behind := leavesBy(r, tainted)
	return !behind || !by.After(now)
}

func leavesBy(r rotation.Rollout, id string) (by time.Time, behind bool) {
	for _, b := range r.Behind {
		if b.ID == id {
			return b.By, true
		}
	}
	return time.Time{}, false
}

// begins are the steps until the root that stays signs for anyone.
func begins(r rotation.Rollout) []string {
	var steps []string
	switch r.Step {
	case rotation.StepChosen:
		steps = append(steps, "published: the new root comes into the trust bundle, and agents bring it to their proxies")
		fallthrough
	case rotation.StepPublished:
		confirmed := "confirmed: every agent through which a live SVID was issued has acknowledged it"
		if r.Within > 0 {
			confirmed += fmt.Sprintf("; after %s those that have not are left behind", r.Within/2)
		}
		steps = append(steps, confirmed)
	case rotation.StepConfirmed:
		steps = append(steps, fmt.Sprintf("confirmed: the %s root signs as soon as it has an intermediate", stays(r)))
	}
	if r.Canary > 0 && len(steps) > 0 && !r.Aborted {
		steps = append(steps, fmt.Sprintf("canary: it signs for %d %% of the identities, until `certctl ca continue`", r.Canary))
	}
	return steps
}

// ends are the steps from then on.
func ends(r rotation.Rollout) []string {
	goes := "old"
	if r.Aborted {
		goes = "new"
	}
	if r.Step == rotation.StepLeaving && r.Within > 0 && r.Aborted {
		return []string{"out: the new root signs for nobody, and is being taken out of the trust bundle; the old root signs for all",
			"there is no way back to a root that is tainted"}
	}
	if r.Step == rotation.StepLeaving {
		return []string{fmt.Sprintf("out: the %s root is being taken out of the trust bundle already", goes)}
	}
	who := "it"
	if r.Step == rotation.StepSigning {
		who = "the " + stays(r) + " root"
	}
	steps := []string{fmt.Sprintf("signing: %s signs for all; the %s root's intermediate and its key are gone", who, goes)}
	if r.Spares() {
		return append(steps, "retired: SVIDs move over as they renew, until the last one under the new root has ended",
			"out: the new root was trusted before, and stays in the trust bundle; `certctl ca root remove` takes it out")
	}
	if r.Within > 0 {
		return append(steps, fmt.Sprintf("retired: all SVIDs are renewed, spread over %s", r.Within*3/8),
			fmt.Sprintf("out: %s after that began the %s root leaves the bundle, whatever still lives under it", r.Within/2, goes),
			"there is no way back to a root that is tainted")
	}
	return append(steps, fmt.Sprintf("retired: SVIDs move over as they renew, until the last one under the %s root has ended", goes),
		fmt.Sprintf("out: the %s root leaves the bundle", goes), "until it leaves, `certctl ca abort` goes back")
}

func stays(r rotation.Rollout) string {
	if r.Aborted {
		return "old"
	}
	return "new"
}
