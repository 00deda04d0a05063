package kill

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/rotation"
)

// witness holds what was seen of a site from outside, and says what must not have been. The bundle's file follows the
// store: after a kill, as soon as the next process writes it.
type witness struct {
	dir         string
	file, store sight
}

// sight is what was seen of the trust bundle in one place.
type sight struct {
	sequence uint64
	// roots are all that were ever in it; without is when one of them was first seen to be gone.
	roots   map[string]bool
	without map[string]time.Time
}

func newWitness(dir string) *witness {
	return &witness{dir: dir, file: newSight(), store: newSight()}
}

func newSight() sight { return sight{roots: map[string]bool{}, without: map[string]time.Time{}} }

// look reads the bundle file, as agents do.
func (w *witness) look() error {
	data, err := os.ReadFile(filepath.Join(w.dir, "bundle.json"))
	if err != nil {
		return err
	}
	return w.file.take(data)
}

// take takes in a trust bundle: its sequence never goes down.
func (s *sight) take(data []byte) error {
	now := time.Now()
	b, err := spiffebundle.Parse(domain, data)
	if err != nil {
		return err
	}
	sequence, _ := b.SequenceNumber()
	if sequence < s.sequence {
		return fmt.Errorf("the bundle's sequence went from %d to %d", s.sequence, sequence)
	}
	s.sequence = sequence
	var has []string
	for _, r := range b.X509Authorities() {
		has = append(has, ca.RootID(r))
		s.roots[ca.RootID(r)] = true
	}
	for id := range s.roots {
		if _, known := s.without[id]; !known && !slices.Contains(has, id) {
			s.without[id] = now
		}
	}
	return nil
}

// inspect reads the store of a CA that is not running, and says what is wrong with it.
func (w *witness) inspect(ctx context.Context) (rotation.Rollout, error) {
	store, err := bolt.Open(filepath.Join(w.dir, "state", "meshca.db"))
	if err != nil {
		return rotation.Rollout{}, err
	}
	defer store.Close()
	stored, err := store.Bundle(ctx)
	if err != nil {
		return rotation.Rollout{}, err
	}
	if err := w.store.take(stored.JSON); err != nil {
		return rotation.Rollout{}, fmt.Errorf("the store: %w", err)
	}
	if w.store.sequence != stored.Sequence || w.store.sequence < w.file.sequence {
		return rotation.Rollout{}, fmt.Errorf("the store has the bundle %d, marked %d, and agents have seen %d", w.store.sequence, stored.Sequence, w.file.sequence)
	}
	r, _, err := store.Rollout(ctx)
	if err != nil {
		return r, err
	}
	var entries []ca.LedgerEntry
	err = store.ScanLedger(ctx, func(e ca.LedgerEntry) (bool, error) { entries = append(entries, e); return true, nil })
	if err != nil {
		return r, err
	}
	if r.Old.ID == "" {
		return r, nil // the first start's entry: nothing was replaced yet
	}
	return r, errors.Join(signedEarly(r, entries), w.file.removedEarly(r, entries), w.store.removedEarly(r, entries))
}

// entered is when the Rollout came to a step for the first time; zero: it did not.
func entered(r rotation.Rollout, s rotation.Step) time.Time {
	for _, p := range r.Passed {
		if p.Step == s {
			return p.Entered
		}
	}
	if r.Step == s {
		return r.Entered
	}
	return time.Time{}
}

// signedEarly: nothing stands in the ledger under the new root from before it was confirmed, or while the journal gives
// it no share, or beyond its share. What the ledger does not hold is not signed.
func signedEarly(r rotation.Rollout, entries []ca.LedgerEntry) error {
	confirmed, canary, all := entered(r, rotation.StepConfirmed), entered(r, rotation.StepCanary), entered(r, rotation.StepSigning)
	if r.Aborted && !confirmed.Before(r.AbortedAt) {
		confirmed = time.Time{} // that is the old root's, on the way back
	}
	for _, e := range entries {
		if hex.EncodeToString(e.Root) != r.New.ID {
			continue
		}
		switch {
		case confirmed.IsZero():
			return fmt.Errorf("entry %d (%s) was signed under a root that is not confirmed: %s, %+v", e.Index, e.ID, r.Step, r.Passed)
		case e.IssuedAt.Before(confirmed.Truncate(time.Second)): // a moment of issue has whole seconds
			return fmt.Errorf("entry %d (%s) was signed at %s, before its root was confirmed at %s", e.Index, e.ID, e.IssuedAt, confirmed)
		case canary.IsZero() && (all.IsZero() || r.Aborted):
			return fmt.Errorf("entry %d (%s) was signed under a root that had no share yet: %s, %+v", e.Index, e.ID, r.Step, r.Passed)
		case (r.Aborted || all.IsZero() || e.IssuedAt.Before(all.Truncate(time.Second))) && !rotation.InShare(e.ID, r.Canary):
			return fmt.Errorf("entry %d (%s) is not in the share of the root that signed it", e.Index, e.ID)
		}
	}
	return nil
}

// removedEarly: the root that goes is in the bundle until the last certificate under it has ended; in an emergency half
// of the bound from its retirement on, if that is sooner.
func (s *sight) removedEarly(r rotation.Rollout, entries []ca.LedgerEntry) error {
	goes := r.Goes().ID
	var until time.Time
	for _, e := range entries {
		if hex.EncodeToString(e.Root) == goes && e.NotAfter.After(until) {
			until = e.NotAfter
		}
	}
	if r.Within > 0 {
		if retired := entered(r, rotation.StepRetired); retired.IsZero() {
			until = time.Now().Add(r.Within) // not before it has retired
		} else if bound := retired.Add(r.Within / 2); bound.Before(until) {
			until = bound
		}
	}
	seen, gone := s.without[goes]
	leaving := entered(r, rotation.StepLeaving)
	switch {
	case gone && seen.Before(until):
		return fmt.Errorf("the root %s was gone from the bundle at %s, and was needed until %s", goes, seen, until)
	case gone && leaving.IsZero():
		return fmt.Errorf("the root %s is gone from the bundle, and the journal is at %s", goes, r.Step)
	case !leaving.IsZero() && leaving.Before(until):
		return fmt.Errorf("the root %s was to leave from %s on, and was needed until %s", goes, leaving, until)
	}
	if _, gone := s.without[r.Stays().ID]; gone {
		return fmt.Errorf("the root %s, which stays, is gone from the bundle", r.Stays().ID)
	}
	return nil
}

// over: a Rollout that has ended has one root that is trusted and signs, the one that stays.
func (w *witness) over(ctx context.Context, s *site) error {
	a, err := s.authorities(ctx)
	if err != nil {
		return err
	}
	r := a.GetRollout()
	stays := r.GetNewRoot()
	if r.GetAborted() {
		stays = r.GetOldRoot()
	}
	if roots := a.GetRoots(); len(roots) != 1 || roots[0].GetState() != "signing" || roots[0].GetId() != stays {
		return fmt.Errorf("after %s, aborted %t, the roots are %v, want %s alone to sign", r.GetStep(), r.GetAborted(), roots, stays)
	}
	return nil
}
