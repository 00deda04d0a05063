package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// openRoots puts together who signs: the trust bundle, the authority below the root that the journal of roots says, and
// the one who moves that journal. A CA that has signed before starts also while its upstream is away.
func (d *daemon) openRoots(ctx context.Context) error {
	c := d.config
	journal, version, err := d.store.Rollout(ctx)
	if err != nil {
		return err
	}
	if u, ok := d.upstream.(rollout.Includer); ok {
		u.Include(journal.Old.Ref, journal.New.Ref)
	}
	if u, ok := d.upstream.(interface{ Rely(signing func() []string) }); ok {
		u.Rely(func() []string { return d.signing(journal) })
	}
	issuers, err := d.askIssuers(ctx, journal.Step == "")
	if err != nil && journal.Step == "" {
		return fmt.Errorf("the first start needs the upstream: %w", err)
	}
	if d.heard = err == nil; !d.heard {
		d.log.Warn("the upstream is away, or slow; the CA goes on with the root that it knows, and with what a later poll tells", "err", err)
	}
	for _, i := range issuers {
		if journal.Step == "" && i.Named && i.Fault != nil {
			return fmt.Errorf("the first start needs the issuer that the configuration names: %s: %w", i.Name, i.Fault)
		}
	}
	if err == nil && journal.Step != "" {
		d.tellIssuers(issuers, journal)
	}
	if err := d.openTrust(ctx, issuers, journal); err != nil {
		return err
	}
	authority := ca.AuthorityConfig{
		TrustDomain: c.trustDomain, Upstream: d.upstream, Trust: d.trust, Life: c.Intermediate.TTL.Duration, LeafTTL: c.SVID.TTL.Duration, Log: d.log,
		Barred: func(above []*x509.Certificate) error {
			s, _ := d.roller.Standing()
			return rollout.Barred(s.Rollout, above)
		},
	}
	if d.keys != nil {
		authority.Keys = d.keys
	}
	if d.authority, err = ca.NewAuthority(authority); err != nil {
		return err
	}
	if journal.Step == "" {
		if journal, err = d.found(ctx, issuers, version); err != nil {
			return err
		}
	}
	return d.assign(rollout.Assignment(journal, ca.Root{}))
}

// signing are the upstream's references of those that sign, or are about to: by the lines that there are, and before there
// are any by the journal that the start has read.
func (d *daemon) signing(journal rotation.Rollout) (refs []string) {
	var lines []*ca.Line
	if d.authority != nil {
		lines, _ = d.authority.Lines()
	}
	if len(lines) == 0 {
		a := rollout.Assignment(journal, ca.Root{})
		return []string{a.Root.Ref, a.Successor.Ref}
	}
	for _, l := range lines {
		refs = append(refs, l.Root().Ref)
	}
	return refs
}

// A start asks the upstream before anything listens, so there is a bound to all of it: the chart's startup probe has a CA
// killed that does not answer within two minutes. What was not told by then a poll tells. A first start cannot do without,
// and is to say what it lacks.
const (
	startPatience = 20 * time.Second
	firstPatience = 90 * time.Second
)

func (d *daemon) askIssuers(ctx context.Context, first bool) ([]ca.UpstreamIssuer, error) {
	patience := startPatience
	if first {
		patience = firstPatience
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	issuers, err := d.upstream.Issuers(ctx)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("it did not tell of its issuers within %s: %w", patience, err)
	}
	return issuers, err
}

// withoutUpstream tells, of an upstream that cannot be opened, what leads out: where the CA has signed before, and where it
// never has.
func (d *daemon) withoutUpstream(ctx context.Context, failed error) error {
	journal, _, err := d.store.Rollout(ctx)
	if err != nil || d.config.Upstream.Disk == nil {
		return errors.Join(failed, err)
	}
	if journal.Step == "" {
		return noRootYet(d.config, failed)
	}
	return fmt.Errorf("%w. The root that signs has the SHA-256 %s: put its files back, with mode 0600 for the key. If they are lost, put "+
		"another root's into %s, as NAME.crt and NAME.key: the CA starts with it, and `certctl ca rotate root --issuer` goes to it",
		failed, journal.Signer().ID, d.config.successors())
}

func (d *daemon) openTrust(ctx context.Context, issuers []ca.UpstreamIssuer, journal rotation.Rollout) error {
	trust := ca.TrustConfig{TrustDomain: d.config.trustDomain, Store: d.store}
	if disk := d.config.Upstream.Disk; disk != nil {
		anchors, err := readAnchors(disk.ExtraAnchors, d.log)
		if err != nil {
			return err
		}
		// A CA must not stay down over one that was tainted, and must not trust it again.
		trust.Anchors = slices.DeleteFunc(anchors, func(c *x509.Certificate) bool {
			err := rollout.Tainted(journal, c)
			if err != nil {
				d.log.Warn("an extra trust anchor was tainted and is left out: take it off upstream.disk.extraAnchors", "err", err)
			}
			return err != nil
		})
	}
	for _, i := range issuers {
		switch {
		case i.Root == nil:
		case i.Named:
			trust.Roots = append(trust.Roots, i.Root)
			if journal.Step != "" && comes(i, journal) {
				trust.Anchors = append(trust.Anchors, i.Root)
			}
		default:
			trust.Others = append(trust.Others, i.Root)
		}
	}
	d.named = trust.Anchors
	var err error
	d.trust, err = ca.NewTrust(ctx, trust)
	return err
}

// comes reports whether the root of an issuer that the configuration names is to be trusted, whoever signs: unless it
// cannot sign, or was tainted, removed or replaced. What an operator took out does not come back by a restart.
func comes(i ca.UpstreamIssuer, journal rotation.Rollout) bool {
	return i.Fault == nil && time.Now().Before(i.Root.NotAfter) && !journal.Leaves(ca.RootID(i.Root)) && rollout.Tainted(journal, i.Root) == nil
}

// tellIssuers says in the log how the issuers that the upstream has agree with what was settled before. Who signs is the
// journal's to say, so none of this keeps the CA from starting.
func (d *daemon) tellIssuers(issuers []ca.UpstreamIssuer, journal rotation.Rollout) {
	signer := journal.Signer()
	there := false
	for _, i := range issuers {
		id := ""
		if i.Root != nil {
			id = ca.RootID(i.Root)
		}
		log := d.log.With("issuer", i.Ref, "name", i.Name, "root", id)
		there = there || i.Ref == signer.Ref
		switch {
		case i.Ref == signer.Ref && i.Fault != nil:
			log.Warn("the root that signs cannot be used at the upstream: no further intermediate comes from it. Mend it, or go to another one with `certctl ca rotate root`", "err", i.Fault)
		case i.Ref == signer.Ref:
		case i.Named && i.Fault != nil:
			log.Warn("the issuer that the configuration names cannot be used; another one signs, so the CA goes on", "signs", signer.Ref, "err", i.Fault)
		case i.Named && comes(i, journal) && !journal.Active() && id != signer.ID:
			log.Warn(namedTrusted, "signs", signer.Ref)
		case i.Named:
			log.Info("the configuration names an issuer that is not the one that signs", "signs", signer.Ref)
		case i.Fault != nil:
			log.Info("an issuer of the upstream cannot be used", "err", i.Fault)
		}
	}
	if !there {
		d.log.Warn("the upstream does not have the issuer that signs any more: no further intermediate comes from it. Bring it back, or go to another "+
			"one with `certctl ca rotate root --issuer`; `certctl ca status` lists them", "signs", signer.Ref, "root", signer.ID)
	}
}

// found enters the root that signs first into the journal, as the end of a rollout that nobody had to see: whatever the
// configuration names later, who signs is the journal's to say.
func (d *daemon) found(ctx context.Context, issuers []ca.UpstreamIssuer, version uint64) (rotation.Rollout, error) {
	start, err := d.startingRoot(issuers)
	if err != nil {
		return rotation.Rollout{}, err
	}
	now := time.Now()
	first := rotation.Rollout{
		New: start, Step: rotation.StepOut, NewShare: 100, Entered: now, Begun: now, By: "the first start",
	}
	// gofail: var firstRootChosen struct{}
	err = d.store.SwapRollout(ctx, version, first)
	// gofail: var firstRootEntered struct{}
	return first, err
}

// startingRoot is the root that signs before any other was ever rolled out: the first of the upstream's that is trusted.
func (d *daemon) startingRoot(issuers []ca.UpstreamIssuer) (rotation.Party, error) {
	bundle, _ := d.trust.Bundle()
	var faults []error
	for _, i := range issuers {
		switch {
		case i.Fault != nil:
			faults = append(faults, fmt.Errorf("issuer %s: %w", i.Name, i.Fault))
		case bundle.HasX509Authority(i.Root):
			return rotation.Party{ID: ca.RootID(i.Root), Ref: i.Ref, Key: ca.KeyOf(i.Root)}, nil
		}
	}
	return rotation.Party{}, fmt.Errorf("the upstream has no issuer that can be used below a root of the trust bundle: %w", errors.Join(faults...))
}

// openRoller makes the one who moves the journal of roots; what it asks of the rest of the CA must be there.
func (d *daemon) openRoller(ctx context.Context) error {
	unrecorded, err := d.unrecorded(ctx)
	if err != nil {
		return err
	}
	roots, err := rollout.New(rollout.Config{
		Authority: d.authority, Trust: d.trust, Upstream: d.upstream, Ledger: d.store, Agents: d.agents, Renewals: d.orders,
		Serving: d.wakeServing, Readers: d.openBundleFile(), Published: d.published, Unrecorded: unrecorded, Now: d.clock.Now,
	})
	if err != nil {
		return err
	}
	authorities := held{Authorities: roots, continuity: d.continuity, tainted: func(p rotation.Party) bool {
		s, _ := d.roller.Standing()
		_, byID := s.Rollout.Tainted(p.ID)
		_, byKey := s.Rollout.TaintedKey(p.Key)
		return byID || byKey
	}}
	d.roller = rotation.NewRoller(rotation.RollerOptions{
		Journal: d.store, Authorities: authorities, Observe: d.rolled, Now: d.clock.Now, Running: d.clock.Running, Lives: rollout.Lives,
	})
	d.operator = rollout.NewOperator(roots, d.roller)
	if err := d.operator.Settle(ctx, d.named...); err != nil {
		return err
	}
	if _, err := d.roller.Resume(ctx); err != nil { // so that orders find the rollout that is under way, from the first one on
		return err
	}
	return nil
}

// rolled tells the log and the audit log of each step.
func (d *daemon) rolled(r rotation.Rollout) {
	d.log.Info("the rollout of a root has a new step", "step", string(r.Step), "old", r.Old.ID, "new", r.New.ID, "aborted", r.Aborted)
	d.journal.Rolled(r)
}

func (d *daemon) wakeServing() {
	select {
	case d.servingWake <- struct{}{}:
	default:
	}
}

// keepLines keeps each line of the authority for as long as it is one, until ctx ends. came is called when one of them has
// another intermediate.
func (d *daemon) keepLines(ctx context.Context, came func()) {
	kept, barred := map[*ca.Line]context.CancelFunc{}, map[*ca.Line]bool{}
	var running sync.WaitGroup
	defer running.Wait()
	for {
		lines, stale := d.authority.Lines()
		now := map[*ca.Line]bool{}
		for _, l := range lines {
			now[l] = true
			if kept[l] != nil || barred[l] {
				continue
			}
			if err := d.barred(l.Root().ID); err != nil { // for good: an emergency must not have it sign again
				barred[l] = true
				l.Bar(err)
				d.log.Error("a root that the journal has sign must not: it stays without an intermediate", "err", err)
				continue
			}
			lineCtx, cancel := context.WithCancel(ctx)
			kept[l] = cancel
			running.Go(func() {
				observe := d.observe("intermediate", l, func() {
					d.roller.Wake()
					came()
				})
				_ = rotation.Keep(lineCtx, l, rotation.KeepOptions{
					Observe: func(a rotation.Attempt) { d.health.answered("sign below "+l.Root().ID, a.Err); observe(a) },
					Wake:    l.Wake(),
					Retry:   rotation.Retry{Max: 30 * time.Second},
				})
				d.attempts.Delete(l)
			})
		}
		for l, cancel := range kept {
			if !now[l] {
				cancel()
				delete(kept, l)
				d.health.forget("sign below " + l.Root().ID)
			}
		}
		select {
		case <-stale:
		case <-ctx.Done():
			for _, cancel := range kept {
				cancel()
			}
			return
		}
	}
}

// signs says, for people, what a root signs for now.
func signs(a ca.Assignment, root ca.Root) string {
	switch {
	case a.Share == 0 && a.Root == root:
		return "signing"
	case a.Root == root:
		return fmt.Sprintf("signing %d %%", 100-a.Share)
	case a.Share > 0 && a.Successor == root:
		return fmt.Sprintf("signing %d %%", a.Share)
	}
	return "prepared"
}
