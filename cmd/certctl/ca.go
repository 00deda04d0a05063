package main

import (
	"context"
	"encoding/hex"
	"errors"
	"strings"

	"github.com/spf13/cobra"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

func (c *cli) caCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "ca", Short: "Roots and intermediates: how they are, and how they are replaced",
		Long: `The CA signs with an intermediate of its own, below a root that everyone trusts. Intermediates are replaced by
themselves. A root is replaced by a rollout: published, confirmed by all, signs, and the old one leaves the trust bundle
when the last certificate under it has ended. It goes on by itself, also over restarts of the CA.`,
	}
	cmd.RunE = c.group(cmd)
	rotate := &cobra.Command{Use: "rotate", Short: "Replace the root that signs, or the intermediates"}
	rotate.RunE = c.group(rotate)
	rotate.AddCommand(c.rotateRootCommand(), c.rotateIntermediateCommand())
	taint := &cobra.Command{Use: "taint", Short: "Replace what is not to be trusted any more: a key was stolen"}
	taint.RunE = c.group(taint)
	taint.AddCommand(c.taintRootCommand(), c.taintIntermediateCommand())
	cmd.AddCommand(c.caStatusCommand(), rotate, c.continueCommand(), c.abortCommand(), taint, c.rootCommand(), c.acceptRollbackCommand())
	return cmd
}

// authorities asks for all that the CA knows of its authorities.
func (c *cli) authorities(ctx context.Context) (*meshcav1.GetAuthoritiesResponse, error) {
	conn, err := c.openCA(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	a, err := conn.Authorities.GetAuthorities(ctx, &meshcav1.GetAuthoritiesRequest{})
	if err != nil {
		return nil, theCA.failed(err)
	}
	return a, nil
}

// order gives the CA one order about its authorities, within --timeout.
func order[T any](c *cli, cmd *cobra.Command, give func(context.Context, meshcav1.AuthorityServiceClient) (T, error)) (answer T, err error) {
	ctx, cancel := c.within(cmd)
	defer cancel()
	conn, err := c.openCA(ctx)
	if err != nil {
		return answer, err
	}
	defer conn.Close()
	if answer, err = give(ctx, conn.Authorities); err == nil {
		return answer, nil
	}
	err = theCA.failed(err)
	var f *failure
	if errors.As(err, &f) && f.code == exitUnreachable { // it was reached, and may have done it all the same
		unsure := *f
		unsure.next = "`certctl ca status` says whether it took effect. " + f.next
		return answer, &unsure
	}
	return answer, err
}

// shortID is as much of a root's ID as people compare: twelve digits of its SHA-256.
func shortID(id string) string {
	if _, err := hex.DecodeString(id); err != nil || len(id) != 64 {
		return id // a sentence, where there is no root yet
	}
	return id[:12]
}

func (c *cli) continueCommand() *cobra.Command {
	var despite []string
	cmd := &cobra.Command{
		Use: "continue [--despite AGENT]...", Short: "End the canary, or go on without the confirmation of an agent", Args: args(0, 0, "no arguments, but --despite AGENT"),
		Long: `While the new root signs for a share of the identities: have it sign for all. While a rollout is being aborted: turn it
forward again, to the new root. While confirmations are waited for:
give up that of the agents named, by their SPIFFE IDs or the ends of these, or of "reader NAME". What runs below an agent
that was given up refuses peers whose certificates are under the new root, until the agent has the trust bundle.`,
		Example: `  certctl ca continue
  certctl ca continue --despite spiffe://mesh.example/meshca/agent/prod/node-7`,
	}
	cmd.Flags().StringArrayVar(&despite, "despite", nil, "go on without the confirmation of this `agent` or reader; may be repeated")
	_ = cmd.RegisterFlagCompletionFunc("despite", c.completeWaits)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		r, err := order(c, cmd, func(ctx context.Context, a meshcav1.AuthorityServiceClient) (*meshcav1.ContinueRolloutResponse, error) {
			names := despite
			if len(despite) > 0 {
				now, err := a.GetAuthorities(ctx, &meshcav1.GetAuthoritiesRequest{})
				if err != nil {
					return nil, err
				}
				names = meantWaits(despite, now.GetRollout().GetWaits())
			}
			return a.ContinueRollout(ctx, &meshcav1.ContinueRolloutRequest{Despite: names})
		})
		if err != nil {
			return err
		}
		return c.show(r, func(p *page) {
			if len(despite) > 0 {
				p.line("the confirmation of %s is given up; what runs there refuses peers under the new root until its agent has trust bundle %d",
					strings.Join(r.GetRollout().GetDespite(), ", "), r.GetRollout().GetBundleSequence())
			} else {
				p.line("root %s signs for all from now on", shortID(r.GetRollout().GetNewRoot()))
			}
			p.line("`certctl ca status --watch` follows the rollout")
		})
	}
	return cmd
}

// meantWaits completes names to the ones of waits that end with them, where there is just one.
func meantWaits(typed, waits []string) []string {
	names := make([]string, 0, len(typed))
	for _, t := range typed {
		var found []string
		for _, w := range waits {
			if w == t {
				found = []string{w}
				break
			}
			if t != "" && (strings.HasSuffix(w, "/"+t) || w == "reader "+t) {
				found = append(found, w)
			}
		}
		if len(found) == 1 {
			t = found[0]
		}
		names = append(names, t)
	}
	return names
}

func (c *cli) abortCommand() *cobra.Command {
	return &cobra.Command{
		Use: "abort", Short: "Go back to the root that signed before", Args: args(0, 0, "no arguments"),
		Long: `Turns the rollout round: the old root signs for all again, and the new one leaves the trust bundle, at once if it
has signed nothing, else when the last certificate under it has ended. There is a way back until the old root leaves.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.caOnly(cmd); err != nil {
				return err
			}
			r, err := order(c, cmd, func(ctx context.Context, a meshcav1.AuthorityServiceClient) (*meshcav1.AbortRolloutResponse, error) {
				return a.AbortRollout(ctx, &meshcav1.AbortRolloutRequest{})
			})
			if err != nil {
				return err
			}
			return c.show(r, func(p *page) {
				p.line("the rollout is turned round: %s", stepSays(r.GetRollout()))
				p.line("`certctl ca status --watch` follows it")
			})
		},
	}
}
