package rollout

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// Maker is an upstream that can make a root to rotate to.
type Maker interface {
	NewIssuer(ctx context.Context) (ca.UpstreamIssuer, error)
}

// Includer is an upstream that lists only some of its issuers, where there are many. What is named is listed from then on,
// by its reference or name.
type Includer interface {
	Include(names ...string)
	// LeftOut is how many were not listed when it was last asked.
	LeftOut() int
}

// Operator does what people order about authorities. It is safe for concurrent use.
type Operator struct {
	roots  *Roots
	roller *rotation.Roller
	// changing is held while a rollout begins or a root is tainted, and while roots come into the trust bundle or go: else
	// the one could begin with what the other takes away. Nobody who holds it asks the upstream: an emergency waits for it.
	changing sync.Mutex
	seen     atomic.Pointer[sighting] // by the last view
	// named are the roots that the configuration named as this process began (Settle).
	named atomic.Pointer[[]*x509.Certificate]
	// ordering is held while renewals that are owed are ordered.
	ordering sync.Mutex
}

// NewOperator returns an Operator of these roots, which this roller moves.
func NewOperator(r *Roots, roller *rotation.Roller) *Operator {
	return &Operator{roots: r, roller: roller}
}

// RotateOptions tell how the root is to be replaced.
type RotateOptions struct {
	// By is who ordered it, for the audit log.
	By string
	// Issuer is the upstream's reference or name of the issuer to go to; empty: one that the upstream makes, or the only
	// other one below a root that is trusted already. One that nobody has named is never taken.
	Issuer string
	// Canary is the share of identities, in percent, that the new root signs for at first.
	Canary int
	// Within is the bound of an emergency: a root is not to be trusted any more. Zero: none.
	Within time.Duration
	// Tainted is that root's ID; empty: the one that signs.
	Tainted string
	// DryRun only says what would happen.
	DryRun bool
}

// minWithin is the shortest bound of an emergency: agents renew in its second half, and need time for a second try.
const minWithin = 20 * time.Second

// Rotate begins to replace the root that signs. With Within it does without a root that is not to be trusted, also while a
// rollout is under way (see rotation.Rollout.Taint). It returns the Rollout as it was begun or changed, or would be.
func (o *Operator) Rotate(ctx context.Context, x RotateOptions) (rotation.Rollout, error) {
	if x.Within != 0 && (x.Within < minWithin || x.Within > ca.MaxTTL) {
		return rotation.Rollout{}, fmt.Errorf("a bound of %s: it must lie between %s and %s", x.Within, minWithin, ca.MaxTTL)
	}
	if x.Within != 0 && x.Canary != 0 {
		return rotation.Rollout{}, errors.New("an emergency has no canary: what is not to be trusted must not go on signing")
	}
	if x.Within != 0 {
		return o.taint(ctx, x)
	}
	record, err := o.roller.Record(ctx)
	if err != nil {
		return rotation.Rollout{}, err
	}
	if record.Active() { // before a root is made in vain
		return rotation.Rollout{}, rotation.ErrRolling
	}
	old := o.signs(record)
	next, err := o.choose(ctx, record, x)
	if err != nil {
		return rotation.Rollout{}, err
	}
	begin := func(before rotation.Rollout) (rotation.Rollout, error) { // which may be another than was there as the upstream was asked
		r, err := rotation.Begin(before, old, next.Party, rotation.BeginOptions{By: x.By, Canary: x.Canary, Trusted: o.trusts(next.ID)}, o.roots.c.Now())
		if err == nil && next.named {
			r = configured(r, next.ID) // as a start would find it
		}
		if err == nil {
			err = next.fits(before)
		}
		return r, err
	}
	if x.DryRun {
		return begin(record)
	}
	o.changing.Lock()
	defer o.changing.Unlock()
	return o.roller.Change(ctx, begin)
}

// trusts reports whether the trust bundle has a root.
func (o *Operator) trusts(id string) bool {
	bundle, _ := o.roots.c.Trust.Bundle()
	return slices.ContainsFunc(bundle.X509Authorities(), func(c *x509.Certificate) bool { return ca.RootID(c) == id })
}

// signs is the root that signs for most, by this journal.
func (o *Operator) signs(record rotation.Rollout) rotation.Party {
	if record.Step != "" {
		return record.Signer()
	}
	root := o.roots.c.Authority.Assignment().Root
	return rotation.Party{ID: root.ID, Ref: root.Ref, Key: o.keys(nil)(root.ID)}
}

// successor is the root to go to. fits says why it cannot be gone to any more, by the journal as the order is entered: what it
// was chosen by may have changed.
type successor struct {
	rotation.Party
	fits func(rotation.Rollout) error
	// named says that the configuration names it: then it is trusted for its own sake, also where the rollout is aborted.
	named bool
}

// configures reports whether the configuration names the root of an issuer.
func (o *Operator) configures(i ca.UpstreamIssuer) bool {
	named := o.named.Load()
	return i.Named || named != nil && slices.ContainsFunc(*named, i.Root.Equal)
}

// choose finds the issuer to go to.
func (o *Operator) choose(ctx context.Context, record rotation.Rollout, x RotateOptions) (successor, error) {
	maker, makes := o.roots.c.Upstream.(Maker)
	if x.Issuer == "" && makes {
		made := successor{Party: rotation.Party{ID: "a new root that the upstream makes"}, fits: func(rotation.Rollout) error { return nil }}
		if x.DryRun {
			return made, nil
		}
		i, err := maker.NewIssuer(ctx)
		if err != nil {
			return successor{}, fmt.Errorf("making a root: %w", err)
		}
		made.Party = party(i)
		return made, nil
	}
	issuers, err := o.roots.issuers(ctx, x.Issuer)
	if err != nil {
		return successor{}, fmt.Errorf("asking the upstream for its issuers: %w", err)
	}
	var found []ca.UpstreamIssuer
	for _, i := range issuers {
		if x.Issuer != "" && (i.Ref == x.Issuer || i.Name == x.Issuer) || x.Issuer == "" && o.stands(record, i) {
			found = append(found, i)
		}
	}
	switch {
	case len(found) == 0 && x.Issuer == "":
		return successor{}, fmt.Errorf("the upstream makes no roots, and no other root is trusted that one of its issuers could sign under: "+
			"name the issuer to go to with --issuer, or make one there first. It has: %s", listed(issuers))
	case len(found) != 1:
		return successor{}, fmt.Errorf("%d of the upstream's issuers fit; name one of them by its reference: %s", len(found), listed(issuers))
	}
	fits := func(r rotation.Rollout) error {
		if err := barred(r, found[0]); err != nil {
			return err
		}
		if x.Issuer == "" && !o.stands(r, found[0]) {
			return rotation.ErrMeanwhile
		}
		return nil
	}
	if err := fits(record); err != nil {
		return successor{}, err
	}
	p, err := usable(found[0], o.roots.c.Authority.Life())
	return successor{p, fits, o.configures(found[0])}, err
}

// stands reports whether an issuer could follow without being named: somebody has trusted its root before, it can be used,
// and it has no part in what is under way.
func (o *Operator) stands(record rotation.Rollout, i ca.UpstreamIssuer) bool {
	if i.Root == nil || i.Fault != nil || barred(record, i) != nil {
		return false
	}
	bundle, _ := o.roots.c.Trust.Bundle()
	id := ca.RootID(i.Root)
	return bundle.HasX509Authority(i.Root) && id != o.signs(record).ID && (!record.Active() || id != record.Old.ID && id != record.New.ID)
}

func usable(i ca.UpstreamIssuer, life time.Duration) (rotation.Party, error) {
	switch {
	case i.Fault != nil:
		return rotation.Party{}, fmt.Errorf("issuer %s (%s) cannot be used: %w", i.Name, i.Ref, i.Fault)
	case i.Root == nil:
		return rotation.Party{}, fmt.Errorf("the root of issuer %s (%s) is not known", i.Name, i.Ref)
	case time.Until(i.NotAfter) < life:
		return rotation.Party{}, fmt.Errorf("issuer %s (%s) ends at %s, before an intermediate of %s would", i.Name, i.Ref, i.NotAfter.UTC().Format(time.RFC3339), life)
	}
	return party(i), nil
}

func party(i ca.UpstreamIssuer) rotation.Party {
	return rotation.Party{ID: ca.RootID(i.Root), Ref: i.Ref, Key: ca.KeyOf(i.Root)}
}

func listed(issuers []ca.UpstreamIssuer) string {
	var all []string
	for _, i := range issuers {
		all = append(all, fmt.Sprintf("%s (%s)", i.Ref, i.Name))
	}
	if len(all) == 0 {
		return "it has none"
	}
	return strings.Join(all, ", ")
}

// Continue ends the canary, or goes on without the confirmations named.
func (o *Operator) Continue(ctx context.Context, despite []string) (rotation.Rollout, error) {
	return o.roller.Change(ctx, func(r rotation.Rollout) (rotation.Rollout, error) {
		if !r.Active() {
			return r, rotation.ErrNotRolling
		}
		if len(despite) == 0 {
			return r.Continue(o.roots.c.Now())
		}
		waits, err := o.roots.Unconfirmed(ctx, r.Set, r.Entered)
		if err != nil {
			return r, err
		}
		for _, name := range despite {
			if !slices.Contains(waits, name) {
				return r, notAwaited(name, waits)
			}
		}
		return r.GiveUp(despite...)
	})
}

// notAwaited refuses to give up somebody who is not waited for.
func notAwaited(name string, waits []string) error {
	const next = "`certctl ca status` shows what the step waits for"
	if len(waits) == 0 {
		return fmt.Errorf("%q is not waited for, and nobody else is: %s", name, next)
	}
	return fmt.Errorf("%q is not waited for. Name one of these: %s; %s", name, strings.Join(waits, ", "), next)
}

// Abort goes back to the root that signed before.
func (o *Operator) Abort(ctx context.Context, by string) (rotation.Rollout, error) {
	return o.roller.Change(ctx, func(r rotation.Rollout) (rotation.Rollout, error) { return r.Abort(by, o.roots.c.Now()) })
}
