package main

import (
	"context"
	"io"
	"log/slog"
	"slices"
	"testing"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/pkcs11"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/ca/upstream/vault"
)

// relied is an upstream that is told who signs, and notes whom that was as it was asked first.
type relied struct {
	ca.Upstream
	signing func() []string
	first   []string
}

func (u *relied) Rely(signing func() []string) { u.signing = signing }

func (u *relied) Issuers(ctx context.Context) ([]ca.UpstreamIssuer, error) {
	if u.first == nil {
		u.first = u.signing()
	}
	return u.Upstream.Issuers(ctx)
}

func (u *relied) NewIssuer(ctx context.Context) (ca.UpstreamIssuer, error) {
	return u.Upstream.(rollout.Maker).NewIssuer(ctx)
}

// The upstream is told who signs by the journal, from the first question of a start on.
func TestTheUpstreamIsToldWhoSigns(t *testing.T) {
	c := configIn(t, t.TempDir(), clusterIn(t, t.TempDir(), "a", false))
	opens := func() (*daemon, *relied) {
		t.Helper()
		u := &relied{}
		d, err := openOn(t.Context(), c, slog.New(slog.DiscardHandler), io.Discard, func(c *Config, tokens *pkcs11.Modules, log *slog.Logger, observe func(vault.Call)) (ca.Upstream, error) {
			var err error
			u.Upstream, err = openUpstream(c, tokens, log, observe)
			return u, err
		})
		if err != nil {
			t.Fatal(err)
		}
		endWith(t, d)
		return d, u
	}
	d, u := opens()
	if now := u.signing(); !slices.Equal(now, []string{d.authority.Assignment().Root.Ref}) {
		t.Errorf("told is %q, and %+v", now, d.authority.Assignment())
	}
	rotates(t, d, rollout.RotateOptions{By: "test"})
	next := d.authority.Assignment().Root.Ref
	if !slices.Contains(u.signing(), next) {
		t.Errorf("after a rotation told is %q, and %s signs", u.signing(), next)
	}
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	d, u = opens()
	if !slices.Contains(u.first, next) || !slices.Equal(u.signing(), []string{next}) || d.authority.Assignment().Root.Ref != next {
		t.Errorf("a start tells %q and then %q, and %s signs", u.first, u.signing(), next)
	}
}
