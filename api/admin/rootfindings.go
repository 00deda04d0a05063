package admin

import (
	"fmt"
	"slices"
	"time"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// rolloutPatience is how long a step of a rollout may take before a check says who keeps it: agents have a bundle within
// seconds.
const rolloutPatience = time.Hour

// rolloutFinding judges the rollout of a root; nil when none is under way.
func rolloutFinding(r *meshcav1.RolloutStatus, now time.Time) *meshcav1.Finding {
	if !r.GetActive() {
		return nil
	}
	since := now.Sub(r.GetEntered().AsTime())
	f := &meshcav1.Finding{Subject: "rollout", Level: levelOK, Detail: fmt.Sprintf("%s since %s", r.GetStep(), spell(since))}
	if len(r.GetWaits()) > 0 {
		f.Detail += "; it waits for " + some(r.GetWaits())
	}
	// What has its end will come to it: a wait for the last certificate takes hours by design.
	overdue := since > rolloutPatience
	if r.GetUntil() != nil {
		overdue = now.Sub(r.GetUntil().AsTime()) > time.Minute
	}
	switch {
	case r.GetError() != "":
		f.Level, f.Detail = levelWarning, f.GetDetail()+"; its last try failed: "+r.GetError()
		f.Hint = "It is tried again by itself. `certctl ca status` shows it; " + wayOut(r)
	case overdue && r.GetStep() == string(rotation.StepCanary):
		f.Level, f.Hint = levelWarning, "`certctl ca continue` has the new root sign for all, `certctl ca abort` goes back."
	case overdue && r.GetStep() == string(rotation.StepPublished):
		f.Level, f.Hint = levelWarning, "`certctl ca status` shows what those have; `certctl ca continue --despite AGENT` goes on without one, `certctl ca abort` goes back."
	case overdue:
		f.Level, f.Hint = levelWarning, "`certctl ca status` shows the step; the CA's log says why it does not end."
	}
	return f
}

// wayOut says what leads out of a step that fails.
func wayOut(r *meshcav1.RolloutStatus) string {
	switch {
	case r.GetWithin() != nil:
		stays := r.GetNewRoot()
		if r.GetAborted() {
			stays = r.GetOldRoot()
		}
		return fmt.Sprintf("from a root that is tainted there is no way back: `certctl ca taint root %.12s` goes to another one.", stays)
	case r.GetAborted() && r.GetStep() == "confirmed" && r.GetNewShare() > 0:
		return "`certctl ca continue` turns it forward again."
	case r.GetAborted():
		return "it is being aborted, which needs no order."
	}
	return "`certctl ca abort` goes back."
}

// bounded reports whether a root leaves the trust bundle by a rollout that has a bound for that.
func bounded(r rotation.Rollout, id string) bool {
	behind := slices.ContainsFunc(r.Behind, func(b rotation.Behind) bool { return b.ID == id })
	return r.Active() && (behind || r.Within > 0 && r.Goes().ID == id)
}

// rootFindings are what only the upstream knows.
func rootFindings(v rollout.View) []*meshcav1.Finding {
	var found []*meshcav1.Finding
	if v.UpstreamErr != nil {
		found = append(found, &meshcav1.Finding{
			Subject: "upstream", Level: levelWarning, Detail: "it could not be asked for its issuers: " + v.UpstreamErr.Error(),
			Hint: "The CA signs for as long as its intermediate lives: `certctl ca status` says until when. Mend the upstream before.",
		})
	}
	for _, o := range v.Standing.Rollout.Owed {
		found = append(found, &meshcav1.Finding{
			Subject: "intermediate", Level: levelError, Detail: fmt.Sprintf("the one below the root %.12s, whose key was said to be stolen at %s, is not replaced yet", o.ID, stampText(o.At)),
			Hint: "That is tried again by itself, and all that was issued is ordered to be renewed then. `certctl ca status` says why the upstream does not sign.",
		})
	}
	for _, r := range v.Roots {
		found = append(found, keptFindings(v.Standing.Rollout, r)...)
		if bounded(v.Standing.Rollout, r.ID) {
			continue
		}
		if r.Tainted.IsZero() && r.Certified != nil {
			found = append(found, &meshcav1.Finding{
				Subject: "root", Level: levelError, Detail: fmt.Sprintf("%s (%.12s) has certified a key that is tainted: %v", r.Certificate.Subject, r.ID, r.Certified),
				Hint: fmt.Sprintf("Whoever has that key signs below this root, and is believed: `certctl ca taint root %.12s` does without it. "+
					"A new intermediate alone ends nothing, and none comes from an issuer of that key.", r.ID),
			})
		}
		if r.Tainted.IsZero() {
			continue
		}
		found = append(found, &meshcav1.Finding{
			Subject: "root", Level: levelError, Detail: fmt.Sprintf("%s (%.12s) is tainted since %s, and in the trust bundle", r.Certificate.Subject, r.ID, stampText(r.Tainted)),
			Hint: fmt.Sprintf("It is being taken out. If it stays, /readyz and the CA's log say why; `certctl ca taint root %.12s` gives it a bound.", r.ID),
		})
	}
	var usable []string
	for _, c := range v.Candidates {
		if c.Fault != nil || c.Root == nil {
			continue
		}
		usable = append(usable, fmt.Sprintf("%s (%s, root %.12s)", c.Ref, c.Name, ca.RootID(c.Root)))
	}
	if len(usable) > 0 {
		found = append(found, &meshcav1.Finding{
			Subject: "candidates", Level: levelOK,
			Detail: "the upstream has issuers below roots that are not trusted, `certctl ca rotate root --issuer` goes to one: " + some(usable),
		})
	}
	return found
}

// keptFindings tell of a root that is trusted for what it had signed before a backup was restored.
func keptFindings(rolled rotation.Rollout, r rollout.RootView) (found []*meshcav1.Finding) {
	for _, b := range rolled.Behind {
		if b.ID == r.ID && b.Kept && r.Tainted.IsZero() {
			found = append(found, &meshcav1.Finding{
				Subject: "root", Level: levelOK, Detail: fmt.Sprintf("%s (%.12s) is unknown to the backup that was restored: it is trusted until %s, "+
					"when the last SVID under it has ended, and leaves by itself", r.Certificate.Subject, r.ID, stampText(b.By)),
			})
		}
	}
	return found
}

func stampText(t time.Time) string { return t.UTC().Format(time.RFC3339) }
