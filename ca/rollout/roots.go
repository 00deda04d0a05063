// Package rollout replaces the CA's roots: it is what a rotation.Roller moves. A root comes into the trust bundle, is
// confirmed by those who count, signs, and its predecessor leaves the bundle when the last certificate under it has ended.
package rollout

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// Agents knows who has which trust bundle. Unconfirmed returns the SPIFFE IDs of agents that count (an SVID that was
// issued to them or through them lives at this moment; all agents, for the zero time) and have not acknowledged a bundle
// of this sequence or a later one.
type Agents interface {
	Unconfirmed(set uint64, at time.Time) []string
}

// Ledger is what has been signed: what of it ends after a moment, newest first, whatever the clock was as it was signed.
type Ledger interface {
	ScanLiving(ctx context.Context, at time.Time, fn func(ca.LedgerEntry) (bool, error)) error
}

// Renewals orders the renewal of all that has been issued, spread over a while, unless the order with this very mark stands.
// Without a mark it orders always.
type Renewals interface {
	RenewAll(ctx context.Context, mark string, spread time.Duration) error
}

// Config is what Roots are made of; every field but Readers, Published, Unrecorded and Now is needed.
type Config struct {
	Authority *ca.Authority
	Trust     *ca.Trust
	Upstream  ca.Upstream
	Ledger    Ledger
	Agents    Agents
	Renewals  Renewals
	// Serving renews the CA's own certificate when another root signs.
	Serving func()
	Readers []Reader
	// Unrecorded is until when certificates may live that the ledger does not know, and the agents' records neither, as
	// after the store was put back from a backup. They may be under any root, and through any agent.
	Unrecorded time.Time
	// Published are the places that the CA writes the trust bundle to, and since when each holds a bundle of this sequence
	// or a later one. Their readers are given their refresh times from then on; one that cannot be written is waited for.
	Published func(set uint64) []Publication
	// Now says what has ended, and how long something has been waited for; time.Now by default. It must not jump forward:
	// see rotation.Clock.
	Now func() time.Time
}

// Roots moves the CA's roots. It is safe for concurrent use.
type Roots struct {
	c Config
}

var _ rotation.Authorities = (*Roots)(nil)

// New checks the configuration and returns Roots.
func New(c Config) (*Roots, error) {
	if c.Authority == nil || c.Trust == nil || c.Upstream == nil || c.Ledger == nil || c.Agents == nil || c.Renewals == nil || c.Serving == nil {
		return nil, errors.New("rollout: incomplete configuration")
	}
	if c.Published == nil {
		c.Published = func(uint64) []Publication { return nil }
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Roots{c: c}, nil
}

// Assignment is who signs as a Rollout stands. Before the first one it is the root that start names.
func Assignment(r rotation.Rollout, start ca.Root) ca.Assignment {
	root := func(p rotation.Party) ca.Root { return ca.Root{ID: p.ID, Ref: p.Ref} }
	switch {
	case r.Step == "":
		return ca.Assignment{Root: start}
	case r.NewShare == 0:
		return ca.Assignment{Root: root(r.Old)}
	case r.NewShare == 100:
		return ca.Assignment{Root: root(r.New)}
	default:
		return ca.Assignment{Root: root(r.Old), Successor: root(r.New), Share: r.NewShare}
	}
}

// Publish takes a root into the trust bundle.
func (x *Roots) Publish(ctx context.Context, p rotation.Party) (uint64, error) {
	root, err := x.find(ctx, p)
	if err != nil {
		return 0, err
	}
	if err := x.c.Trust.AddRoots(ctx, root); err != nil {
		return 0, err
	}
	// gofail: var rolloutPublished struct{}
	bundle, _ := x.c.Trust.Bundle()
	set, _ := bundle.SequenceNumber()
	return set, nil
}

// issuers asks the upstream for its issuers, those that are named among them.
func (x *Roots) issuers(ctx context.Context, named ...string) ([]ca.UpstreamIssuer, error) {
	if u, ok := x.c.Upstream.(Includer); ok {
		u.Include(named...)
	}
	return x.c.Upstream.Issuers(ctx)
}

// find asks the upstream for the root; it must be the very one that was chosen.
func (x *Roots) find(ctx context.Context, p rotation.Party) (*x509.Certificate, error) {
	issuers, err := x.issuers(ctx, p.Ref)
	if err != nil {
		return nil, err
	}
	for _, i := range issuers {
		if i.Ref != p.Ref {
			continue
		}
		switch {
		case i.Fault != nil:
			return nil, fmt.Errorf("the upstream's issuer %s (%s) cannot be used: %w", i.Name, i.Ref, i.Fault)
		case i.Root == nil || ca.RootID(i.Root) != p.ID:
			return nil, fmt.Errorf("the upstream's issuer %s (%s) leads to another root than %.16s…, which was chosen", i.Name, i.Ref, p.ID)
		}
		if err := x.c.Authority.Barred(append(slices.Clip(i.Path), i.Root)); err != nil {
			return nil, fmt.Errorf("the upstream's issuer %s (%s): %w", i.Name, i.Ref, err)
		}
		return i.Root, nil
	}
	return nil, fmt.Errorf("the upstream has no issuer %s any more: bring it back, or `certctl ca abort`. Where the same root was imported again, "+
		"`certctl ca rotate root --issuer` with the reference that it got then goes on with it", p.Ref)
}

// Unconfirmed names agents by their SPIFFE IDs, and readers whose refresh time has not passed: since the root was published
// or, where the CA brings it to them, since that was done. What a restored store says of agents may be too little: then
// all that it knows count, and those that it cannot know have their time, too.
func (x *Roots) Unconfirmed(_ context.Context, set uint64, since time.Time) ([]string, error) {
	now := x.c.Now()
	counting := now
	if now.Before(x.c.Unrecorded) {
		counting = time.Time{}
	}
	names := x.c.Agents.Unconfirmed(set, counting)
	for _, r := range x.readers(set, since) {
		if r.Until.IsZero() || now.Before(r.Until) {
			names = append(names, "reader "+r.Name)
		}
	}
	return names, nil
}

// Prepare has a line of the root ready to sign.
func (x *Roots) Prepare(_ context.Context, p rotation.Party) error {
	return x.c.Authority.Prepare(ca.Root{ID: p.ID, Ref: p.Ref}).Ready()
}

// renewalShare is the part of an emergency's bound in which renewals are spread: what is left of its half is for those
// that fail at first.
func renewalShare(within time.Duration) time.Duration { return within * 3 / 8 }

// mark names a step that a rollout entered: what is ordered in it is ordered once, and nobody else's order passes for it. It
// is compared with nothing but itself, for who orders by the wall clock and who enters steps differ where that was set.
func mark(r rotation.Rollout) string {
	return "rollout of " + r.Begun.UTC().Format(time.RFC3339Nano) + ", " + string(r.Step) + " at " + r.Entered.UTC().Format(time.RFC3339Nano)
}

// Assign has the roots sign for their shares.
func (x *Roots) Assign(ctx context.Context, r rotation.Rollout) (time.Time, error) {
	next := Assignment(r, ca.Root{})
	changed := x.c.Authority.Assignment() != next
	// gofail: var rolloutBeforeAssign struct{}
	x.c.Authority.Assign(next)
	// gofail: var rolloutAssigned struct{}
	if changed {
		x.c.Serving()
	}
	if r.Step != rotation.StepSigning {
		return time.Time{}, nil
	}
	end, err := x.lastEnd(ctx, r.Goes().ID)
	if err != nil || end.IsZero() || r.Within == 0 {
		return end, err
	}
	if err := x.c.Renewals.RenewAll(ctx, mark(r), renewalShare(r.Within)); err != nil {
		return time.Time{}, err
	}
	// gofail: var rolloutRenewing struct{}
	return end, nil
}

// Lives is how long after a root has stopped to sign something below it may be in use.
const Lives = ca.InUse

// slack is how long what has ended still counts: by another's clock it may live, and be renewed.
const slack = time.Hour

// lastEnd is the end of the last certificate under a root, zero if there is none. Nothing is signed under it any more.
func (x *Roots) lastEnd(ctx context.Context, id string) (time.Time, error) {
	sum, err := hex.DecodeString(id)
	if err != nil {
		return time.Time{}, fmt.Errorf("rollout: %q names no root", id)
	}
	now, end := x.c.Now(), time.Time{}
	if now.Before(x.c.Unrecorded) {
		end = x.c.Unrecorded
	}
	err = x.c.Ledger.ScanLiving(ctx, now.Add(-slack), func(e ca.LedgerEntry) (bool, error) {
		if string(e.Root) == string(sum) && e.NotAfter.After(end) {
			end = e.NotAfter
		}
		return true, nil
	})
	return end, err
}

// Withdraw takes a root out of the trust bundle.
func (x *Roots) Withdraw(ctx context.Context, p rotation.Party) error {
	// gofail: var rolloutBeforeWithdraw struct{}
	return x.c.Trust.RemoveRoot(ctx, p.ID)
}
