package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/rotation"
)

// restoreFlags are those of `meshca restore`.
type restoreFlags struct {
	config                          string
	replace, acceptRollback, dryRun bool
}

func restoreCommand() *cobra.Command {
	var f restoreFlags
	c := &cobra.Command{
		Use:   "restore --config FILE BACKUP",
		Short: "Put a backup of `certctl backup` in the place of the store, while the CA is stopped",
		Long: "Checks the backup (its digest, its schema, its trust domain, its store page by page) and puts it in place, mode 0600.\n" +
			"A store that stands is never overwritten: with --replace it is kept beside it, under another name. A backup that knows\n" +
			"less than the store that stands is refused, with what would be lost.\n\n" +
			"The keys of a root on disk are in no backup: keep upstream.disk's files, and the directory roots beside the store,\n" +
			"apart. Where the disk was lost, agents that have seen more than the backup knows tell the CA so when they connect;\n" +
			"it then issues nothing before `certctl ca accept-rollback`. docs/operations.md tells the whole.",
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			config, err := loadConfig(f.config)
			if err != nil {
				return err
			}
			return restore(c.Context(), c.OutOrStdout(), config, f, args[0])
		},
	}
	configFlag(c, &f.config)
	c.Flags().BoolVar(&f.replace, "replace", false, "a store stands: keep it aside, and put the backup in its place")
	c.Flags().BoolVar(&f.acceptRollback, "accept-rollback", false,
		"the store that stands has decided more than the backup knows: lose that, but deny what it denies, taint what it has tainted, trust for some hours what it trusts, and go on beyond its sequences")
	c.Flags().BoolVar(&f.dryRun, "dry-run", false, "check everything, change nothing")
	return c
}

func restore(ctx context.Context, out io.Writer, c *Config, f restoreFlags, file string) error {
	backup, err := os.Open(file)
	if err != nil {
		return err
	}
	defer backup.Close()
	if info, err := backup.Stat(); err != nil || !info.Mode().IsRegular() {
		return errors.Join(fmt.Errorf("%s is no regular file", file), err)
	}
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return fmt.Errorf("stateDir: %w", err)
	}
	r, err := bolt.Restore(ctx, bolt.RestoreOptions{
		Backup: backup, Path: c.storePath(), TrustDomain: c.trustDomain.Name(), Replace: f.replace, AcceptRollback: f.acceptRollback, DryRun: f.dryRun,
	})
	if err != nil && !errors.Is(err, bolt.ErrInPlace) {
		return restoreRefused(file, f, err)
	}
	tellRestored(out, c, f, file, r)
	if err != nil { // behind that
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

// restoreRefused says what to do about it.
func restoreRefused(file string, f restoreFlags, err error) error {
	again := fmt.Sprintf("meshca restore --config %s --replace", f.config)
	var behind *bolt.Behind
	switch {
	case errors.Is(err, bolt.ErrExists):
		return fmt.Errorf("%w. Nothing was changed. If the backup is to take its place: `%s %s`, which keeps it beside it, under another name", err, again, file)
	case errors.As(err, &behind):
		return fmt.Errorf("%s, made at %s, knows less than the store that stands: %w. Nothing was changed. Start the CA on what stands, or restore a newer "+
			"backup. If it must be this one: `%s --accept-rollback %s` denies what is denied now, keeps what is tainted from signing, trusts for some hours what is trusted now, has the bundle's sequence go on beyond the one that agents hold, "+
			"and loses the rest: write down `certctl ca status` and `certctl bundle export` before, if the CA still starts",
			file, behind.Made.Format(time.RFC3339), err, again, file)
	case errors.Is(err, bolt.ErrUnreadable):
		return fmt.Errorf("%w, so nobody can say what it has decided that %s does not know. Nothing was changed. To go on: `%s --accept-rollback %s`; agents "+
			"that have seen more tell the CA so when they connect", err, file, again, file)
	}
	return fmt.Errorf("%s: %w. Nothing was changed", file, err)
}

// rootsOf are the roots of a restored bundle of which this is true.
func rootsOf(s bolt.State, is func(rotation.Party) bool) []*x509.Certificate {
	roots, err := s.Bundle.Roots()
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(roots, func(c *x509.Certificate) bool { return !is(rotation.Party{ID: ca.RootID(c), Key: ca.KeyOf(c)}) })
}

// tellTrusted says what becomes of roots of which the backup and the store that stood say different things.
func tellTrusted(line func(string, ...any), s bolt.State) {
	for _, c := range rootsOf(s, func(p rotation.Party) bool { return s.Rollout.Returned(p) != nil }) {
		line("The trust bundle of this backup has the root %q (SHA-256 %s), which was tainted since and had left it:", c.Subject, ca.RootID(c))
		line("the CA tells nobody of the bundle before that root is out again.")
	}
	for _, b := range s.Rollout.Behind {
		for _, c := range rootsOf(s, func(p rotation.Party) bool { return b.Kept && p.ID == b.ID }) {
			line("The root %q (SHA-256 %s) came after this backup. It signs for nobody any more, and stays trusted", c.Subject, b.ID)
			line("until %s, when the last SVID under it has ended, so that nobody is cut off; then it leaves the trust", b.By.UTC().Format(time.RFC3339))
			line("bundle by itself. To keep it: `certctl ca root import`; to have it sign again: `certctl ca rotate root --issuer`.")
		}
	}
}

func tellRestored(out io.Writer, c *Config, f restoreFlags, file string, r bolt.Restored) {
	line := func(format string, args ...any) { fmt.Fprintf(out, format+"\n", args...) }
	if f.dryRun {
		line("%s could be restored; nothing was changed", file)
	} else {
		line("restored %s", c.storePath())
	}
	h := r.Header
	line("  made at      %s", h.Made.Format(time.RFC3339))
	line("  bundle       sequence %d", r.State.Bundle.Sequence)
	line("  denials      %d", len(r.State.Denials))
	if h.Rollout != "" {
		line("  rollout      %s", h.Rollout)
	}
	if h.LedgerLast > 0 {
		line("  ledger       %d entries up to %d, of %s", h.LedgerEntries, h.LedgerLast, h.LastIssued.Format(time.RFC3339))
	} else {
		line("  ledger       empty")
	}
	switch {
	case r.Behind != nil:
		line("  lost         %s; denied stays denied, tainted stays tainted, and the bundle's sequence goes on beyond what agents hold", r.Behind)
	case r.Aside != "":
		line("  lost         nothing that was decided")
	}
	switch {
	case r.Aside != "" && f.dryRun:
		line("  the store that stands would be kept as %s", r.Aside)
	case r.Aside != "":
		line("  kept aside   %s, with the ledger of the time since", r.Aside)
	}
	tellTrusted(line, r.State)
	if err := r.State.Rollout.Barred(r.State.Rollout.Signer().ID); err != nil {
		line("The root that signs by this backup was tainted since: %v. The CA issues nothing before another one signs.", err)
		line("When it runs: %s; `certctl ca status` lists issuers.", leadsOut(r.State.Rollout))
	}
	line("What was issued after the backup is not in this ledger: `certctl svid list` does not know those serials, and `certctl svid deny`")
	line("does not count them. They end within %s; the audit log has a line for each.", c.SVID.TTL.Duration)
	line("Agents that the backup does not know attest themselves anew. Where one has followed a later state than this, the CA says so")
	line("and issues nothing before `certctl ca accept-rollback`.")
	if c.Upstream.Disk != nil {
		line("The backup holds no root key: %s must be there too.", strings.Join([]string{c.Upstream.Disk.CertFile, c.Upstream.Disk.KeyFile, c.successors()}, ", "))
	}
}
