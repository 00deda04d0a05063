package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

func (c *cli) denyCommand() *cobra.Command {
	var why string
	cmd := &cobra.Command{
		Use: "deny ID --why TEXT", Short: "Give an identity nothing new, and make agents drop it", Args: args(1, 1, "one SPIFFE ID"),
		Long: `From now on the CA issues nothing for the SPIFFE ID, and agents drop what they hold of it within seconds. A
proxy keeps the certificate that it was given until that ends: the answer says when. An agent's own ID can be denied
too: the CA answers that agent no longer, and what its workloads hold runs out.`,
		Example:           `  certctl svid deny spiffe://mesh.example/ns/shop/sa/cart --why "key leaked, incident 42"`,
		ValidArgsFunction: c.completeIDs,
	}
	cmd.Flags().StringVar(&why, "why", "", "the reason, `text` in one line: refusals, the audit log and `certctl explain` say it (needed)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		if why == "" {
			return usage("a denial needs a reason for those who meet it later: --why TEXT")
		}
		ctx, cancel := c.within(cmd)
		defer cancel()
		conn, err := c.openCA(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		r, err := conn.CA.DenySVID(ctx, &meshcav1.DenySVIDRequest{SpiffeId: args[0], Why: why})
		if err != nil {
			return theCA.failed(err)
		}
		return c.show(r, func(p *page) { drawDenied(p, r) })
	}
	return cmd
}

// agentPath begins the path of every agent's ID.
const agentPath = "/meshca/agent/"

// drawDenied tells what a denial means for what it was about: an agent, an identity that somebody holds, or one that
// nobody does.
func drawDenied(p *page, r *meshcav1.DenySVIDResponse) {
	id, live := r.GetDenial().GetSpiffeId(), r.GetLiveSvids()
	last := p.when(r.GetLastNotAfter()).text
	named := plural(r.GetAgentsConnected(), "connected agent has", "connected agents have")
	parsed, err := spiffeid.FromString(id)
	switch {
	case err == nil && strings.HasPrefix(parsed.Path(), agentPath) && live > 0:
		p.line("the CA answers the agent %s no longer", id)
		p.line("%s alive, the last ends %s; the CA takes none of them", plural(live, "SVID of its own is", "SVIDs of its own are"), last)
		p.line("its workloads get nothing new from it; what they hold lasts until it ends, unless they are denied too")
	case err == nil && strings.HasPrefix(parsed.Path(), agentPath):
		p.line("the CA answers no agent %s", id)
		p.line("none holds a live SVID of that ID: `certctl status` lists the agents")
	case live > 0:
		p.line("%s gets nothing new from now on, and agents drop it", id)
		p.line("%s the word now; others get it when they come back", named)
		p.line("%s alive; a proxy that was given one keeps it until it ends, the last %s", plural(live, "SVID of it is", "SVIDs of it are"), last)
	default:
		p.line("%s gets nothing new from now on", id)
		p.line("the ledger has no SVID of it that is alive, so nobody holds one: compare the ID with `certctl svid list` if that is a surprise")
		p.line("%s the word now; others get it when they come back", named)
	}
	p.line("`certctl svid allow %s` lifts the denial", id)
}

func plural[N int | uint32](n N, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func (c *cli) allowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "allow ID", Short: "Lift a denial", Args: args(1, 1, "one SPIFFE ID"),
		Long:              "Lifts the denial of a SPIFFE ID. Exit code 1 when it was not denied.",
		ValidArgsFunction: c.completeDenied,
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		ctx, cancel := c.within(cmd)
		defer cancel()
		conn, err := c.openCA(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		r, err := conn.CA.AllowSVID(ctx, &meshcav1.AllowSVIDRequest{SpiffeId: args[0]})
		if err != nil {
			return theCA.failed(err)
		}
		err = c.show(r, func(p *page) {
			if r.GetWasDenied() {
				p.line("%s is no longer denied; agents ask for it again by themselves", args[0])
			} else {
				p.line("%s was not denied; `certctl denials list` shows what is", args[0])
			}
		})
		if err == nil && !r.GetWasDenied() {
			return negative
		}
		return err
	}
	return cmd
}

func (c *cli) denialsCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "denials", Short: "List what operators have denied"}
	cmd.RunE = c.group(cmd)
	cmd.AddCommand(&cobra.Command{
		Use: "list", Short: "List denied SPIFFE IDs", Args: args(0, 0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.caOnly(cmd); err != nil {
				return err
			}
			ctx, cancel := c.within(cmd)
			defer cancel()
			conn, err := c.openCA(ctx)
			if err != nil {
				return err
			}
			defer conn.Close()
			r, err := conn.CA.ListDenials(ctx, &meshcav1.ListDenialsRequest{})
			if err != nil {
				return theCA.failed(err)
			}
			return c.show(r, func(p *page) {
				if len(r.GetDenials()) == 0 {
					p.line("nothing is denied")
					return
				}
				var rows [][]cell
				for _, d := range r.GetDenials() {
					rows = append(rows, []cell{text(d.GetSpiffeId()), p.when(d.GetSince()), text(d.GetBy()), text(d.GetWhy())})
				}
				p.table([]string{"SPIFFE ID", "DENIED", "BY", "WHY"}, rows)
			})
		},
	})
	return cmd
}

func (c *cli) renewCommand() *cobra.Command {
	var all bool
	var spread time.Duration
	cmd := &cobra.Command{
		Use: "renew ID | --all", Short: "Order agents to renew what they hold", Args: args(0, 1, "one SPIFFE ID, or --all"),
		Long: `Orders agents to renew what was issued before now, for one SPIFFE ID or all, evenly spread over a while so that
the CA is not asked for everything at once. Agents that are away get the order when they come back.`,
		Example: `  certctl svid renew spiffe://mesh.example/ns/shop/sa/cart --spread 0s
  certctl svid renew --all --spread 1h`,
		ValidArgsFunction: c.completeIDs,
	}
	cmd.Flags().BoolVar(&all, "all", false, "every SVID")
	cmd.Flags().DurationVar(&spread, "spread", 10*time.Minute, "spread renewals evenly over this `time`; 0s: at once")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		if all == (len(args) == 1) {
			return usage("renew takes one SPIFFE ID or --all")
		}
		r := &meshcav1.RenewSVIDsRequest{Spread: durationpb.New(spread)}
		if len(args) == 1 {
			if args[0] == "" {
				return usage("the SPIFFE ID is empty; --all renews everything")
			}
			r.SpiffeId = args[0]
		}
		ctx, cancel := c.within(cmd)
		defer cancel()
		conn, err := c.openCA(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		ordered, err := conn.CA.RenewSVIDs(ctx, r)
		if err != nil {
			return theCA.failed(err)
		}
		return c.show(ordered, func(p *page) {
			what := r.GetSpiffeId()
			if what == "" {
				what = "all SVIDs"
			}
			over := "at once"
			if spread > 0 {
				over = "spread over " + spell(spread)
			}
			p.line("%s issued before %s will be renewed, %s", what, absolute(ordered.GetOrder().GetIssuedBefore().AsTime()), over)
			p.line("%s the order now; others get it when they come back", plural(ordered.GetAgentsConnected(), "connected agent has", "connected agents have"))
		})
	}
	return cmd
}
