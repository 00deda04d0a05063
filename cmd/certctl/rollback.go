package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

func (c *cli) acceptRollbackCommand() *cobra.Command {
	var above uint64
	var sure bool
	cmd := &cobra.Command{
		Use: "accept-rollback [--above SEQUENCE]", Short: "Go on with a store that agents have shown to be an old one", Args: args(0, 0, "no arguments, but --above SEQUENCE"),
		Long: `A CA whose store was put back from an old backup issues nothing once an agent has proven that it followed a later
state: denials, roots and orders that came after the backup are missing. Put back in what is missing first; then this has
the CA go on, with a trust bundle whose sequence is beyond all that was seen, so that every agent follows it.

With --above, beyond this sequence: for agents that hold a bundle of a higher sequence and cannot prove where it comes
from, as when the store was made anew. The CA's log names them. It asks before it does what cannot be undone; --yes is the answer where nobody can be asked.`,
		Example: "  certctl ca accept-rollback\n  certctl ca accept-rollback --above 41",
	}
	cmd.Flags().Uint64Var(&above, "above", 0, "go on beyond this `sequence` of the trust bundle")
	cmd.Flags().BoolVar(&sure, "yes", false, "do not ask")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		return c.acceptRollback(cmd, above, sure)
	}
	return cmd
}

func (c *cli) acceptRollback(cmd *cobra.Command, above uint64, sure bool) error {
	ctx, cancel := c.within(cmd)
	defer cancel()
	s, err := c.caStatus(ctx)
	if err != nil {
		return err
	}
	if err := c.confirmRollback(cmd.Context(), s, sure); err != nil {
		return err
	}
	ctx, cancel = c.within(cmd) // a person took some time
	defer cancel()
	conn, err := c.openCA(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	r, err := conn.CA.AcceptRollback(ctx, &meshcav1.AcceptRollbackRequest{Above: above})
	if err != nil {
		return theCA.failed(err)
	}
	return c.show(r, func(p *page) {
		p.line("the CA goes on; the trust bundle has sequence %d, which agents take as soon as they connect", r.GetBundleSequence())
	})
}

// confirmRollback says what is lost, and lets it pass when a person says yes. Where nothing is, the CA says so.
func (c *cli) confirmRollback(ctx context.Context, s *meshcav1.GetStatusResponse, sure bool) error {
	r := s.GetRollback()
	if r == nil {
		return nil
	}
	if c.format == formatTable || !sure {
		p := &page{now: c.now(), colour: c.colour && c.format == formatTable}
		p.line("%s has followed state %d, with trust bundle %d, and shows it since %s.", r.GetAgent(), r.GetSeenState(), r.GetSeenBundleSequence(),
			absolute(r.GetSince().AsTime()))
		p.line("This CA's store, with trust bundle %d, does not know it. What was decided between is lost, unless you have put it back in:", s.GetBundleSequence())
		p.line("agents lift the denials that `certctl denials list` does not show, and trust the roots of `certctl bundle show`, and no others.")
		_, _ = c.err.Write(p.bytes())
	}
	switch {
	case sure:
		return nil
	case !c.asking:
		return usage("nothing was changed: add --yes, as nobody can be asked here whether this is meant")
	}
	fmt.Fprintf(c.err, "Type %q to go on: ", s.GetTrustDomain())
	typed, err := c.typed(ctx)
	if err != nil {
		return err
	}
	if typed != s.GetTrustDomain() {
		return no("nothing was changed", fmt.Errorf("%.64q is not %s", typed, s.GetTrustDomain()), "")
	}
	return nil
}
