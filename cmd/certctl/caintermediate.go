package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

func (c *cli) rotateIntermediateCommand() *cobra.Command {
	var dryRun, watch bool
	cmd := &cobra.Command{
		Use: "intermediate [--dry-run] [--watch]", Short: "Replace the intermediates, at once", Args: args(0, 0, "no arguments"),
		Long: `The CA makes new keys, has the upstream sign intermediates for them, and destroys the old keys. Nobody notices:
everyone trusts the root, and the intermediate travels with each certificate. What was issued stays good until it ends.

With --dry-run it says below which roots intermediates would be replaced, which issuers would sign the new ones, and when
those would end; exit code 1 when one could not be replaced now. What the upstream's login may do is not tried: "meshca
config check --live" does that.`,
		Example: `  certctl ca rotate intermediate --dry-run
  certctl ca rotate intermediate`,
	}
	f := cmd.Flags()
	f.BoolVar(&dryRun, "dry-run", false, "only say what would happen")
	f.BoolVar(&watch, "watch", false, "wait until the new ones sign, as it does without, too")
	// Those of a root are taken and refused with the reason.
	f.String("issuer", "", "")
	f.String("share", "", "")
	_, _ = f.MarkHidden("issuer"), f.MarkHidden("share")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		switch err := c.caOnly(cmd); {
		case err != nil:
			return err
		case f.Changed("issuer"):
			return usage("an intermediate is signed by the issuer of the root that it is below, so there is none to choose with --issuer: " +
				"`certctl ca rotate root --issuer REF` goes to another one")
		case f.Changed("share"):
			return usage("intermediates are replaced at once, for all identities: everyone trusts the root above them, so there is no --share to try one on. " +
				"`certctl ca rotate root --share P%%` has it")
		case dryRun && watch:
			return usage("--dry-run begins nothing that --watch could follow")
		case dryRun:
			return c.planIntermediates(cmd)
		}
		r, err := c.rotateIntermediate(cmd, 0)
		if err != nil {
			return err
		}
		return c.show(r, func(p *page) { drawNewSerials(p, r) })
	}
	return cmd
}

// planIntermediates says what the order would do, and is a no where one could not be replaced now.
func (c *cli) planIntermediates(cmd *cobra.Command) error {
	r, err := order(c, cmd, func(ctx context.Context, a meshcav1.AuthorityServiceClient) (*meshcav1.PlanIntermediatesResponse, error) {
		return a.PlanIntermediates(ctx, &meshcav1.PlanIntermediatesRequest{})
	})
	if err != nil {
		return err
	}
	if err := c.show(r, func(p *page) { drawIntermediatePlans(p, r.GetPlans()) }); err != nil {
		return err
	}
	for _, x := range r.GetPlans() {
		if x.GetFault() != "" {
			return negative
		}
	}
	return nil
}

func drawIntermediatePlans(p *page, plans []*meshcav1.IntermediatePlan) {
	var rows [][]cell
	could := 0
	for _, x := range plans {
		row := []cell{text(shortID(x.GetRoot())), text(x.GetIssuer()), text("none yet"), {}, p.when(x.GetNotAfter()), text(x.GetFault()).as(bad)}
		if old := x.GetReplaces(); old != nil {
			row[2], row[3] = text(old.GetSerial()), p.when(old.GetNotAfter())
		}
		if x.GetFault() == "" {
			could++
		}
		rows = append(rows, row)
	}
	switch {
	case len(plans) == 0:
		p.line("Nothing was changed. No root signs here, so there is no intermediate to replace")
		return
	case could == 0:
		p.line("Nothing was changed. No intermediate could be replaced now")
	default:
		p.line("Nothing was changed. %s would be replaced at once, and the old keys destroyed; nothing is renewed for that", plural(could, "intermediate", "intermediates"))
	}
	p.table([]string{"ROOT", "ISSUER", "REPLACES", "WHICH ENDS", "THE NEW ONE ENDS AT MOST", "COULD NOT BE REPLACED NOW"}, rows)
}

func drawNewSerials(p *page, r *meshcav1.RotateIntermediateResponse) {
	p.line("%s: %s; the old keys are destroyed", plural(len(r.GetNewSerials()), "new intermediate signs", "new intermediates sign"), strings.Join(r.GetNewSerials(), ", "))
}

func (c *cli) rotateIntermediate(cmd *cobra.Command, tainted time.Duration) (*meshcav1.RotateIntermediateResponse, error) {
	return order(c, cmd, func(ctx context.Context, a meshcav1.AuthorityServiceClient) (*meshcav1.RotateIntermediateResponse, error) {
		r := &meshcav1.RotateIntermediateRequest{}
		if tainted > 0 {
			r.TaintedWithin = durationpb.New(tainted)
		}
		return a.RotateIntermediate(ctx, r)
	})
}

func (c *cli) taintIntermediateCommand() *cobra.Command {
	var within time.Duration
	cmd := &cobra.Command{
		Use: "intermediate [--within D]", Short: "An intermediate's key was stolen: replace it, and renew all it signed", Args: args(0, 0, "no arguments"),
		Long: `Replaces the intermediates at once, and orders the renewal of every SVID, spread over the time given. Whoever has
the old key can go on to make certificates that are accepted until the intermediate ends, for everyone trusts the root
above it: the answer says until when. Only "certctl ca taint root" cuts that off.`,
	}
	cmd.Flags().DurationVar(&within, "within", 10*time.Minute, "spread the renewals over this `time`")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		if within <= 0 {
			return usage("--within %s is no time to renew in", within)
		}
		r, err := c.rotateIntermediate(cmd, within)
		if err != nil {
			return err
		}
		return c.show(r, func(p *page) {
			drawNewSerials(p, r)
			p.line("all SVIDs are being renewed, spread over %s", spell(within))
			if r.GetTrustedUntil() == nil {
				p.line("there was no intermediate before: no old key is trusted")
				return
			}
			p.line("WHOEVER HAS THE OLD KEY can make certificates for any identity that everyone accepts, until it ends %s", p.when(r.GetTrustedUntil()).text)
			p.line("only `certctl ca taint root --within %s` cuts that off", brief(min(max(within, minTaint), maxTaint)))
		})
	}
	return cmd
}
