package main

import (
	"context"
	"fmt"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/api/admin"
	"github.com/meshca/meshca/api/inbound"
	"github.com/meshca/meshca/rotation"
)

// run listens and serves until ctx ends or a part fails.
func (d *daemon) run(ctx context.Context) error {
	api, err := net.Listen("tcp", d.config.Listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return d.runOn(ctx, api)
}

// runOn serves the gRPC API at a listener, and everything else where the configuration says.
func (d *daemon) runOn(ctx context.Context, api net.Listener) error {
	c := d.config
	defer api.Close()
	ops, err := net.Listen("tcp", c.OpsAddress)
	if err != nil {
		return fmt.Errorf("opsAddress: %w", err)
	}
	defer ops.Close()
	adminServer, err := d.adminServer()
	if err != nil {
		return err
	}
	socket, err := admin.Listen(ctx, c.AdminSocket)
	if err != nil {
		return fmt.Errorf("adminSocket: %w", err)
	}
	defer socket.Close()

	g, ctx := errgroup.WithContext(ctx)
	d.keepCredentials(ctx, g)
	d.keepParts(ctx, g)
	g.Go(func() error { return inbound.ServeOps(ctx, ops, opsHandler(d.registry, d.notReady, d.degraded)) })
	g.Go(func() error { return adminServer.Serve(ctx, socket) })
	g.Go(func() error { return d.door.Serve(ctx, api) })
	d.log.Info("meshca serves", "version", version, "trust_domain", c.trustDomain.Name(), "listen", api.Addr().String(),
		"ops", ops.Addr().String(), "admin", c.AdminSocket)
	err = g.Wait()
	if err != nil {
		d.log.Error("meshca stops for a fault", "err", err)
		return err
	}
	d.log.Info("meshca has stopped")
	return nil
}

// keepCredentials keeps the intermediates and the CA's own SVID. That needs an intermediate, so its loop begins when what
// signs has one for the first time: when one came, or when a root signs whose intermediate was there before.
func (d *daemon) keepCredentials(ctx context.Context, g *errgroup.Group) {
	came := make(chan struct{}, 1)
	g.Go(func() error {
		d.keepLines(ctx, func() {
			select {
			case came <- struct{}{}:
			default:
			}
		})
		return nil
	})
	g.Go(func() error {
		for d.authority.NotAfter().IsZero() { // whether its key answers now is the serving SVID's to try
			select {
			case <-came:
			case <-d.servingWake:
			case <-ctx.Done():
				return nil
			}
		}
		_ = rotation.Keep(ctx, d.serving, rotation.KeepOptions{
			Wake: d.servingWake, Observe: d.observe("server", d.serving, func() {}), Retry: rotation.Retry{Max: 30 * time.Second},
		})
		return nil
	})
}

// keepParts runs what looks after the rest, each until ctx ends.
func (d *daemon) keepParts(ctx context.Context, g *errgroup.Group) {
	keep := func(run func(context.Context)) { g.Go(func() error { run(ctx); return nil }) }
	keep(d.roller.Run)
	keep(d.operator.Run)
	if u, ok := d.upstream.(interface{ Run(context.Context) error }); ok {
		g.Go(func() error { return ignoreEnd(ctx, u.Run(ctx), "upstream") })
	}
	keep(d.trustFound)
	for name, cluster := range d.clusters {
		g.Go(func() error { return ignoreEnd(ctx, cluster.Run(ctx), name) })
	}
	for _, signer := range d.signers {
		keep(signer.Run)
	}
	for _, publisher := range d.publishers {
		keep(publisher.Run)
	}
	keep(func(ctx context.Context) { d.policy.watch(ctx, d.policyText) })
	keep(d.review)
	keep(func(ctx context.Context) { d.registration.WatchCauses(ctx, d.store.ScanLiving, d.log) })
	keep(func(ctx context.Context) {
		d.agents.Run(ctx, func(err error) { d.log.Error("agents' news could not be stored", "err", err) })
	})
	keep(d.prune)
	keep(d.followReadiness)
	keep(d.mend)
	keep(d.tokens.Run)
	if d.bundleFile != nil {
		keep(d.bundleFile.keep)
	}
	if d.audit != nil {
		keep(func(ctx context.Context) { d.audit.reopenOnHangup(ctx, d.log) })
	}
}

// observe logs and counts what Keep does with one of the CA's own credentials.
func (d *daemon) observe(name string, s rotation.Subject, renewed func()) func(rotation.Attempt) {
	return func(a rotation.Attempt) {
		d.metrics.renewed(name, a.Err)
		d.attempts.Store(s, a)
		if a.Err != nil {
			d.log.Warn("a credential of the CA was not renewed", "credential", name, "cause", string(a.Cause), "failures", a.Failures,
				"next", a.Next.UTC(), "err", a.Err)
			return
		}
		renewed()
		d.log.Info("a credential of the CA was renewed", "credential", name, "cause", string(a.Cause), "ends", a.Term.End().UTC(), "next", a.Next.UTC())
	}
}

func ignoreEnd(ctx context.Context, err error, what string) error {
	if err == nil || ctx.Err() != nil {
		return nil //nolint:nilerr // what fails because it was told to end did not fail
	}
	return fmt.Errorf("%s: %w", what, err)
}
