package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

func (c *cli) taintRootCommand() *cobra.Command {
	r := &meshcav1.RotateRootRequest{}
	var within time.Duration
	var watch, sure bool
	cmd := &cobra.Command{
		Use: "root [ID] --within D [--issuer REF] [--watch] [--yes]", Short: "A root is not to be trusted any more: do without it, within a bound",
		Args: args(0, 1, "one root's ID, or none for the root that signs, and --within D"),
		Long: `An emergency. The root that signs is replaced: a successor is published and waited for no longer than half of the time
given, every SVID is renewed under it, and then the old root leaves the trust bundle, whatever still lives under it. Agents
that have not confirmed by then are left behind: what runs there refuses the others and is refused, until the agent's bundle
file has the new root.

A rollout that is under way is no hindrance. The root that it takes out leaves sooner; the root that it brings in goes back
out, and the one before it signs again; where both are tainted, a third one follows. A root that signs for nobody leaves the
trust bundle at once. The CA remembers what was tainted, and never takes it or its key in again.

ID is the SHA-256 of the root's certificate, or how that begins, as "certctl ca status" shows it.

It asks before it begins; --yes is the answer where nobody can be asked.`,
		Example: `  certctl ca taint root --within 10m --watch
  certctl ca taint root 3f2a91c0 --within 10m`,
		ValidArgsFunction: c.completeRootArgument,
	}
	f := cmd.Flags()
	f.DurationVar(&within, "within", 0, "the root is out within this `time`, 20s to 6h (needed)")
	f.StringVar(&r.Issuer, "issuer", "", "the upstream's issuer that is to follow where none of the roots there are can, by its `reference` or name")
	f.BoolVar(&watch, "watch", false, "follow the rollout until it is over")
	f.BoolVar(&sure, "yes", false, "do not ask")
	_ = cmd.RegisterFlagCompletionFunc("issuer", c.completeIssuers)
	_ = cmd.RegisterFlagCompletionFunc("within", cobra.FixedCompletions([]string{"5m", "10m", "30m", "1h"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = func(cmd *cobra.Command, given []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		if within <= 0 {
			return usage("say how long others may take to follow before the root is out: --within 10m")
		}
		r.TaintedWithin = durationpb.New(within)
		if err := c.confirmTaint(cmd, r, slices.Concat(given, []string{""})[0], sure); err != nil {
			return err
		}
		return c.taintRoot(cmd, r, watch)
	}
	return cmd
}

// taintRoot gives the order, and follows what comes of it if watch says so.
func (c *cli) taintRoot(cmd *cobra.Command, r *meshcav1.RotateRootRequest, watch bool) error {
	begun, err := order(c, cmd, func(ctx context.Context, a meshcav1.AuthorityServiceClient) (*meshcav1.RotateRootResponse, error) {
		return a.RotateRoot(ctx, r)
	})
	if err != nil {
		return err
	}
	under := begun.GetRollout().GetActive()
	if watch && under {
		return c.follow(cmd.Context(), begun.GetRollout(), nil, begun.GetRollout().GetAborted())
	}
	return c.show(begun, func(p *page) {
		drawTaint(p, r.GetTaintedRoot(), begun)
		if under {
			p.line("It goes on by itself; `certctl ca status --watch` follows it")
		}
	})
}

// taintable finds the root that is meant: of the trust bundle, of the rollout or of the candidates. None typed: the one
// that signs, which the CA knows best.
func taintable(a *meshcav1.GetAuthoritiesResponse, typed string) (string, error) {
	if typed == "" {
		return "", nil
	}
	var all []string
	for _, r := range a.GetRoots() {
		all = append(all, r.GetId())
	}
	for _, x := range a.GetCandidates() {
		all = append(all, x.GetRoot())
	}
	if r := a.GetRollout(); r.GetActive() {
		all = append(all, r.GetOldRoot(), r.GetNewRoot())
	}
	slices.Sort(all)
	prefix := strings.ToLower(strings.ReplaceAll(typed, ":", ""))
	var found, short []string
	for _, id := range slices.Compact(all) {
		if id == "" {
			continue
		}
		short = append(short, shortID(id))
		if len(prefix) >= leastID && strings.HasPrefix(id, prefix) {
			found = append(found, id)
		}
	}
	if len(found) == 1 {
		return found[0], nil
	}
	return "", no(fmt.Sprintf("%.64q names %s", typed, plural(len(found), "root", "roots")), nil, "There are "+strings.Join(short, ", "))
}

// confirmTaint says what a taint does and to whom, and lets it pass when a person says yes. It puts the root that is meant
// into the request, so that nothing else is tainted than what was shown.
func (c *cli) confirmTaint(cmd *cobra.Command, r *meshcav1.RotateRootRequest, typed string, sure bool) error {
	var now *meshcav1.GetAuthoritiesResponse
	would, err := order(c, cmd, func(ctx context.Context, a meshcav1.AuthorityServiceClient) (*meshcav1.RotateRootResponse, error) {
		var err error
		if now, err = a.GetAuthorities(ctx, &meshcav1.GetAuthoritiesRequest{}); err != nil {
			return nil, err
		}
		if r.TaintedRoot, err = taintable(now, typed); err != nil {
			return nil, err
		}
		return a.RotateRoot(ctx, &meshcav1.RotateRootRequest{Issuer: r.GetIssuer(), TaintedRoot: r.GetTaintedRoot(), TaintedWithin: r.GetTaintedWithin(), DryRun: true})
	})
	if err != nil {
		return err
	}
	if r.GetTaintedRoot() == "" {
		r.TaintedRoot = goes(would.GetRollout())
	}
	if c.format == formatTable || !sure {
		p := &page{now: c.now(), colour: c.colour && c.format == formatTable}
		drawTaint(p, r.GetTaintedRoot(), would)
		drawConcerned(p, would.GetRollout(), now)
		_, _ = c.err.Write(p.bytes())
	}
	switch {
	case sure:
		return nil
	case !c.asking:
		return usage("nothing was changed: add --yes, as nobody can be asked here whether this is meant")
	}
	fmt.Fprintf(c.err, "Type %q to begin: ", shortID(r.GetTaintedRoot()))
	answer, err := c.typed(cmd.Context())
	if err != nil {
		return err
	}
	if answer != shortID(r.GetTaintedRoot()) {
		return no("nothing was changed", fmt.Errorf("%.64q is not %s", answer, shortID(r.GetTaintedRoot())), "")
	}
	return nil
}

// goes is the root that leaves at a rollout's end, stays the one that signs then.
func goes(r *meshcav1.RolloutStatus) string {
	if r.GetAborted() {
		return r.GetNewRoot()
	}
	return r.GetOldRoot()
}

func stays(r *meshcav1.RolloutStatus) string {
	if r.GetAborted() {
		return r.GetOldRoot()
	}
	return r.GetNewRoot()
}

// drawTaint says what becomes of the root.
func drawTaint(p *page, id string, answer *meshcav1.RotateRootResponse) {
	r := answer.GetRollout()
	within := spell(r.GetWithin().AsDuration())
	switch {
	case answer.GetAtOnce():
		p.line("Root %s signs for nobody here:", shortID(id))
	case r.GetWithin() == nil:
		p.line("Root %s leaves the trust bundle anyway, and %s signs for all:", shortID(id), shortID(stays(r)))
	case r.GetAborted():
		p.line("Root %s leaves the trust bundle within %s, and %s signs for all again:", shortID(id), within, shortID(stays(r)))
	default:
		p.line("Root %s leaves the trust bundle within %s, and %s takes its place:", shortID(id), within, shortID(stays(r)))
	}
	drawPlan(p, answer.GetPlan())
}

// drawConcerned says who is left behind where confirmations have yet to come, and who is not there to follow.
func drawConcerned(p *page, r *meshcav1.RolloutStatus, now *meshcav1.GetAuthoritiesResponse) {
	if s := r.GetStep(); r.GetWithin() != nil && (s == "chosen" || s == "published") {
		p.line("Whoever has not confirmed within %s is left behind: what runs there refuses the others from then on, and is refused by them", spell(r.GetWithin().AsDuration()/2))
		p.line("when the old root is out. It comes back by itself when its agent's bundle file has the new root: bring the CA's to that node.")
	}
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
