package main

import (
	"context"
	"fmt"
	"slices"
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
			ns, name, ok := strings.Cut(args[1], "/")
			if !ok || ns == "" || name == "" || strings.Contains(name, "/") {
				return usage("%q is not NAMESPACE/NAME", args[1])
			}
			return c.explainDecisions(ctx, "pod "+args[1], &meshcav1.ExplainRequest{Limit: limit, About: &meshcav1.ExplainRequest_Pod{Pod: &meshcav1.PodName{Namespace: ns, Name: name}}})
		case len(args) == 2:
			return usage("explain takes one reason or SPIFFE ID, or pod NAMESPACE/NAME")
		case strings.HasPrefix(args[0], "spiffe://"):
			return c.explainDecisions(ctx, args[0], &meshcav1.ExplainRequest{Limit: limit, About: &meshcav1.ExplainRequest_SpiffeId{SpiffeId: args[0]}})
		}
		return c.explainReason(args[0])
	}
	return cmd
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
		return no(fmt.Sprintf("%q is no refusal's reason, SPIFFE ID or `pod NAMESPACE/NAME`", typed), nil, next)
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
			pair{"what to do", text(refusal.IdentityDenied.Do())})
		p.gap()
	}
	if len(r.GetDecisions()) == 0 {
		p.line("the CA remembers no decision about %s since %s", about, p.when(r.GetSince()).text)
		p.line("if a proxy waits for it: does its agent ask? `certctl explain --agent` on its node says")
		return
	}
	last := r.GetDecisions()[0]
	drawDecision(p, last)
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
func drawDecision(p *page, d *meshcav1.Decision) {
	p.line("The last decision, %s:", p.when(d.GetTime()).text)
	e := d.GetEvidence()
	account := ""
	if e.GetNamespace() != "" {
		account = e.GetNamespace() + "/" + e.GetServiceAccount() + " of cluster " + e.GetCluster()
	}
	p.pairs(
		pair{"outcome", outcome(d)},
		pair{"because", text(d.GetMessage())},
		pair{"turned on", text(d.GetClaim())},
		pair{"what to do", text(d.GetHint())},
		pair{"SPIFFE ID", text(d.GetSpiffeId())},
		pair{"rule", text(d.GetRule())},
		pair{"account", text(account)},
		pair{"pod", text(e.GetPod())},
		pair{"node", text(e.GetNode())},
		pair{"asked by", text(d.GetCaller())},
		pair{"serial", text(d.GetSerial())},
		pair{"ends", p.when(d.GetNotAfter())},
	)
}

func (c *cli) explainAgent(ctx context.Context, cmd *cobra.Command, args []string) error {
	if c.socketSet || len(args) > 1 || len(args) == 1 && !strings.HasPrefix(args[0], "spiffe://") {
		return &failure{code: exitUsage, what: "with --agent, explain takes a SPIFFE ID or nothing", next: joined(cmd, args) + "See `certctl --help`"}
	}
	s, err := c.agentStatus(ctx)
	if err != nil {
		return err
	}
	workloads := s.GetWorkloads()
	if len(args) == 1 {
		workloads = slices.DeleteFunc(slices.Clone(workloads), func(w *meshcav1.WorkloadStatus) bool { return w.GetSvid().GetSpiffeId() != args[0] })
		if len(workloads) == 0 {
			return no("the agent holds nothing of "+args[0], nil, "It learns an ID by its first SVID: `certctl explain --agent` shows every workload, those that were never answered too")
		}
	}
	out := struct {
		LastError string    `json:"lastError"`
		Workloads []message `json:"workloads"`
	}{LastError: s.GetLastError(), Workloads: []message{}}
	var troubled []*meshcav1.WorkloadStatus
	for _, w := range workloads {
		if len(args) == 1 || w.GetState() != "fresh" || w.GetNacks() > 0 {
			troubled = append(troubled, w)
			out.Workloads = append(out.Workloads, message{w})
		}
	}
	return c.show(out, func(p *page) {
		if s.GetLastError() != "" && !s.GetConnected() {
			p.line("the agent is not connected to the CA: %s", s.GetLastError())
			p.gap()
		}
		if len(troubled) == 0 {
			p.line("all %d workloads of this agent have a fresh SVID, and no proxy has refused one", len(workloads))
		}
		for i, w := range troubled {
			if i > 0 {
				p.gap()
			}
			drawTrouble(p, w)
		}
	})
}

func drawTrouble(p *page, w *meshcav1.WorkloadStatus) {
	p.line("%s", w.GetSocket())
	list := []pair{{"state", text(w.GetState()).as(stateTone(w.GetState()))}, {"SPIFFE ID", text(w.GetSvid().GetSpiffeId())}, {"token file", text(w.GetTokenFile())}}
	if h := w.GetSvid(); h != nil {
		list = append(list, pair{"SVID", p.heldEnds(h)})
	}
	if r := w.GetLastRefusal(); r != nil {
		list = append(list, pair{"refused", text(r.GetReason()).as(bad)}, pair{"because", text(r.GetMessage())},
			pair{"at", p.when(w.GetLastRefusalAt())}, pair{"next try", p.when(w.GetNextTry())},
			pair{"what to do", text(refusal.Reason(r.GetReason()).Do())})
	}
	if w.GetNacks() > 0 {
		list = append(list, pair{"NACKs", textf("%d, the last: %s", w.GetNacks(), w.GetLastNack()).as(bad)})
	}
	p.pairs(list...)
}
