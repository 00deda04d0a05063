package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// reason is a refusal's reason as it is shown.
type reason struct {
	Reason string `json:"reason"`
	// Code is the gRPC status code's name.
	Code string `json:"code"`
	// Passing: the same request can succeed later without anyone changing anything.
	Passing bool   `json:"passing"`
	What    string `json:"what"`
	Do      string `json:"do"`
}

func (c *cli) explainCommand() *cobra.Command {
	var limit uint32
	cmd := &cobra.Command{
		Use: "explain [REASON | ID | pod NAMESPACE/NAME]", Short: "What a refusal means, and why someone was refused", Args: args(0, 2, "a reason, a SPIFFE ID, or pod NAMESPACE/NAME"),
		Long: `With a reason such as TOKEN_AUDIENCE: what it means and what to do. With a SPIFFE ID or a pod: what the CA decided
about it lately, the rule, the claim it turned on, and what to change. With --agent: what each workload of
this node was last refused for. Without an argument: all reasons.`,
		Example: `  certctl explain pod-not-on-node
  certctl explain pod payments/api-7c5
  certctl explain --agent`,
		ValidArgsFunction: c.completeExplain,
	}
	cmd.Flags().Uint32Var(&limit, "limit", 20, "at most this many decisions")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, cancel := c.within(cmd)
		defer cancel()
		switch {
		case c.agentSet:
			return c.explainAgent(ctx, cmd, args)
		case len(args) == 0:
			return c.explainAll()
		case args[0] == "pod":
			if len(args) != 2 {
				return usage("name the pod: explain pod NAMESPACE/NAME")
			}
			return c.explainPod(ctx, args[1], limit)
		case len(args) == 2:
			return usage("explain takes one reason or SPIFFE ID, or pod NAMESPACE/NAME")
		case strings.HasPrefix(args[0], "spiffe://"):
			return c.explainDecisions(ctx, args[0], &meshcav1.ExplainRequest{Limit: limit, About: &meshcav1.ExplainRequest_SpiffeId{SpiffeId: args[0]}})
		case strings.Contains(args[0], "/"): // as kubectl writes a pod with its namespace
			return c.explainPod(ctx, args[0], limit)
		}
		return c.explainReason(args[0])
	}
	return cmd
}

func (c *cli) explainPod(ctx context.Context, pod string, limit uint32) error {
	ns, name, ok := strings.Cut(pod, "/")
	if !ok || ns == "" || name == "" || strings.Contains(name, "/") {
		return usage("%.64q is not NAMESPACE/NAME", pod)
	}
	return c.explainDecisions(ctx, "pod "+pod, &meshcav1.ExplainRequest{Limit: limit, About: &meshcav1.ExplainRequest_Pod{Pod: &meshcav1.PodName{Namespace: ns, Name: name}}})
}

func (c *cli) explainAll() error {
	all := struct {
		Reasons []reason `json:"reasons"`
	}{}
	for _, r := range refusal.All() {
		all.Reasons = append(all.Reasons, describe(r))
	}
	return c.show(all, func(p *page) {
		var rows [][]cell
		for _, r := range all.Reasons {
			rows = append(rows, []cell{text(r.Reason), text(r.Code), text(r.What)})
		}
		p.table([]string{"REASON", "CODE", "MEANING"}, rows)
	})
}

func describe(r refusal.Reason) reason {
	return reason{string(r), r.Code().String(), r.Passing(), r.What(), r.Do()}
}

func (c *cli) explainReason(typed string) error {
	r, err := refusal.Parse(typed)
	if err != nil {
		next := "`certctl explain` lists them all"
		if near := nearest(strings.ToUpper(strings.ReplaceAll(typed, "-", "_"))); near != "" {
			next = "Did you mean " + near + "? " + next
		}
		return no(fmt.Sprintf("%.64q is no refusal's reason, SPIFFE ID or `pod NAMESPACE/NAME`", typed), nil, next)
	}
	d := describe(r)
	return c.show(d, func(p *page) {
		p.line("%s (%s)", d.Reason, d.Code)
		passing := "final: it stays so until something is changed"
		if d.Passing {
			passing = "passing: callers try again by themselves"
		}
		p.pairs(pair{"means", text(d.What)}, pair{"what to do", text(d.Do)}, pair{"kind", text(passing)})
	})
}

// nearest finds a reason that holds what was typed, if there is just one.
func nearest(typed string) string {
	var found []string
	for _, r := range refusal.All() {
		if strings.Contains(string(r), typed) {
			found = append(found, string(r))
		}
	}
	if len(found) == 1 {
		return found[0]
	}
	return ""
}

func (c *cli) explainDecisions(ctx context.Context, about string, r *meshcav1.ExplainRequest) error {
	if r.GetLimit() == 0 {
		return usage("--limit 0 shows nothing")
	}
	conn, err := c.openCA(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	answer, err := conn.CA.Explain(ctx, r)
	if err != nil {
		return theCA.failed(err)
	}
	err = c.show(answer, func(p *page) { drawExplanation(p, about, answer) })
	if err == nil && len(answer.GetDecisions()) == 0 && answer.GetDenial() == nil {
		return negative
	}
	return err
}

func drawExplanation(p *page, about string, r *meshcav1.ExplainResponse) {
	if d := r.GetDenial(); d != nil {
		p.line("%s is denied", d.GetSpiffeId())
		p.pairs(pair{"since", p.when(d.GetSince())}, pair{"by", text(d.GetBy())}, pair{"why", text(d.GetWhy())},
			pair{"what to do", text(advice(refusal.IdentityDenied, d.GetSpiffeId()))})
		p.gap()
	}
	if len(r.GetDecisions()) == 0 {
		p.line("the CA remembers no decision about %s since %s", about, p.when(r.GetSince()).text)
		p.line("if a proxy waits for it: does its agent ask? `certctl explain --agent` on its node says")
		if strings.HasPrefix(about, "spiffe://") {
			p.line("if policy gives its service account another ID, ask by the pod: `certctl explain pod NAMESPACE/NAME`")
		}
		return
	}
	drawDecision(p, about, r.GetDecisions()[0])
	if len(r.GetDecisions()) == 1 {
		return
	}
	p.gap()
	var rows [][]cell
	for _, d := range r.GetDecisions() {
		rows = append(rows, []cell{p.when(d.GetTime()), outcome(d), text(d.GetSpiffeId()), text(d.GetEvidence().GetPod()), text(d.GetEvidence().GetNode()), text(d.GetRule()), text(d.GetMessage())})
	}
	p.table([]string{"WHEN", "OUTCOME", "SPIFFE ID", "POD", "NODE", "RULE", "MESSAGE"}, rows)
}

func outcome(d *meshcav1.Decision) cell {
	if d.GetOutcome() == "issued" {
		return text("issued").as(good)
	}
	return text(d.GetOutcome()).as(bad)
}

// drawDecision shows the newest decision in full.
func drawDecision(p *page, about string, d *meshcav1.Decision) {
	asker := "asked by"
	if d.GetEvent() == "end" {
		asker = "told to" // nobody asked
		p.line("It ended with its cause, %s:", p.when(d.GetTime()).text)
	} else {
		p.line("The last decision, %s:", p.when(d.GetTime()).text)
	}
	e := d.GetEvidence()
	account, found := "", ""
	if e.GetNamespace() != "" {
		account = e.GetNamespace() + "/" + e.GetServiceAccount() + " of cluster " + e.GetCluster()
		if strings.HasPrefix(about, "spiffe://") && d.GetSpiffeId() == "" {
			found = "its service account, whose plain ID this is: it was refused before policy granted one"
		}
	}
	p.pairs(
		pair{"outcome", outcome(d)},
		pair{"because", text(d.GetMessage())},
		pair{"turned on", text(d.GetClaim())},
		pair{"what to do", text(d.GetHint())},
		pair{"found by", text(found)},
		pair{"SPIFFE ID", text(d.GetSpiffeId())},
		pair{"rule", text(d.GetRule())},
		pair{"account", text(account)},
		pair{"pod", text(e.GetPod())},
		pair{"node", text(e.GetNode())},
		pair{asker, text(d.GetCaller())},
		pair{"serial", text(d.GetSerial())},
		pair{"ends", p.when(d.GetNotAfter())},
	)
}
