package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
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
	f.StringVar(&r.Issuer, "issuer", "", "the upstream's issuer to go to, by its `reference` or name: one that the upstream makes, or the only candidate, if none is named")
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
		return 0, usage("--share %q is no share of the identities: write 1%% to 99%%", s)
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
	if watch {
		return c.follow(cmd.Context(), begun.GetRollout(), nil)
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

func (c *cli) rotateIntermediateCommand() *cobra.Command {
	return &cobra.Command{
		Use: "intermediate", Short: "Replace the intermediates, at once", Args: args(0, 0, "no arguments"),
		Long: `The CA makes new keys, has the upstream sign intermediates for them, and destroys the old keys. Nobody notices:
everyone trusts the root, and the intermediate travels with each certificate. What was issued stays good until it ends.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.caOnly(cmd); err != nil {
				return err
			}
			r, err := c.rotateIntermediate(cmd, 0)
			if err != nil {
				return err
			}
			return c.show(r, func(p *page) { drawNewSerials(p, r) })
		},
	}
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
			p.line("only `certctl ca taint root --within %s` cuts that off", brief(within))
		})
	}
	return cmd
}

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

func (c *cli) taintRootCommand() *cobra.Command {
	r := &meshcav1.RotateRootRequest{}
	var within time.Duration
	var watch, sure bool
	cmd := &cobra.Command{
		Use: "root --within D [--issuer REF] [--watch] [--yes]", Short: "The root is not to be trusted any more: replace it within a bound", Args: args(0, 0, "no arguments, but --within D"),
		Long: `An emergency: a successor is published and waited for no longer than half of the time given, every SVID is renewed
under it, and then the old root leaves the trust bundle, whatever still lives under it. Agents that have not confirmed by
then are left behind: what runs there refuses the others and is refused, until the agent's bundle file has the new root.

It asks before it begins; --yes is the answer where nobody can be asked.`,
		Example: "  certctl ca taint root --within 10m --watch",
	}
	f := cmd.Flags()
	f.DurationVar(&within, "within", 0, "the old root is out within this `time`, 20s to 6h (needed)")
	f.StringVar(&r.Issuer, "issuer", "", "the upstream's issuer to go to, by its `reference` or name")
	f.BoolVar(&watch, "watch", false, "follow the rollout until it is over")
	f.BoolVar(&sure, "yes", false, "do not ask")
	_ = cmd.RegisterFlagCompletionFunc("issuer", c.completeIssuers)
	_ = cmd.RegisterFlagCompletionFunc("within", cobra.FixedCompletions([]string{"5m", "10m", "30m", "1h"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		if within <= 0 {
			return usage("say how long others may take to follow before the old root is out: --within 10m")
		}
		r.TaintedWithin = durationpb.New(within)
		if err := c.confirmTaint(cmd, r, sure); err != nil {
			return err
		}
		return c.rotateRoot(cmd, r, watch)
	}
	return cmd
}

// confirmTaint says what a taint does and to whom, and lets it pass when a person says yes.
func (c *cli) confirmTaint(cmd *cobra.Command, r *meshcav1.RotateRootRequest, sure bool) error {
	var now *meshcav1.GetAuthoritiesResponse
	would, err := order(c, cmd, func(ctx context.Context, a meshcav1.AuthorityServiceClient) (*meshcav1.RotateRootResponse, error) {
		var err error
		if now, err = a.GetAuthorities(ctx, &meshcav1.GetAuthoritiesRequest{}); err != nil {
			return nil, err
		}
		return a.RotateRoot(ctx, &meshcav1.RotateRootRequest{Issuer: r.GetIssuer(), TaintedWithin: r.GetTaintedWithin(), DryRun: true})
	})
	if err != nil {
		return err
	}
	old := would.GetRollout().GetOldRoot()
	if c.format == formatTable || !sure {
		p := &page{now: c.now(), colour: c.colour && c.format == formatTable}
		drawTaint(p, would, now)
		_, _ = c.err.Write(p.bytes())
	}
	switch {
	case sure:
		return nil
	case !c.asking:
		return usage("nothing was changed: add --yes, as nobody can be asked here whether this is meant")
	}
	fmt.Fprintf(c.err, "Type %q to begin: ", shortID(old))
	typed, err := c.typed(cmd.Context())
	if err != nil {
		return err
	}
	if typed != shortID(old) {
		return no("nothing was changed", fmt.Errorf("%q is not %s", typed, shortID(old)), "")
	}
	return nil
}

// drawTaint says what happens to whom.
func drawTaint(p *page, would *meshcav1.RotateRootResponse, now *meshcav1.GetAuthoritiesResponse) {
	within := would.GetRollout().GetWithin().AsDuration()
	p.line("Root %s leaves the trust bundle within %s, and %s takes its place:", shortID(would.GetRollout().GetOldRoot()), spell(within), shortID(would.GetRollout().GetNewRoot()))
	drawPlan(p, would.GetPlan())
	p.line("Whoever has not confirmed within %s is left behind: what runs there refuses the others from then on, and is refused by them", spell(within/2))
	p.line("when the old root is out. It comes back by itself when its agent's bundle file has the new root: bring the CA's to that node.")
	var silent []string
	for _, a := range now.GetAgents() {
		if !a.GetConnected() {
			silent = append(silent, fmt.Sprintf("%s is silent since %s", a.GetSpiffeId(), p.since(a.GetLastSeen().AsTime())))
		}
	}
	p.line("%s, %d of them connected now", plural(len(now.GetAgents()), "agent counts", "agents count"), len(now.GetAgents())-len(silent))
	for i, name := range silent {
		if i == waitsShown {
			p.line("  and %d more: `certctl ca status` shows them", len(silent)-i)
			break
		}
		p.line("  %s", name)
	}
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
