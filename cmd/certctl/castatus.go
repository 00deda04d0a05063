package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

func (c *cli) caStatusCommand() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use: "status [--watch]", Short: "Roots, candidates, the rollout and what it waits for", Args: args(0, 0, "no arguments"),
		Long: `Shows the roots of the trust bundle and what signs below them, the upstream's issuers that could follow, the rollout
of a root, and what its step waits for, and for how long at most.

With --watch it follows the rollout that is under way until that is over: exit code 0 when it ended with the new root, 1
when it was aborted. On a terminal it is one page; else it is a line for each change, and with -o json or yaml a document
for each. To end the view does not touch the rollout.`,
	}
	cmd.Flags().BoolVar(&watch, "watch", false, "follow the rollout until it is over")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := c.caOnly(cmd); err != nil {
			return err
		}
		ctx, cancel := c.within(cmd)
		defer cancel()
		a, err := c.authorities(ctx)
		if err != nil {
			return err
		}
		if watch && a.GetRollout().GetActive() {
			return c.follow(cmd.Context(), a.GetRollout(), a, a.GetRollout().GetAborted() && a.GetRollout().GetWithin() != nil)
		}
		return c.show(a, func(p *page) {
			drawAuthoritiesPage(p, a)
			if watch {
				p.gap()
				p.line("no rollout is under way: there is nothing to watch")
			}
		})
	}
	return cmd
}

// drawAuthoritiesPage shows everything, what is under way first: that is what people come for.
func drawAuthoritiesPage(p *page, a *meshcav1.GetAuthoritiesResponse) {
	if r := a.GetRollout(); r != nil {
		drawRollout(p, a)
	}
	drawConfirmations(p, a)
	p.gap()
	p.line("Trust bundle, sequence %d", a.GetBundleSequence())
	drawRoots(p, a.GetRoots())
	drawCandidates(p, a)
}

func drawRoots(p *page, roots []*meshcav1.RootStatus) {
	var rows [][]cell
	for _, r := range roots {
		state := text(r.GetState())
		if strings.HasPrefix(r.GetState(), "signing") {
			state.tone = good
		}
		if r.GetTainted() != nil {
			state = textf("%s, tainted", state.text).as(bad)
		}
		row := []cell{
			text(shortID(r.GetId())), text(r.GetSubject()), state, p.ends(r.GetNotBefore(), r.GetNotAfter()), textf("%d", r.GetLiveSvids()), p.when(r.GetLastEnd()), {}, {}, {},
		}
		if r.GetIssuer() != r.GetId() { // roots on disk have no other name
			row[8] = text(r.GetIssuer())
		}
		if i := r.GetIntermediate(); i != nil {
			row[6], row[7] = p.when(i.GetNotAfter()), text(i.GetLastError()).as(bad)
			if i.GetNotAfter() == nil {
				row[6] = text("none yet").as(bad)
			}
		}
		rows = append(rows, row)
	}
	if len(rows) > 0 {
		p.table([]string{"ROOT", "SUBJECT", "STATE", "ENDS", "LIVE SVIDS", "THE LAST ENDS", "INTERMEDIATE ENDS", "ITS LAST ERROR", "ISSUER"}, rows)
	}
}

func drawCandidates(p *page, a *meshcav1.GetAuthoritiesResponse) {
	if e := a.GetUpstreamError(); e != "" {
		p.gap()
		p.pairs(pair{"upstream", textf("could not be asked for its issuers: %s", e).as(bad)}, goesOn(p, a))
	}
	var rows [][]cell
	usable := false
	for _, c := range a.GetCandidates() {
		fault := c.GetFault()
		usable = usable || fault == ""
		rows = append(rows, []cell{text(c.GetRef()), text(c.GetName()), text(shortID(c.GetRoot())), p.when(c.GetNotAfter()), text(fault).as(bad)})
	}
	if n := a.GetIssuersLeftOut(); n > 0 {
		p.gap()
		p.line("the upstream has %s, which are not shown; `certctl ca rotate root --issuer` takes them all the same, by reference or name", plural(int(n), "more issuer", "more issuers"))
	}
	if len(rows) == 0 {
		return
	}
	p.gap()
	p.table([]string{"CANDIDATE", "NAME", "ROOT", "ENDS", "CANNOT BE USED"}, rows)
	if usable {
		p.line("not trusted; `certctl ca rotate root --issuer CANDIDATE` goes to one")
	}
}

// goesOn is how long the CA can do without its upstream.
func goesOn(p *page, a *meshcav1.GetAuthoritiesResponse) pair {
	if a.GetIssuesUntil() == nil {
		return pair{"issuance", text("stands still: no intermediate lives long enough").as(bad)}
	}
	c := p.when(a.GetIssuesUntil())
	c.text = "goes on without it, and ends " + c.text
	return pair{"issuance", c.as(doubtful)}
}

// drawRollout tells where the rollout stands, and what keeps it there.
func drawRollout(p *page, a *meshcav1.GetAuthoritiesResponse) {
	r := a.GetRollout()
	state := "under way"
	switch {
	case !r.GetActive() && r.GetAborted():
		state = "over: it was aborted"
	case !r.GetActive():
		state = "over"
	case r.GetAborted():
		state = "being aborted"
	}
	p.line("Rollout from root %s to %s, %s", shortID(r.GetOldRoot()), shortID(r.GetNewRoot()), state)
	list := []pair{
		{"step", textf("%s, since %s", r.GetStep(), p.since(r.GetEntered().AsTime()))},
		{"that is", text(stepSays(r))},
		{"begun", textf("%s, by %s", p.when(r.GetBegun()).text, r.GetBy())},
		{"passed", text(passedSays(r))},
	}
	if r.GetAborted() {
		list = append(list, pair{"aborted by", text(r.GetAbortedBy())})
	}
	if r.GetActive() {
		list = append(list, pair{"share", shareSays(r)})
	}
	if r.GetWithin() != nil {
		list = append(list, pair{"emergency", textf("root %s is tainted, and leaves within %s", shortID(goes(r)), spell(r.GetWithin().AsDuration()))})
	}
	for _, id := range r.GetBehind() {
		list = append(list, pair{"leaves too", textf("root %s", shortID(id))})
	}
	if len(r.GetDespite()) > 0 {
		list = append(list, pair{"given up", text(strings.Join(r.GetDespite(), ", ")).as(doubtful)})
	}
	if r.GetActive() {
		list = append(list, pair{"waits for", text(waitsSay(r.GetWaits())).as(doubtful)}, pair{"at most", atMost(p, a)})
	}
	p.pairs(append(list, pair{"last try", failedSays(r)})...)
}

// passedSays names the steps that are over; -o json has their times.
func passedSays(r *meshcav1.RolloutStatus) string {
	var all []string
	for _, x := range r.GetPassed() {
		all = append(all, x.GetStep())
	}
	return strings.Join(all, ", ")
}

func failedSays(r *meshcav1.RolloutStatus) cell {
	if r.GetError() == "" {
		return cell{}
	}
	return textf("failed, and is tried again: %s", r.GetError()).as(bad)
}

func shareSays(r *meshcav1.RolloutStatus) cell {
	switch {
	case r.GetNewShare() > 0:
		return textf("the new root signs for %d %% of the identities", r.GetNewShare())
	case r.GetCanary() > 0 && !r.GetAborted():
		return textf("the new root signs for nobody yet, and first for %d %% of the identities", r.GetCanary())
	}
	return text("the new root signs for nobody")
}

// since is how long ago a moment is, and the moment.
func (p *page) since(t time.Time) string {
	return fmt.Sprintf("%s (%s)", spell(max(p.now.Sub(t), 0)), absolute(t))
}

// waitsShown bounds how many names a line has.
const waitsShown = 5

// waitsSay names what is waited for in one line.
func waitsSay(waits []string) string {
	var names []string
	agents, readers := 0, 0
	for _, w := range waits {
		switch {
		case strings.HasPrefix(w, "spiffe://"):
			agents++
		case strings.HasPrefix(w, "reader "):
			readers++
		}
		if len(names) < waitsShown {
			names = append(names, w)
		}
	}
	line := strings.Join(names, ", ")
	if more := len(waits) - len(names); more > 0 {
		line += fmt.Sprintf(" and %d more", more)
	}
	var counts []string
	if agents > 0 {
		counts = append(counts, plural(agents, "agent", "agents"))
	}
	if readers > 0 {
		counts = append(counts, plural(readers, "reader", "readers"))
	}
	if len(counts) > 0 {
		line = strings.Join(counts, " and ") + ": " + line
	}
	return line
}

// atMost tells how long a step can take.
func atMost(p *page, a *meshcav1.GetAuthoritiesResponse) cell {
	r := a.GetRollout()
	switch {
	case r.GetUntil() != nil:
		return p.when(r.GetUntil())
	case r.GetStep() == "canary":
		return text("no bound: `certctl ca continue` has the new root sign for all, `certctl ca abort` goes back")
	case r.GetStep() != "published" && r.GetError() != "":
		return textf("no bound: it is tried until it succeeds; %s", wayOut(r))
	case r.GetStep() != "published" || len(r.GetWaits()) == 0:
		return cell{}
	}
	var last time.Time
	var agents, readers string // what the wait for them is
	for _, w := range r.GetWaits() {
		agent, reader := confirmation(a, w), readerOf(a, w)
		switch {
		case reader != nil && reader.GetUntil() == nil:
			return text("no bound while the CA cannot bring it to a reader: see why below; `certctl ca continue --despite READER` gives it up, `certctl ca abort` goes back")
		case reader != nil:
			last, readers = latest(last, reader.GetUntil().AsTime()), "a reader cannot confirm: its refresh time is waited out, and then it has the trust bundle"
		case agent == nil || agent.GetConnected():
			// It may renew for ever, and so count for ever.
			return text("no bound while an agent is connected and does not confirm: `certctl ca continue --despite AGENT` gives it up, `certctl ca abort` goes back")
		default:
			last = latest(last, agent.GetCountsUntil().AsTime())
			agents = "who is silent then counts no more, for all below it has ended; who comes back before gets the trust bundle first"
		}
	}
	c := p.moment(last)
	c.text += ": " + strings.Join(slices.DeleteFunc([]string{agents, readers}, func(s string) bool { return s == "" }), "; ")
	return c
}

// wayOut says what leads out of a step that fails.
func wayOut(r *meshcav1.RolloutStatus) string {
	switch {
	case r.GetWithin() != nil:
		return fmt.Sprintf("from a root that is tainted there is no way back: `certctl ca taint root %s` goes to another one", shortID(stays(r)))
	case r.GetAborted() && r.GetStep() == "confirmed" && r.GetNewShare() > 0:
		return "`certctl ca continue` turns it forward again"
	case r.GetAborted():
		return "it is being aborted, which needs no order"
	}
	return "`certctl ca abort` goes back"
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func confirmation(a *meshcav1.GetAuthoritiesResponse, name string) *meshcav1.AgentConfirmation {
	i := slices.IndexFunc(a.GetAgents(), func(c *meshcav1.AgentConfirmation) bool { return c.GetSpiffeId() == name })
	if i < 0 {
		return nil
	}
	return a.GetAgents()[i]
}

func readerOf(a *meshcav1.GetAuthoritiesResponse, name string) *meshcav1.ReaderConfirmation {
	i := slices.IndexFunc(a.GetReaders(), func(c *meshcav1.ReaderConfirmation) bool { return "reader "+c.GetName() == name })
	if i < 0 {
		return nil
	}
	return a.GetReaders()[i]
}

// drawConfirmations shows who has which bundle, first those that are waited for.
func drawConfirmations(p *page, a *meshcav1.GetAuthoritiesResponse) {
	r := a.GetRollout()
	awaited := func(name string) bool { return r.GetStep() == "published" && slices.Contains(r.GetWaits(), name) }
	agents := slices.Clone(a.GetAgents())
	slices.SortStableFunc(agents, func(x, y *meshcav1.AgentConfirmation) int {
		switch wx, wy := awaited(x.GetSpiffeId()), awaited(y.GetSpiffeId()); {
		case wx && !wy:
			return -1
		case wy && !wx:
			return 1
		}
		return 0
	})
	var rows [][]cell
	for _, c := range agents[:min(len(agents), agentsShown)] {
		has, is, needs := textf("%d", c.GetAckedBundleSequence()), text("connected").as(good), cell{}
		if !c.GetConnected() {
			is = textf("silent since %s", p.since(c.GetLastSeen().AsTime())).as(doubtful)
		}
		switch {
		case awaited(c.GetSpiffeId()):
			needs = textf("%d", r.GetBundleSequence()).as(doubtful)
		case r.GetActive() && slices.Contains(r.GetDespite(), c.GetSpiffeId()):
			needs = text("given up")
		}
		rows = append(rows, []cell{text(c.GetSpiffeId()), has, needs, is, p.when(c.GetCountsUntil()), text(rejectionsSay(c.GetRejections())).as(bad)})
	}
	for _, x := range a.GetReaders() {
		if awaited("reader " + x.GetName()) {
			rows = append(rows, []cell{text("reader " + x.GetName()), {}, textf("%d", r.GetBundleSequence()).as(doubtful),
				textf("cannot confirm: is given %s", spell(x.GetRefresh().AsDuration())), p.when(x.GetUntil()), text(x.GetFault()).as(bad)})
		}
	}
	if len(rows) == 0 {
		return
	}
	p.gap()
	p.table([]string{"AGENT", "HAS BUNDLE", "NEEDS", "IS", "COUNTS UNTIL", "REJECTIONS"}, rows)
	if more := len(agents) - agentsShown; more > 0 {
		p.line("... and %d more agents: -o json has all", more)
	}
}

func rejectionsSay(list []string) string {
	const most = 3
	if more := len(list) - most; more > 0 {
		return strings.Join(list[:most], "; ") + fmt.Sprintf("; and %d more", more)
	}
	return strings.Join(list, "; ")
}

// rolloutSays is the rollout in a line; empty when none is under way.
func rolloutSays(p *page, r *meshcav1.RolloutStatus) cell {
	if !r.GetActive() {
		return cell{}
	}
	c := textf("%s since %s: %s", r.GetStep(), spell(max(p.now.Sub(r.GetEntered().AsTime()), 0)), stepSays(r)).as(doubtful)
	if len(r.GetWaits()) > 0 {
		c.text += "; it waits for " + waitsSay(r.GetWaits())
	}
	if r.GetError() != "" {
		c.text, c.tone = c.text+"; its last try failed: "+r.GetError(), bad
	}
	return c
}
