package bolt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// ErrExists is wrapped by Restore's error where a store stands that it was not told to replace.
var ErrExists = errors.New("there is a store already")

// ErrUnreadable is wrapped by Restore's error where nobody can say what the store that stands has decided.
var ErrUnreadable = errors.New("the store that stands cannot be read")

// ErrInPlace is wrapped by Restore's error where the backup has taken its place, and something went wrong behind that.
var ErrInPlace = errors.New("the restored store is in place")

// RestoreOptions tell what to restore, and what it may cost.
type RestoreOptions struct {
	// Backup is the backup's content.
	Backup io.Reader
	// Path is where the store belongs; its directory is there.
	Path string
	// TrustDomain is the one that the backup must be of.
	TrustDomain string
	// Replace allows that a store stands at Path. It is kept beside it, under another name.
	Replace bool
	// AcceptRollback allows that the store which stands has decided more than the backup knows. Then what it denies is
	// denied in the restored one too, what it has tainted is tainted, and what it trusts is trusted for as long as an SVID can
	// live; that one's bundle sequence and generation lie beyond.
	AcceptRollback bool
	// DryRun checks everything and changes nothing.
	DryRun bool
}

// Restored says what was done, or would be.
type Restored struct {
	Header Header
	// State is the restored store's, as it begins.
	State State
	// Aside is where the store that stood is kept; empty when none stood.
	Aside string
	// Behind is what was accepted to be lost; nil: nothing.
	Behind *Behind
}

// Restore puts a backup in the place of a store that nobody uses. Until it does, and if anything fails, what stands
// stays as it is.
func Restore(ctx context.Context, o RestoreOptions) (r Restored, err error) {
	dir := filepath.Dir(o.Path)
	f, err := os.CreateTemp(dir, ".meshca-restore-*") // mode 0600
	if err != nil {
		return Restored{}, err
	}
	defer func() { _ = os.Remove(f.Name()) }() // it has another name by then, or is not wanted
	if r.Header, err = extract(o.Backup, f); err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return r, err
	}
	next, err := openForeign(f.Name(), &bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return r, fmt.Errorf("%w: what it holds is no store: %w", ErrBackup, err)
	}
	placed := false
	defer func() { // until all is in place, nobody can open what is there already
		late := next.Close()
		if late != nil && placed {
			late = fmt.Errorf("%w. But closing it failed: %w", ErrInPlace, late)
		}
		err = errors.Join(err, late)
	}()
	r.State, err = r.verify(next, o.TrustDomain)
	if err == nil {
		var release func()
		if release, err = r.succeed(next, o); release != nil {
			defer release() // nobody opens what stands before it is replaced
		}
	}
	if err == nil {
		r.State.Rollout, err = putBack(next, time.Now())
	}
	if err != nil || o.DryRun || ctx.Err() != nil {
		return r, errors.Join(err, ctx.Err())
	}
	err = r.place(f.Name(), o.Path)
	placed = err == nil
	return r, err
}

// verify holds what was extracted to bbolt's own rules and to what its header says.
func (r *Restored) verify(next *bbolt.DB, trustDomain string) (st State, err error) {
	err = viewForeign(next, func(tx *bbolt.Tx) error {
		var broken []error
		for err := range tx.Check() {
			if len(broken) < 4 {
				broken = append(broken, err)
			}
		}
		if len(broken) > 0 {
			return fmt.Errorf("%w: its store is damaged: %w", ErrBackup, errors.Join(broken...))
		}
		st, err = readState(tx, "what the backup holds")
		return err
	})
	if err != nil {
		return st, err
	}
	td, err := st.Bundle.TrustDomain()
	switch {
	case err != nil:
		return st, err
	case td != r.Header.TrustDomain || st.Mark.Generation != r.Header.Generation || st.Bundle.Sequence != r.Header.BundleSequence:
		return st, fmt.Errorf("%w: its header and its store do not belong together", ErrBackup)
	case td != trustDomain:
		return st, fmt.Errorf("%w: the backup is of trust domain %q, the configuration says %q. Name the configuration of the CA that it was taken of",
			ca.ErrTrustDomain, td, trustDomain)
	}
	return st, nil
}

// succeed looks at the store that stands, and makes next its successor. The lock on what stands is held until release.
func (r *Restored) succeed(next *bbolt.DB, o RestoreOptions) (release func(), err error) {
	if _, err := os.Lstat(o.Path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	standing, err := openForeign(o.Path, &bbolt.Options{Timeout: lockWait, ReadOnly: true})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("%w: %s. Stop the CA first (`fuser %s` names the process)", ErrInUse, o.Path, o.Path)
	}
	if err == nil {
		release = func() { _ = standing.Close() }
	}
	if !o.Replace {
		return release, fmt.Errorf("%w: %s", ErrExists, o.Path)
	}
	r.Aside = o.Path + ".replaced-" + time.Now().UTC().Format("20060102T150405Z")
	var have State
	if err == nil {
		err = viewForeign(standing, func(tx *bbolt.Tx) (err error) { have, err = readState(tx, o.Path); return err })
	}
	switch {
	case errors.Is(err, ErrSchema): // it can be read, by another build
		return release, err
	case err != nil && !o.AcceptRollback:
		return release, fmt.Errorf("%w: %w", ErrUnreadable, err)
	case err != nil:
		return release, nil //nolint:nilerr // it was said to go on: agents will tell what it had decided
	}
	if r.Behind, err = compareStates(next, r.State, have); err != nil || r.Behind == nil {
		return release, err
	}
	r.Behind.Made = r.Header.Made
	if !o.AcceptRollback {
		return release, r.Behind
	}
	r.State, err = carryOver(next, have)
	return release, err
}

// place moves the file to its name, and what stood there aside. There is a store at that name at every moment.
func (r *Restored) place(file, path string) error {
	dir := filepath.Dir(path)
	if r.Aside == "" {
		if err := os.Link(file, path); err != nil { // which replaces nothing, if something came meanwhile
			return fmt.Errorf("putting the store in place: %w", err)
		}
		if err := syncDir(dir); err != nil {
			return fmt.Errorf("%w. But nobody knows whether it stays so if power fails (%w). See to the disk before you start the CA", ErrInPlace, err)
		}
		return nil
	}
	undo, err := r.keepAside(path)
	if err != nil {
		return fmt.Errorf("keeping the store that stood: %w", err)
	}
	if err := os.Rename(file, path); err != nil {
		return errors.Join(fmt.Errorf("putting the store in place: %w", err), undo())
	}
	if err := gone(os.Remove(path + walSuffix)); err != nil {
		return errors.Join(fmt.Errorf("%w, and what stood is kept as %s. But the log of that is still beside it (%w). Move it away before you start the CA",
			ErrInPlace, r.Aside, err), syncDir(dir))
	}
	if err := syncDir(dir); err != nil {
		return fmt.Errorf("%w, and what stood is kept as %s. But nobody knows whether it stays so if power fails (%w). See to the disk before you start the CA",
			ErrInPlace, r.Aside, err)
	}
	return nil
}

// keepAside gives a store and its log a second name, that nothing has. Its log goes along, for a store that was not closed is
// whole with it alone.
func (r *Restored) keepAside(path string) (undo func() error, err error) {
	name := r.Aside
	for i := 2; ; i++ {
		undo, err := linkBoth(path, r.Aside)
		if err == nil || !errors.Is(err, fs.ErrExist) {
			return undo, err
		}
		r.Aside = fmt.Sprintf("%s-%d", name, i)
	}
}

// linkBoth gives a store and its log a second name, or neither.
func linkBoth(path, aside string) (undo func() error, err error) {
	if _, err := os.Lstat(aside + walSuffix); err == nil { // there may be no log to meet it
		return nil, fs.ErrExist
	}
	undo = func() error { return nil }
	switch err := os.Link(path+walSuffix, aside+walSuffix); {
	case err == nil:
		undo = func() error { return os.Remove(aside + walSuffix) }
	case gone(err) != nil:
		return nil, err
	}
	if err := os.Link(path, aside); err != nil {
		return nil, errors.Join(err, undo())
	}
	return func() error { return errors.Join(os.Remove(aside), undo()) }, nil
}

// gone is an error but for that of a file that is not there.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Behind is what a store has decided that a backup of it does not know. As an error it is Restore's refusal.
type Behind struct {
	// Made is when the backup was.
	Made             time.Time
	Backup, Standing State
	// Forked says that the two went on differently from some moment on, so that neither is the older one.
	Forked bool
	// Undenied are denials that would be lost.
	Undenied []ca.Denial
	// Untainted are taints of roots that would be lost.
	Untainted []rotation.Taint
}

func (b *Behind) Error() string {
	var lost []string
	if have, old := b.Standing.Bundle.Sequence, b.Backup.Bundle.Sequence; have > old {
		lost = append(lost, fmt.Sprintf("the trust bundle would go back from sequence %d to %d", have, old))
	}
	if b.Standing.RolloutVersion != b.Backup.RolloutVersion {
		lost = append(lost, fmt.Sprintf("the rollout of roots from %q (change %d) to %q (change %d)",
			b.Standing.Rollout.Step, b.Standing.RolloutVersion, b.Backup.Rollout.Step, b.Backup.RolloutVersion))
	}
	if n := len(b.Undenied); n > 0 {
		lost = append(lost, fmt.Sprintf("%d denials would be forgotten, of %s", n, ids(b.Undenied)))
	}
	if n := len(b.Untainted); n > 0 {
		var roots []string
		for _, t := range b.Untainted {
			roots = append(roots, t.ID)
		}
		lost = append(lost, fmt.Sprintf("%d taints would be forgotten, of the roots %s", n, some(roots)))
	}
	if len(lost) == 0 {
		lost = append(lost, fmt.Sprintf("orders between state %d and %d would be forgotten", b.Backup.Mark.Generation, b.Standing.Mark.Generation))
	}
	if b.Forked {
		lost = append(lost, "and the backup is not an earlier state of this store: they went on differently")
	}
	return strings.Join(lost, "; ")
}

func ids(denials []ca.Denial) string {
	var names []string
	for _, d := range denials {
		names = append(names, d.ID)
	}
	return some(names)
}

// some names the first few.
func some(names []string) string {
	const most = 5
	if more := len(names) - most; more > 0 {
		names = append(names[:most:most], fmt.Sprintf("%d more", more))
	}
	return strings.Join(names, ", ")
}

// compareStates says what the standing store has decided that next, a backup, does not know; nil when it knows all. Marks
// decide where both have them; stores of earlier builds have none, and their parts are compared.
func compareStates(next *bbolt.DB, backup, standing State) (*Behind, error) {
	var kin kinship
	err := next.View(func(tx *bbolt.Tx) (err error) {
		if standing.Mark.Generation > 0 {
			kin, err = lookUp(tx, standing.Mark)
		}
		return err
	})
	if err != nil || kin == ownMark {
		return nil, err
	}
	b := &Behind{Backup: backup, Standing: standing, Forked: kin == foreignMark && standing.Mark.Generation <= backup.Mark.Generation}
	denied := map[string]bool{}
	for _, d := range backup.Denials {
		denied[d.ID] = true
	}
	for _, d := range standing.Denials {
		if !denied[d.ID] {
			b.Undenied = append(b.Undenied, d)
		}
	}
	for _, t := range standing.Rollout.Taints {
		if _, known := backup.Rollout.Tainted(t.ID); !known {
			b.Untainted = append(b.Untainted, t)
		}
	}
	known := kin != foreignMark && standing.Bundle.Sequence <= backup.Bundle.Sequence && standing.RolloutVersion <= backup.RolloutVersion && len(b.Undenied)+len(b.Untainted) == 0
	if known {
		return nil, nil
	}
	return b, nil
}
