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
		return err
	}
	if _, err := d.operator.TrustFound(ctx, named); err != nil {
		return err
	}
	d.tellIssuers(issuers, standing.Rollout)
	return nil
}

// trustFound takes roots that appear at the upstream into the trust bundle, where the configuration says so.
func (d *daemon) trustFound(ctx context.Context) {
	u, ok := d.upstream.(polled)
	if !ok {
		return
	}
	d.hear(ctx, u)
	if v := d.config.Upstream.Vault; v == nil || !v.AutoTrust || ctx.Err() != nil {
		return
	}
	again := time.NewTicker(time.Minute) // for what failed, or was a party of a rollout
	defer again.Stop()
	var told string
	for {
		issuers, stale := u.Known()
		added, err := d.operator.TrustFound(ctx, issuers)
		for _, i := range added {
			d.log.Warn("a root that appeared at the upstream is trusted from now on, and signs for nobody (upstream.vault.autoTrust)",
				"root", ca.RootID(i.Root), "subject", i.Root.Subject.String(), "issuer", i.Ref, "name", i.Name)
			d.journal.Admin(ctx, "ca trust found root", "upstream.vault.autoTrust", slog.String("root", ca.RootID(i.Root)),
				slog.String("subject", i.Root.Subject.String()), slog.String("issuer", i.Ref), slog.String("outcome", "done"))
		}
		if text := errorText(err); text != told && ctx.Err() == nil {
			if told = text; err != nil {
				d.log.Warn("a root that appeared at the upstream could not be trusted", "err", err)
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
