package rotation

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Step is where a Rollout stands.
type Step string

// The steps, in their order. An abort goes back by the same steps with the parts exchanged.
const (
	// StepChosen: the successor stands in the journal, and nobody else knows it.
	StepChosen Step = "chosen"
	// StepPublished: it is in the set that relying parties trust, and they have yet to confirm that.
	StepPublished Step = "published"
	// StepConfirmed: all who count trust it. It signs for nobody before its signer is ready.
	StepConfirmed Step = "confirmed"
	// StepCanary: it signs for a share of the identities, until an operator says go on.
	StepCanary Step = "canary"
	// StepSigning: the one that stays signs for all; what the other one began is finished.
	StepSigning Step = "signing"
	// StepRetired: the one that goes has signed its last, and is trusted until the last certificate under it has ended.
	StepRetired Step = "retired"
	// StepLeaving: it is being taken out of the trusted set. From here on there is no way back.
	StepLeaving Step = "leaving"
	// StepOut: the one that goes is not trusted any more; the Rollout is over.
	StepOut Step = "out"
)

// Party is one of the two authorities of a Rollout.
type Party struct {
	// ID names it in the trusted set; of a root, the SHA-256 of its certificate in hex.
	ID string `json:"id"`
	// Ref is how its upstream knows it; it means nothing here.
	Ref string `json:"ref,omitempty"`
	// Key names its key; of a root, the SHA-256 of its SubjectPublicKeyInfo in hex. Empty: it is not known. What is tainted
	// is a key: another authority of the same one is none the better.
	Key string `json:"key,omitempty"`
}

// same reports whether two parties are one authority, or have one key.
func (p Party) same(q Party) bool { return p.ID == q.ID || p.Key != "" && p.Key == q.Key }

// Rollout replaces one authority that others trust by another one, so that nobody ever meets a signature of one that he
// does not trust: in the set, confirmed, signs, the old one retired, out. It is a value: each change makes another one,
// which counts once it stands in the journal.
type Rollout struct {
	Old  Party `json:"old"`
	New  Party `json:"new"`
	Step Step  `json:"step"`
	// Entered is when the step was entered.
	Entered time.Time `json:"entered"`
	Begun   time.Time `json:"begun"`
	By      string    `json:"by"`
	// Canary is the share of identities, in percent, that New signs for first; 0: none.
	Canary int `json:"canary,omitempty"`
	// NewShare is the share of identities, in percent, that New signs for in this step.
	NewShare int `json:"newShare"`
	// Set is the sequence of the trusted set that has New.
	Set uint64 `json:"set,omitempty"`
	// Trusted says that New was in the set before, for its own sake, and others may rely on it: where the Rollout goes back, it
	// stays there.
	Trusted bool `json:"trusted,omitempty"`
	// Despite names those whose confirmation an operator gave up.
	Despite []string `json:"despite,omitempty"`
	// Within is the bound of an emergency: the one that goes is tainted. Half of it is for confirmations, half for renewing
	// all that it signed, and then it goes, whatever still lives under it. Zero: no emergency, everything is waited for.
	Within time.Duration `json:"within,omitempty"`
	// Since is when the emergency began; zero with a Within: with the Rollout.
	Since time.Time `json:"since,omitzero"`
	// Aborted says that Old stays and New goes.
	Aborted   bool      `json:"aborted,omitempty"`
	AbortedBy string    `json:"abortedBy,omitempty"`
	AbortedAt time.Time `json:"abortedAt,omitzero"`
	// LastEnd is when the last certificate under the one that goes ends; set when it has retired.
	LastEnd time.Time `json:"lastEnd,omitzero"`
	// Passed are the steps that are over, in their order: who looks now and then sees them all.
	Passed []Passage `json:"passed,omitempty"`

	// What follows outlives this Rollout: the next one takes it over.

	// Taints are the authorities that must never be chosen again.
	Taints []Taint `json:"taints,omitempty"`
	// Behind are further ones that leave the set, whatever becomes of the two parties.
	Behind []Behind `json:"behind,omitempty"`
	// Gone names those that a Rollout or a command took out of the set, the newest last: nobody takes them in again
	// unasked.
	Gone []string `json:"gone,omitempty"`
	// Lives says by ID until when certificates may live that authorities have signed by a journal that a backup took the place
	// of. It is made once, and not changed.
	Lives map[string]time.Time `json:"lives,omitempty"`
	// Owed are renewals that nobody could order yet.
	Owed []Owed `json:"owed,omitempty"`
}

// Errors of commands that a Rollout is not in the state for.
var (
	ErrRolling    = errors.New("a rollout is under way: `certctl ca status` shows what it waits for, and what ends it; then begin another one")
	ErrNotRolling = errors.New("no rollout is under way: `certctl ca status` shows how the last one ended, `certctl ca rotate root` begins one")
	ErrStep       = errors.New("not in this step")
	// ErrMeanwhile is that of an order which rests on what is not so any more.
	ErrMeanwhile = errors.New("the rollout has changed while this was being decided, and nothing was done: look at `certctl ca status`, and give the order again")
)

// Active reports whether the Rollout is under way.
func (r Rollout) Active() bool { return r.Step != "" && r.Step != StepOut }

// Stays is the party that signs for all in the end, Goes the other one.
func (r Rollout) Stays() Party {
	if r.Aborted {
		return r.Old
	}
	return r.New
}

// Goes is the party that signs for nobody in the end. It leaves the trusted set, unless the Rollout Spares it.
func (r Rollout) Goes() Party {
	if r.Aborted {
		return r.New
	}
	return r.Old
}

// Spares reports whether the one that goes stays in the trusted set, where it was before: it signs for nobody then.
func (r Rollout) Spares() bool {
	_, tainted := r.tainted(r.New)
	return r.Aborted && r.Trusted && !tainted
}

// Trust is the Rollout when somebody wants an authority in the set for its own sake, whatever becomes of this. Of one that is on
// its way out it refuses that.
func (r Rollout) Trust(id string) (Rollout, error) {
	r = r.Stay(id)
	switch {
	case r.behind(id), r.Step == StepLeaving && id == r.Goes().ID:
		return Rollout{}, fmt.Errorf("the root %s is being taken out of the trust bundle: try again when it is out", id)
	case r.Active() && !r.Aborted && id == r.Old.ID:
		return Rollout{}, fmt.Errorf("the root %s is being replaced, and leaves the trust bundle at the end of that: `certctl ca abort` keeps it, "+
			"or try again when it is out", id)
	case r.Active() && id == r.New.ID:
		r.Trusted = true
	}
	return r.come(id), nil
}

// Signs reports whether the party with this ID signs for anyone in this step.
func (r Rollout) Signs(id string) bool {
	return id == r.New.ID && r.NewShare > 0 || id == r.Old.ID && r.NewShare < 100
}

// BeginOptions tell how a Rollout is to go.
type BeginOptions struct {
	By string
	// Canary is the Rollout's.
	Canary int
	// Trusted says that the successor is in the set already.
	Trusted bool
}

// Begin makes the Rollout that replaces old, which signs, by next, behind before, which must be over. An emergency begins with
// Taint.
func Begin(before Rollout, old, next Party, o BeginOptions, now time.Time) (Rollout, error) {
	switch {
	case before.Active():
		return Rollout{}, fmt.Errorf("from %s to %s, %s: %w", before.Old.ID, before.New.ID, before.Step, ErrRolling)
	case old.ID == "" || next.ID == "":
		return Rollout{}, errors.New("a rollout needs two parties")
	case old.ID != before.signer(old).ID:
		return Rollout{}, fmt.Errorf("%s signs no more: %w", old.ID, ErrMeanwhile)
	case o.Canary < 0 || o.Canary > 99:
		return Rollout{}, fmt.Errorf("a share of %d %% does not lie between 1 and 99", o.Canary)
	}
	if err := before.takes(old, next); err != nil {
		return Rollout{}, err
	}
	r := before.successor(old, next, o.By, now)
	r.Canary, r.Trusted = o.Canary, o.Trusted && !before.kept(next.ID)
	return r, nil
}

// takes says why next cannot follow old; nil when it can.
func (r Rollout) takes(old, next Party) error {
	if old.ID == next.ID {
		return errors.New("it is the one that signs already: `certctl ca status` shows candidates to rotate to; where its key was stolen, " +
			"`certctl ca taint root`; for a new intermediate below it, `certctl ca rotate intermediate`")
	}
	if t, tainted := r.tainted(next); tainted {
		return t.refused(next.ID, "it cannot follow %s", old.ID)
	}
	if r.behind(next.ID) && !r.kept(next.ID) {
		return fmt.Errorf("%s is being taken out of the trusted set: try again when it is out", next.ID)
	}
	return nil
}

// successor is a new Rollout, with what outlives this one. What it brings in is not gone any more.
func (r Rollout) successor(old, next Party, by string, now time.Time) Rollout {
	return Rollout{
		Old: old, New: next, Step: StepChosen, Entered: now, Begun: now, By: by,
		Taints: r.taints(), Lives: r.Lives, Owed: r.Owed, Behind: slices.Clone(r.Stay(next.ID).Behind), Gone: r.come(next.ID).Gone,
	}
}

// Repoint has an authority that is a party of this Rollout, or signs since, known to its upstream by another reference.
// It reports whether it is a party, and was known by another one.
func (r Rollout) Repoint(p Party) (Rollout, bool) {
	moved := false
	for _, x := range []*Party{&r.Old, &r.New} {
		if x.ID == p.ID && x.Ref != p.Ref && (r.Active() || *x == r.Stays()) {
			x.Ref, moved = p.Ref, true
		}
	}
	return r, moved
}

// Continue ends the canary: New signs for all. Where the Rollout is being aborted and New signs still, it turns it forward
// again: Old may not be able to any more.
func (r Rollout) Continue(now time.Time) (Rollout, error) {
	switch {
	case r.Aborted && r.Step == StepConfirmed && r.NewShare > 0:
		if t, tainted := r.tainted(r.New); tainted {
			return Rollout{}, t.refused(r.New.ID, "going forward would have it sign. If %s is not to be trusted either, taint that", r.Old.ID)
		}
		r.Canary = 0
		return r.forth(now), nil
	case r.Step != StepCanary:
		return Rollout{}, fmt.Errorf("%w: %s. There is something to continue while a share of the identities is signed for (canary), and where the one to go back to does not sign yet",
			ErrStep, r.Step)
	}
	return r.enter(StepSigning, 100, now), nil
}

// GiveUp goes on without the confirmation of the ones named.
func (r Rollout) GiveUp(names ...string) (Rollout, error) {
	if r.Step != StepChosen && r.Step != StepPublished {
		return Rollout{}, fmt.Errorf("%w: %s. Confirmations are waited for while it is published", ErrStep, r.Step)
	}
	r.Despite = slices.Clone(r.Despite)
	for _, name := range names {
		if !slices.Contains(r.Despite, name) {
			r.Despite = append(r.Despite, name)
		}
	}
	return r, nil
}

// Abort turns the Rollout round: Old signs for all again, and New leaves the set when the last certificate under it has
// ended. Where New has signed nothing yet, it leaves at once. One that was in the set before stays (Spares).
func (r Rollout) Abort(by string, now time.Time) (Rollout, error) {
	switch {
	case !r.Active():
		return Rollout{}, ErrNotRolling
	case r.Step == StepLeaving:
		return Rollout{}, fmt.Errorf("%w: %s. %s is being taken out of the trusted set; to go back, begin a rollout to it", ErrStep, r.Step, r.Goes().ID)
	case r.Aborted:
		return Rollout{}, fmt.Errorf("%w: it is being aborted since %s, by %s%s", ErrStep, r.AbortedAt.UTC().Format(time.RFC3339), r.AbortedBy, r.wayForth(now))
	}
	if t, tainted := r.tainted(r.Old); tainted {
		return Rollout{}, t.refused(r.Old.ID, "going back would have it sign again. If %s is not to be trusted either, taint that", r.New.ID)
	}
	return r.back(by, now), nil
}

// wayForth says what turns an abort forward again, where an order does.
func (r Rollout) wayForth(now time.Time) string {
	if _, err := r.Continue(now); err != nil {
		return ""
	}
	return fmt.Sprintf(". Until %s signs again, `certctl ca continue` turns it forward", r.Old.ID)
}

// back turns the Rollout round to Old, which is trusted still.
func (r Rollout) back(by string, now time.Time) Rollout {
	r.Aborted, r.AbortedBy, r.AbortedAt, r.LastEnd = true, by, now, time.Time{}
	if r.NewShare == 0 {
		return r.enter(StepSigning, 0, now) // as it does already
	}
	return r.enter(StepConfirmed, r.NewShare, now) // it signs when it is ready to
}

// enter is the Rollout in another step.
func (r Rollout) enter(s Step, newShare int, now time.Time) Rollout {
	r.Passed = append(slices.Clip(r.Passed), Passage{Step: r.Step, Entered: r.Entered})
	r.Step, r.NewShare, r.Entered = s, newShare, now
	return r
}

// entered reports whether a step was entered since before: also the same one again, as where an abort that waits for a signer is
// turned forward.
func (r Rollout) entered(before Rollout) bool {
	return len(r.Passed) != len(before.Passed) || r.Step != before.Step || !r.Begun.Equal(before.Begun)
}

// staying is the step in which the one that stays begins to sign.
func (r Rollout) staying(now time.Time) Rollout {
	switch {
	case r.Aborted:
		return r.enter(StepSigning, 0, now)
	case r.Canary > 0:
		return r.enter(StepCanary, r.Canary, now)
	}
	return r.enter(StepSigning, 100, now)
}

// confirmedBy is when confirmations are not waited for any longer; zero: never.
func (r Rollout) confirmedBy() time.Time {
	if r.Within == 0 {
		return time.Time{}
	}
	return r.since().Add(r.Within / 2)
}

// outBy is when the one that goes leaves the set.
func (r Rollout) outBy() time.Time {
	if r.Within == 0 {
		return r.LastEnd
	}
	if forced := r.Entered.Add(r.Within / 2); forced.Before(r.LastEnd) {
		return forced
	}
	return r.LastEnd
}

// InShare reports whether an identity is in the first percent of all, by a hash that is the same in every process.
func InShare(identity string, percent int) bool {
	sum := sha256.Sum256([]byte("share of " + identity))
	return int(binary.BigEndian.Uint64(sum[:8])%100) < percent
}
