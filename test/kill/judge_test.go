package kill

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/rotation"
)

// What must not be.
var (
	errEarly     = errors.New("signed under a root that is not confirmed")
	errShare     = errors.New("signed outside of the root's share")
	errRemoved   = errors.New("a root is gone that was needed, or came back")
	errHandshake = errors.New("a handshake would fail")
	errLedger    = errors.New("the ledger does not tell what was issued")
	errReplaced  = errors.New("signed by an intermediate that was replaced")
	errUnrenewed = errors.New("what was to be renewed was not")
)

// early says what is wrong with a signature under a root that was made at a moment, or before: all peers must have taken the
// root into use by then, and the bundle file's readers must have had their time. In an emergency half of the bound ends that.
func (w *witness) early(root string, at time.Time, entries []ca.LedgerEntry) error {
	if root == w.first || w.hurried(at) {
		return nil
	}
	for account, p := range w.peers {
		switch since, has := p.since[root]; {
		case has && !at.Before(since):
		case w.lapsed(account, root, at, entries):
			w.excused = true
		case has:
			return fmt.Errorf("%w: %s at %s, and %s has it since %s", errEarly, root, at, account, since)
		default:
			return fmt.Errorf("%w: %s at %s, and %s lacks it", errEarly, root, at, account)
		}
	}
	lacked, seen := w.file.roots[root]
	if until := lacked.Add(w.refresh); seen && w.refresh > 0 && at.Before(until) {
		return fmt.Errorf("%w: %s at %s, and readers of the bundle file are given time until %s", errEarly, root, at, until)
	}
	return nil
}

// meet notes which peer would refuse which other one's certificate now. When half of an emergency's bound is over some may: who
// has not confirmed is not waited for, and of who is not renewed strand takes note.
func (w *witness) meet(now time.Time) {
	for server, s := range w.peers {
		if s.root == "" || !now.Before(s.notAfter) || w.hurried(now) {
			continue
		}
		for client, c := range w.peers {
			if c.trusted != nil && !c.trusted[s.root] {
				w.refused = append(w.refused, handshake{server, client, s.root, now})
			}
		}
	}
}

// strand notes whose certificate is refused for its root was tainted and has left: by those who trusted it before, and have
// what is trusted now. By then it was to be renewed.
func (w *witness) strand(now time.Time) {
	for server, s := range w.peers {
		refused := false
		for _, c := range w.peers {
			_, had := c.since[s.root]
			refused = refused || had && !c.trusted[s.root]
		}
		x, known := w.stranded[server]
		if known {
			w.note(w.late(server, x, now))
		}
		if known && x.root != s.root {
			delete(w.stranded, server)
			known = false
		}
		if _, tainted := w.said.tainted[s.root]; refused && tainted && !known {
			w.stranded[server] = stranding{s.root, now, s.notAfter}
		}
	}
}

const (
	// tardy is how late a renewal may come where the CA was killed. Where it was not, it comes before the root leaves: an agent that
	// mends for itself what its bundle refuses would hide a renewal that was never ordered.
	tardy = within / 2
	// resumes is how long an agent may take to be back when the CA is.
	resumes = 10 * time.Second
)

// late says whether a peer's certificate was refused for too long: a CA that was killed has what that cost, and no more.
func (w *witness) late(server string, x stranding, now time.Time) error {
	o := w.outages
	allowed := o.total + time.Duration(o.count)*resumes
	if o.count > 0 {
		allowed += tardy
	}
	if !o.since.IsZero() {
		allowed += now.Sub(o.since)
	}
	if now.After(x.end) {
		now = x.end
	}
	if lasted := now.Sub(x.since); lasted > allowed {
		return fmt.Errorf("%w: the certificate of %s under %s was not renewed when that root left, and was refused for %s from %s on, %s are allowed",
			errHandshake, server, x.root, lasted, x.since, allowed)
	}
	return nil
}

// lapsed reports whether a workload had no SVID that lived at a moment, about or after the time at which a root was published,
// as when a slow machine keeps the CA away for long: such a one is not waited for.
func (w *witness) lapsed(account, root string, until time.Time, entries []ca.LedgerEntry) bool {
	from := w.file.roots[root].Add(-w.life)
	var covered time.Time
	for _, e := range slices.Backward(entries) { // they are newest first
		at := e.IssuedAt.Add(time.Second) // at the latest
		switch {
		case e.ID != idOf(account):
			continue
		case at.After(until):
			return until.After(covered)
		case !covered.IsZero() && at.After(from) && at.After(covered):
			return true
		}
		covered = latest(covered, e.NotAfter)
	}
	return until.After(covered)
}

// hurried reports whether half of an emergency's bound is over: nobody is waited for any more.
func (w *witness) hurried(now time.Time) bool {
	for root := range w.said.tainted {
		if w.forced(root, now) {
			return true
		}
	}
	return false
}

// forced reports whether a root was tainted and may be gone, whatever lives under it.
func (w *witness) forced(root string, now time.Time) bool {
	half, tainted := w.said.tainted[root]
	return tainted && !now.Before(half)
}

// inspect reads the store of a CA that is not running, and says what is wrong. The journal is returned unread.
func (w *witness) inspect(ctx context.Context) (rotation.Rollout, error) {
	store, err := bolt.Open(filepath.Join(w.dir, "state", "meshca.db"))
	if err != nil {
		return rotation.Rollout{}, err
	}
	defer store.Close()
	r, _, err := store.Rollout(ctx)
	if err != nil {
		return r, err
	}
	stored, err := store.Bundle(ctx)
	if err != nil {
		return r, err
	}
	var entries []ca.LedgerEntry
	err = store.ScanLedger(ctx, func(e ca.LedgerEntry) (bool, error) { entries = append(entries, e); return true, nil })
	if err != nil {
		return r, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.store.bundle(time.Now(), stored.JSON); err != nil {
		return r, fmt.Errorf("the store: %w", err)
	}
	if w.store.sequence != stored.Sequence || w.store.sequence < w.file.sequence {
		return r, fmt.Errorf("the store has the bundle %d, marked %d, and readers have seen %d", w.store.sequence, stored.Sequence, w.file.sequence)
	}
	return r, errors.Join(w.wrong, w.judge(entries))
}

// judge looks at all that was signed: what the ledger does not hold is not.
func (w *witness) judge(entries []ca.LedgerEntry) error {
	errs := []error{w.truthful(entries)}
	for _, e := range entries {
		if err := w.signed(e, entries); err != nil {
			errs = append(errs, fmt.Errorf("entry %d (%s): %w", e.Index, e.ID, err))
			break
		}
	}
	for _, h := range w.refused {
		if !w.lapsed(h.client, h.root, h.at, entries) {
			errs = append(errs, fmt.Errorf("%w: at %s %s shows a certificate under %s, which %s does not trust", errHandshake, h.at, h.server, h.root, h.client))
			break
		}
	}
	for server, x := range w.stranded {
		errs = append(errs, w.late(server, x, time.Now()))
	}
	sights := []*sight{&w.file, &w.store}
	for _, p := range w.peers {
		sights = append(sights, &p.sight)
	}
	for _, s := range sights {
		for root, gone := range s.without {
			errs = append(errs, w.removed(root, gone, entries))
		}
	}
	return errors.Join(errs...)
}

// signed says what is wrong with a signature.
func (w *witness) signed(e ca.LedgerEntry, entries []ca.LedgerEntry) error {
	root := hex.EncodeToString(e.Root)
	if w.said.barred[root] {
		return fmt.Errorf("%w, and never will be: %s was given up", errEarly, root)
	}
	last := e.IssuedAt.Add(time.Second) // a moment of issue has whole seconds
	if err := w.early(root, last, entries); err != nil {
		return err
	}
	bound := w.said.share > 0 && root != w.first && (w.said.free.IsZero() || !last.After(w.said.free))
	if bound && !rotation.InShare(e.ID, w.said.share) {
		return fmt.Errorf("%w: %s", errShare, root)
	}
	return w.replaced(hex.EncodeToString(e.AuthorityKeyID), e.IssuedAt)
}

// removed says what lives under a root that is gone since a moment, or since a while before it.
func (w *witness) removed(root string, gone time.Time, entries []ca.LedgerEntry) error {
	if w.forced(root, gone) {
		return nil
	}
	for _, e := range entries {
		if hex.EncodeToString(e.Root) == root && e.NotAfter.After(gone) {
			return fmt.Errorf("%w: %s at %s, and entry %d (%s) under it ends at %s", errRemoved, root, gone, e.Index, e.ID, e.NotAfter)
		}
	}
	return nil
}

// truthful compares what peers were really served with the ledger.
func (w *witness) truthful(entries []ca.LedgerEntry) error {
	left := len(w.issued)
	for _, e := range entries {
		l, served := w.issued[serialOf(e)]
		if !served {
			continue
		}
		left--
		if l.id != e.ID || l.root != hex.EncodeToString(e.Root) || l.authority != hex.EncodeToString(e.AuthorityKeyID) || !l.notAfter.Equal(e.NotAfter) {
			return fmt.Errorf("%w: entry %d says %s under %x, served was %+v", errLedger, e.Index, e.ID, e.Root, l)
		}
	}
	if left > 0 {
		return fmt.Errorf("%w: it lacks %d certificates that were served", errLedger, left)
	}
	return nil
}

// replaced says what is wrong with a signature by an intermediate that was made at a moment, or a little later.
func (w *witness) replaced(authority string, at time.Time) error {
	if w.said.done.IsZero() || !w.said.replaced[authority] || at.Before(w.said.done) {
		return nil
	}
	return fmt.Errorf("%w: %s signed at %s, and was replaced by %s", errReplaced, authority, at, w.said.done)
}

func latest(x, y time.Time) time.Time {
	if x.After(y) {
		return x
	}
	return y
}
