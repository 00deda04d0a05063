package main

import (
	"context"
	"crypto/x509"
	"log/slog"
	"time"

	"github.com/meshca/meshca/ca"
)

// polled is an upstream that is asked for its issuers every so often.
type polled interface {
	Known() ([]ca.UpstreamIssuer, <-chan struct{})
}

// hear takes up what the upstream did not tell at the start, when a poll has heard it: how its issuers agree with what was
// settled before, and the root of the one that the configuration names. Another upstream than that of the bundle's roots is
// refused, as a start would. It returns when that is done, or when ctx ends.
func (d *daemon) hear(ctx context.Context, u polled) {
	again := time.NewTicker(time.Minute)
	defer again.Stop()
	var told string
	for !d.heard {
		issuers, stale := u.Known()
		if len(issuers) > 0 {
			err := d.takeUp(ctx, issuers)
			d.heard = err == nil
			if d.heard {
				return
			}
			if text := errorText(err); text != told && ctx.Err() == nil {
				told = text
				d.log.Error("the upstream tells of its issuers, which it did not at the start, and they are not taken up", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-stale:
		case <-again.C:
		}
	}
}

// takeUp does what a start does with the issuers of an upstream that answers.
func (d *daemon) takeUp(ctx context.Context, issuers []ca.UpstreamIssuer) error {
	standing, _ := d.roller.Standing()
	if _, err := d.trustNamed(ctx, issuers); err != nil {
		return err
	}
	d.tellIssuers(issuers, standing.Rollout)
	return nil
}

// trustNamed takes the root of the issuer that the configuration names into the trust bundle, unless this is another upstream
// than that of the bundle's roots.
func (d *daemon) trustNamed(ctx context.Context, issuers []ca.UpstreamIssuer) (added []ca.UpstreamIssuer, err error) {
	var named []ca.UpstreamIssuer
	var roots, others []*x509.Certificate
	for _, i := range issuers {
		switch {
		case i.Root == nil:
		case i.Named:
			named, roots = append(named, i), append(roots, i.Root)
		default:
			others = append(others, i.Root)
		}
	}
	if err := d.trust.CheckUpstream(roots, others); err != nil {
		return nil, err
	}
	return d.operator.TrustFound(ctx, named)
}

// Those whose word it is that a root which appears at the upstream is trusted, as the audit log has it.
const (
	byName      = "upstream.vault.issuer"
	byAutoTrust = "upstream.vault.autoTrust"
)

// trustFound takes roots that appear at the upstream, or are mended there, into the trust bundle: of the issuer that the
// configuration names, and where it says so, of all.
func (d *daemon) trustFound(ctx context.Context) {
	u, ok := d.upstream.(polled)
	if !ok {
		return
	}
	d.hear(ctx, u)
	trust := d.trustNamed
	if v := d.config.Upstream.Vault; v != nil && v.AutoTrust {
		trust = d.operator.TrustFound
	}
	again := time.NewTicker(time.Minute) // for what failed, or was a party of a rollout
	defer again.Stop()
	var told string
	for ctx.Err() == nil {
		issuers, stale := u.Known()
		added, err := trust(ctx, issuers)
		for _, i := range added {
			d.tellFound(ctx, i)
		}
		if text := errorText(err); text != told && ctx.Err() == nil {
			if told = text; err != nil {
				d.log.Warn("a root that appeared at the upstream could not be trusted", "err", err)
			}
		}
		select {
		case <-ctx.Done():
		case <-stale:
		case <-again.C:
		}
	}
}

// tellFound tells the log and the audit log of a root that is trusted from now on.
func (d *daemon) tellFound(ctx context.Context, i ca.UpstreamIssuer) {
	by, log := byAutoTrust, d.log.With("root", ca.RootID(i.Root), "subject", i.Root.Subject.String(), "issuer", i.Ref, "name", i.Name)
	if i.Named {
		by = byName
		log.Warn(namedTrusted)
	} else {
		log.Warn("a root that appeared at the upstream is trusted from now on, and signs for nobody (upstream.vault.autoTrust)")
	}
	d.journal.Admin(ctx, "ca trust found root", by, slog.String("root", ca.RootID(i.Root)),
		slog.String("subject", i.Root.Subject.String()), slog.String("issuer", i.Ref), slog.String("outcome", "done"))
}

// namedTrusted is what is told of a named issuer whose root is trusted.
const namedTrusted = "the configuration names this issuer, and another one signs. Its root is trusted, and it signs for nobody before " +
	"`certctl ca rotate root --issuer` goes to it"
