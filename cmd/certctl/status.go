package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// statuses is the output of `status`; what was not asked is left out.
type statuses struct {
	CA    *message `json:"ca,omitempty"`
	Agent *message `json:"agent,omitempty"`
}

func (c *cli) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "How the CA is, or with --agent the agent", Args: args(0, 0, "no arguments"),
		Long: `Shows the CA's authorities, clusters, policy and agents; with --agent what the agent of this node holds and
how its renewals go. It shows and does not judge: "certctl check" does.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := c.within(cmd)
			defer cancel()
			askCA, askAgent, err := c.asked()
			if err != nil {
				return err
			}
			var ca *meshcav1.GetStatusResponse
			var agent *meshcav1.GetAgentStatusResponse
			var out statuses
			if askCA {
				if ca, err = c.caStatus(ctx); err != nil {
					return err
				}
				out.CA = &message{ca}
			}
			if askAgent {
				if agent, err = c.agentStatus(ctx); err != nil {
					return err
				}
				out.Agent = &message{agent}
			}
			return c.show(out, func(p *page) {
				if ca != nil {
					drawCA(p, ca)
				}
				if agent != nil {
					p.gap()
					drawAgent(p, agent)
				}
			})
		},
	}
}

func (c *cli) caStatus(ctx context.Context) (*meshcav1.GetStatusResponse, error) {
	conn, err := c.openCA(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	s, err := conn.CA.GetStatus(ctx, &meshcav1.GetStatusRequest{})
	if err != nil {
		return nil, theCA.failed(err)
	}
	return s, nil
}

func (c *cli) agentStatus(ctx context.Context) (*meshcav1.GetAgentStatusResponse, error) {
	conn, err := c.openAgent(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	s, err := conn.Agent.GetAgentStatus(ctx, &meshcav1.GetAgentStatusRequest{})
	if err != nil {
		return nil, theAgent.failed(err)
	}
	return s, nil
}

func drawCA(p *page, s *meshcav1.GetStatusResponse) {
	p.line("CA of trust domain %s", s.GetTrustDomain())
	policy := text("no rules: the plain ID for all")
	if n := s.GetPolicy().GetRules(); n > 0 {
		policy = textf("%d rules of %s, loaded %s", n, s.GetPolicy().GetFile(), p.relative(s.GetPolicy().GetLoadedAt().AsTime()))
	}
	list := []pair{
		{"version", text(s.GetVersion())},
		{"ready", yes(s.GetReady())},
	}
	for _, why := range s.GetNotReady() {
		list = append(list, pair{"not ready", text(why).as(bad)})
	}
	for _, what := range s.GetDegraded() {
		list = append(list, pair{"degraded", text(what).as(doubtful)})
	}
	list = append(list,
		pair{"started", p.when(s.GetStartedAt())},
		pair{"bundle", textf("sequence %d", s.GetBundleSequence())},
		pair{"decisions", textf("%d issued, %d refused, %d ended with their cause since the start", s.GetIssued(), s.GetRefused(), s.GetEnded())},
		pair{"ledger", textf("%d entries in %s", s.GetLedgerEntries(), s.GetStore())},
		pair{"policy", policy},
	)
	if e := s.GetPolicy().GetLastError(); e != "" {
		list = append(list, pair{"policy file", text("not in force: " + e).as(bad)})
	}
	if r := rolloutSays(p, s.GetRollout()); r.text != "" {
		list = append(list, pair{"rollout", r}, pair{"", text("`certctl ca status` shows all of it")})
	}
	p.pairs(list...)
	drawAuthorities(p, s)
	drawClusters(p, s)
	drawAgents(p, s)
}

func drawAuthorities(p *page, s *meshcav1.GetStatusResponse) {
	var rows [][]cell
	for _, a := range s.GetAuthorities() {
		subject := a.GetSubject()
		if subject == "" && a.GetKind() == "server" { // SVIDs have none
			subject = "the CA's own SVID"
		}
		rows = append(rows, []cell{
			text(a.GetKind()), text(subject), text(a.GetState()), p.ends(a.GetNotBefore(), a.GetNotAfter()), p.when(a.GetRenewAt()),
			text(a.GetSerial()), text(a.GetLastError()).as(bad),
		})
	}
	if len(rows) > 0 {
		p.gap()
		p.table([]string{"AUTHORITY", "SUBJECT", "STATE", "ENDS", "RENEWS", "SERIAL", "LAST ERROR"}, rows)
	}
}

func drawClusters(p *page, s *meshcav1.GetStatusResponse) {
	var rows [][]cell
	for _, c := range s.GetClusters() {
		skew := cell{}
		if d := c.GetClockSkew(); d != nil {
			skew = textf("%+.1fs", d.AsDuration().Seconds())
		}
		fault := text(c.GetLastError()).as(bad)
		if c.GetLastError() == "" && c.GetWatchFault() != "" {
			fault = text("what ends is noticed at renewals alone: " + c.GetWatchFault()).as(doubtful)
		}
		rows = append(rows, []cell{
			text(c.GetName()), yes(c.GetHealthy()), text(c.GetMode()), text(c.GetLiveness()), skew, text(c.GetIssuer()),
			text(strings.Join(c.GetKeyIds(), " ")), fault,
		})
	}
	if len(rows) > 0 {
		p.gap()
		p.table([]string{"CLUSTER", "HEALTHY", "MODE", "LIVENESS", "CLOCK", "ISSUER", "KEYS", "LAST ERROR"}, rows)
	}
	drawSigners(p, s)
	drawPublished(p, s)
}

// drawSigners shows which requests of clusters' own certificates APIs are answered.
func drawSigners(p *page, s *meshcav1.GetStatusResponse) {
	var rows [][]cell
	for _, c := range s.GetClusters() {
		for _, x := range c.GetSigners() {
			tone := good
			if x.GetState() != "serving" {
				tone = doubtful
			}
			rows = append(rows, []cell{
				text(x.GetApi()), text(c.GetName()), text(x.GetState()).as(tone), text(x.GetVersion()), textf("%d", x.GetPending()), text(x.GetWhy()).as(bad),
			})
		}
	}
	if len(rows) > 0 {
		p.gap()
		p.table([]string{"REQUESTS", "CLUSTER", "STATE", "VERSION", "PENDING", "WHY"}, rows)
	}
}

// drawPublished shows where in clusters the trust bundle is published.
func drawPublished(p *page, s *meshcav1.GetStatusResponse) {
	var rows [][]cell
	for _, c := range s.GetClusters() {
		for _, x := range c.GetPublished() {
			has, fault := textf("%d", x.GetSequence()), text(x.GetFault()).as(bad)
			if x.GetSequence() < s.GetBundleSequence() {
				has.tone = doubtful
			}
			if x.GetNotServed() || x.GetApart() {
				fault.tone = doubtful
			}
			if x.GetApart() {
				has = text("")
			}
			rows = append(rows, []cell{text(x.GetName()), has, p.when(x.GetSince()), fault})
		}
	}
	if len(rows) > 0 {
		p.gap()
		p.table([]string{"PUBLISHED AT", "BUNDLE", "SINCE", "FAULT"}, rows)
	}
}

// agentsShown bounds the table; -o json has all.
const agentsShown = 50

func drawAgents(p *page, s *meshcav1.GetStatusResponse) {
	var rows [][]cell
	for _, a := range s.GetAgents()[:min(len(s.GetAgents()), agentsShown)] {
		acked := textf("%d", a.GetAckedBundleSequence())
		if a.GetAckedBundleSequence() < s.GetBundleSequence() {
			acked.tone = doubtful
		}
		rows = append(rows, []cell{
			text(a.GetNode()), text(a.GetCluster()), yes(a.GetConnected()), p.when(a.GetLastSeen()), acked, text(a.GetVersion()), text(a.GetSpiffeId()),
		})
	}
	if len(rows) == 0 {
		return
	}
	p.gap()
	p.table([]string{"AGENT ON", "CLUSTER", "CONNECTED", "LAST SEEN", "BUNDLE", "VERSION", "SPIFFE ID"}, rows)
	if more := len(s.GetAgents()) - agentsShown; more > 0 {
		p.line("... and %d more agents: -o json has all", more)
	}
}

func drawAgent(p *page, s *meshcav1.GetAgentStatusResponse) {
	p.line("Agent in cluster %s of trust domain %s", s.GetCluster(), s.GetTrustDomain())
	list := []pair{
		{"version", text(s.GetVersion())},
		{"ready", yes(s.GetReady())},
	}
	for _, why := range s.GetNotReady() {
		list = append(list, pair{"not ready", text(why).as(bad)})
	}
	server := textf("%s, connected", s.GetServer()).as(good)
	if !s.GetConnected() {
		server = textf("%s, not connected", s.GetServer()).as(bad)
	}
	list = append(list, pair{"started", p.when(s.GetStartedAt())}, pair{"CA", server})
	if s.GetLastError() != "" {
		last := text(s.GetLastError())
		if s.GetLastErrorAt() != nil {
			last = textf("%s: %s", p.relative(s.GetLastErrorAt().AsTime()), s.GetLastError())
		}
		if !s.GetConnected() {
			last.tone = bad
		}
		list = append(list, pair{"last error", last})
	}
	if d := s.GetClockSkew(); d != nil {
		list = append(list, pair{"CA's clock", textf("%+.1fs", d.AsDuration().Seconds())})
	}
	list = append(list, pair{"bundle", textf("sequence %d", s.GetBundleSequence())})
	if self := s.GetSelf(); self != nil {
		list = append(list, pair{"own SVID", text(self.GetSpiffeId())}, pair{"", p.heldEnds(self)},
			pair{"rotations", textf("%d, the next %s", self.GetRotations(), p.renewal(self))})
	}
	p.pairs(list...)
	drawWorkloads(p, s.GetWorkloads())
	drawDeliveries(p, s.GetDeliveries())
}

// heldEnds is when something held ends, by what is left of it: that runs on the agent's monotonic clock.
func (p *page) heldEnds(h *meshcav1.HeldSVID) cell {
	c := textf("%s left of %s (%s)", spell(h.GetRemaining().AsDuration()), spell(h.GetLife().AsDuration()), absolute(h.GetNotAfter().AsTime()))
	switch left, life := h.GetRemaining().AsDuration(), h.GetLife().AsDuration(); {
	case left <= 0:
		c.text, c.tone = fmt.Sprintf("ended (%s)", absolute(h.GetNotAfter().AsTime())), bad
	case left < life/4:
		c.tone = doubtful
	}
	return c
}

// renewal is when the successor is due.
func (p *page) renewal(h *meshcav1.HeldSVID) string {
	if h.GetRenewAt() == nil {
		return "not planned"
	}
	if at := h.GetRenewAt().AsTime(); at.Before(p.now) {
		return "due " + p.relative(at)
	}
	return p.relative(h.GetRenewAt().AsTime())
}

func drawWorkloads(p *page, all []*meshcav1.WorkloadStatus) {
	var rows [][]cell
	for _, w := range all {
		row := []cell{text(w.GetState()).as(stateTone(w.GetState())), {}, {}, {}, {}, streamsSay(w), {}, text(place(w)), lastTrouble(p, w)}
		row[1] = text(identity(w))
		if h := w.GetSvid(); h != nil {
			row[2], row[3], row[4] = p.heldEnds(h), text(p.renewal(h)), textf("%d", h.GetRotations())
		}
		if w.GetNacks() > 0 {
			row[6] = textf("%d", w.GetNacks())
			if w.GetLastNack() != "" {
				row[6].tone = bad
			}
		}
		rows = append(rows, row)
	}
	if len(rows) > 0 {
		p.gap()
		p.table([]string{"STATE", "SPIFFE ID", "ENDS", "RENEWS", "ROTATIONS", "STREAMS", "NACKS", placeTitle(all), "LAST TROUBLE"}, rows)
	}
}

// streamsSay counts the open streams, and those that are waited for since the agent's start.
func streamsSay(w *meshcav1.WorkloadStatus) cell {
	if n := w.GetAwaitedStreams(); n > 0 {
		return textf("%d, %d to come back", w.GetOpenStreams(), n).as(doubtful)
	}
	return textf("%d", w.GetOpenStreams())
}

// drawDeliveries shows where else than to sockets the agent delivers.
func drawDeliveries(p *page, all []*meshcav1.DeliveryStatus) {
	var rows [][]cell
	for _, d := range all {
		row := []cell{text(d.GetName()), text("not yet"), textf("%d", d.GetBundleSequence()), text(d.GetAfter()), {}, textf("%d", d.GetFailures()), text(d.GetFault()).as(bad)}
		if d.GetWrittenAt() != nil {
			row[1] = text(p.relative(d.GetWrittenAt().AsTime()))
		}
		if d.GetAfterAt() != nil {
			row[4] = text(p.relative(d.GetAfterAt().AsTime()))
		}
		rows = append(rows, row)
	}
	if len(rows) > 0 {
		p.gap()
		p.table([]string{"DELIVERY", "WRITTEN", "BUNDLE", "AFTER A CHANGE", "DONE", "FAILURES", "FAULT"}, rows)
	}
}

// lastTrouble is what is wrong with a workload now; what was mended since is none.
func lastTrouble(p *page, w *meshcav1.WorkloadStatus) cell {
	switch r := refusalOf(w); {
	case r != nil && w.GetNextTry() != nil:
		return textf("%s: %s; next try %s", r.GetReason(), r.GetMessage(), p.relative(w.GetNextTry().AsTime())).as(bad)
	case r != nil:
		return textf("%s: %s", r.GetReason(), r.GetMessage()).as(bad)
	case w.GetLastNack() != "":
		return textf("NACK: %s", w.GetLastNack()).as(bad)
	case w.GetUnknownCount() > 0:
		return textf("not served: %s", unknownNames(w)).as(doubtful)
	}
	return cell{}
}

func stateTone(state string) tone {
	switch state {
	case "fresh":
		return good
	case "pending", "stale":
		return doubtful
	}
	return bad
}
