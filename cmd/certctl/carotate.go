package main

import (
	"bufio"
	"context"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/ca/policy"
)

func (c *cli) rotateRootCommand() *cobra.Command {
	r := &meshcav1.RotateRootRequest{}
	var share string
	var watch bool
	cmd := &cobra.Command{
		Use: "root [--issuer REF] [--share P%] [--dry-run] [--watch]", Short: "Replace the root that signs", Args: args(0, 0, "no arguments"),
		Long: `Begins to replace the root: the new one is published, signs when all agents have confirmed that they trust it, and
the old one leaves the trust bundle when the last certificate under it has ended. No request fails for it. "certctl ca
abort" goes back until then.

With --watch, exit code 0 when it ended with the new root, and 1 when it was aborted; to end the view does not end the
rollout.`,
		Example: `  certctl ca rotate root --dry-run
  certctl ca rotate root --share 5% --watch`,
	}
	f := cmd.Flags()
	f.StringVar(&r.Issuer, "issuer", "", "the upstream's issuer to go to, by its `reference` or name: if none is named, one that the upstream makes, or the only other one below a root that is trusted")
	f.StringVar(&share, "share", "", "the new root signs for this `share` of the identities, 1% to 99%, until `certctl ca continue`")
	f.BoolVar(&r.DryRun, "dry-run", false, "only say what would happen")
	f.BoolVar(&watch, "watch", false, "follow the rollout until it is over")
	_ = cmd.RegisterFlagCompletionFunc("issuer", c.completeIssuers)
	_ = cmd.RegisterFlagCompletionFunc("share", cobra.FixedCompletions([]string{"1%", "5%", "25%", "50%"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		if r.GetDryRun() && watch {
			return usage("--dry-run begins nothing that --watch could follow")
		}
		var err error
		if r.Share, err = percent(share); err != nil {
			return err
		}
		return c.rotateRoot(cmd, r, watch)
	}
	return cmd
}

// percent reads a share: "5%" or "5"; empty is 0.
func percent(s string) (uint32, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(strings.TrimSuffix(s, "%"), 10, 8)
	if err != nil || n < 1 || n > 99 {
		return 0, usage("--share %.64q is no share of the identities: write 1%% to 99%%", s)
	}
	return uint32(n), nil
}

// rotateRoot begins a rollout, and follows it if watch says so.
func (c *cli) rotateRoot(cmd *cobra.Command, r *meshcav1.RotateRootRequest, watch bool) error {
	begun, err := order(c, cmd, func(ctx context.Context, a meshcav1.AuthorityServiceClient) (*meshcav1.RotateRootResponse, error) {
		return a.RotateRoot(ctx, r)
	})
	if err != nil {
		return err
	}
	if begun.GetRepointed() != "" {
		return c.show(begun, func(p *page) {
			says := "No root is replaced: issuer %s is one of a root that is there already"
			if r.GetDryRun() {
				says = "Nothing was changed. No root would be replaced: issuer %s is one of a root that is there already"
			}
			p.line(says, begun.GetRepointed())
			drawPlan(p, begun.GetPlan())
		})
	}
	if watch {
		return c.follow(cmd.Context(), begun.GetRollout(), nil, false)
	}
	return c.show(begun, func(p *page) {
		says := "Root %s is being replaced by %s"
		if r.GetDryRun() {
			says = "Nothing was changed. Root %s would be replaced by %s"
		}
		p.line(says, shortID(begun.GetRollout().GetOldRoot()), shortID(begun.GetRollout().GetNewRoot()))
		drawPlan(p, begun.GetPlan())
		if !r.GetDryRun() {
			p.line("It goes on by itself; `certctl ca status --watch` follows it")
		}
	})
}

// drawPlan shows the steps that the CA names, each with what happens in it.
func drawPlan(p *page, plan []string) {
	var list []pair
	for _, line := range plan {
		step, what, found := strings.Cut(line, ": ")
		if !found {
			step, what = "", line
		}
		list = append(list, pair{step, text(what)})
	}
	p.pairs(list...)
}

// minTaint and maxTaint are the bounds that the CA takes for the taint of a root.
const minTaint, maxTaint = 20 * time.Second, policy.DefaultMaxTTL

// brief writes a duration as flags take it, without units that are zero.
func brief(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// typed reads a line of the standard input, of 256 bytes at most, until ctx ends. A read cannot be ended: it is left to
// itself, and ends with the process.
func (c *cli) typed(ctx context.Context) (string, error) {
	done := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(io.LimitReader(c.in, 256)).ReadString('\n') // what came before the end is the answer
		done <- strings.TrimSpace(line)
	}()
	select {
	case line := <-done:
		return line, nil
	case <-ctx.Done():
		return "", interrupted
	}
}
