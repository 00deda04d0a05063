package main

import (
	"context"
	"crypto/x509"
	"io"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/pkcs11"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/ca/upstream/vault"
	"github.com/meshca/meshca/rotation"
)

// withholding is an upstream that does not answer for one of its issuers.
type withholding struct {
	ca.Upstream
	ref string
}

func (u withholding) SignIntermediate(ctx context.Context, ref string, r ca.IntermediateRequest) ([]*x509.Certificate, error) {
	if ref == u.ref {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return u.Upstream.SignIntermediate(ctx, ref, r)
}

// A CA starts as a root was confirmed, and that one's intermediate comes before that of the root that signs still, which then
// signs no more: the CA has its own SVID all the same, under the one that signs.
func TestTheRootThatComesToSignIsReadyFirst(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		c := configIn(t, dir, clusterIn(t, dir, "a", false))
		d := opened(t, c)
		if _, err := d.operator.Rotate(t.Context(), rollout.RotateOptions{By: "test"}); err != nil {
			t.Fatal(err)
		}
		for d.roller.Move(t.Context()) {
		}
		r := d.operator.Standing().Rollout
		if r.Step != rotation.StepConfirmed {
			t.Fatalf("it goes to %s, and no intermediate is there", r.Step)
		}
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
		d, err := openOn(t.Context(), c, slog.New(slog.DiscardHandler), io.Discard, func(c *Config, tokens *pkcs11.Modules, log *slog.Logger, observe func(vault.Call)) (ca.Upstream, error) {
			up, err := openUpstream(c, tokens, log, observe)
			return withholding{up, r.Old.Ref}, err
		})
		if err != nil {
			t.Fatal(err)
		}
		endWith(t, d)
		ctx, stop := context.WithCancel(t.Context())
		g, ctx := errgroup.WithContext(ctx)
		d.keepCredentials(ctx, g)
		g.Go(func() error { d.roller.Run(ctx); return nil })
		time.Sleep(time.Hour)
		if now := d.authority.Assignment().Root.ID; now != r.New.ID {
			t.Errorf("%s signs", now)
		}
		if err := d.serving.Ready(); err != nil {
			t.Errorf("an hour later: %v", err)
		}
		stop()
		_ = g.Wait()
	})
}
