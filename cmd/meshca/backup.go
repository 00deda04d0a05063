package main

import (
	"context"
	"encoding/hex"
	"path/filepath"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshca/meshca/api/admin"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/rotation"
)

func (c *Config) storePath() string { return filepath.Join(c.StateDir, "meshca.db") }

// backup is the store's snapshot as the admin socket sends it.
func (d *daemon) backup(ctx context.Context) (admin.Snapshot, error) {
	s, err := d.store.Backup(ctx)
	if err != nil {
		return admin.Snapshot{}, err
	}
	return admin.Snapshot{ReadCloser: s, Summary: &meshcav1.BackupSummary{
		Bytes: uint64(s.Bytes), Sha256: hex.EncodeToString(s.SHA256[:]), MadeAt: timestamppb.New(s.Made), TrustDomain: s.TrustDomain, Schema: s.Schema,
		State: s.Generation, BundleSequence: s.BundleSequence, RolloutStep: s.Rollout, Denials: uint32(s.Denials),
		LedgerEntries: s.LedgerEntries, LedgerLast: s.LedgerLast, LastIssuedAt: timestamp(s.LastIssued),
	}}, nil
}

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// held keeps rollouts where they are while the store is known to be an old one: its journal may say to go on with a root
// that has been given up since.
type held struct {
	rotation.Authorities
	continuity *registration.Continuity
	// tainted reports whether an authority is tainted: that holds in an old store as in any, and for good.
	tainted func(rotation.Party) bool
}

// accepting is what an operator goes on by from an old store.
type accepting struct {
	*registration.Continuity
	roller *rotation.Roller
}

// Accept has what is tainted leave the trust bundle first: agents have seen it go, or the operator tainted it again, and they
// must not be told of it.
func (a accepting) Accept(ctx context.Context, above uint64) (uint64, error) {
	for ctx.Err() == nil && a.roller.Move(ctx) {
	}
	return a.Continuity.Accept(ctx, above)
}

// unrecorded is until when certificates may live that were issued between a backup and its being put back, and so are not
// in the ledger; zero: the store never was.
func (d *daemon) unrecorded(ctx context.Context) (time.Time, error) {
	history, err := d.store.History(ctx)
	if err != nil || history.RestoredAt.IsZero() {
		return time.Time{}, err
	}
	return history.RestoredAt.Add(ca.MaxTTL), nil
}

// Publish does as the roots do, unless the journal is an old one.
func (h held) Publish(ctx context.Context, p rotation.Party) (uint64, error) {
	if err := h.continuity.Ready(); err != nil {
		return 0, err
	}
	return h.Authorities.Publish(ctx, p)
}

// Unconfirmed does as the roots do, unless the journal is an old one.
func (h held) Unconfirmed(ctx context.Context, set uint64, since time.Time) ([]string, error) {
	if err := h.continuity.Ready(); err != nil {
		return nil, err
	}
	return h.Authorities.Unconfirmed(ctx, set, since)
}

// Prepare does as the roots do, unless the journal is an old one.
func (h held) Prepare(ctx context.Context, p rotation.Party) error {
	if err := h.continuity.Ready(); err != nil {
		return err
	}
	return h.Authorities.Prepare(ctx, p)
}

// Assign does as the roots do, unless the journal is an old one. At a rollout's beginning and at its end it only takes away: an
// order to do without a root has it sign no more, and what is tainted can leave, also when it has retired.
func (h held) Assign(ctx context.Context, r rotation.Rollout) (time.Time, error) {
	takesAway := r.Step == rotation.StepChosen || r.Step == rotation.StepLeaving || r.Step == rotation.StepRetired && h.tainted(r.Goes())
	if err := h.continuity.Ready(); err != nil && !takesAway {
		return time.Time{}, err
	}
	return h.Authorities.Assign(ctx, r)
}

// Withdraw does as the roots do, unless the journal is an old one, and p not tainted.
func (h held) Withdraw(ctx context.Context, p rotation.Party) error {
	if err := h.continuity.Ready(); err != nil && !h.tainted(p) {
		return err
	}
	return h.Authorities.Withdraw(ctx, p)
}
