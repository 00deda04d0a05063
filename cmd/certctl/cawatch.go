package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

const (
	// watchEvery is how often the CA is asked: it reads its ledger for an answer.
	watchEvery = 2 * time.Second
	// watchPatience is how long a CA that has answered before may be silent: it is being restarted.
	watchPatience = 5 * time.Minute
)

// watch follows one rollout until it is over. To end it changes nothing: the CA moves rollouts by itself.
type watch struct {
	c   *cli
	ask func(context.Context) (*meshcav1.GetAuthoritiesResponse, error)
	// rollout is the one to follow, as it was last seen.
	rollout *meshcav1.RolloutStatus
	every   time.Duration
	// told is the last line, or document, without its time: the same is not told twice.
	told string
	// drawn is whether the page was drawn.
	drawn bool
	// back: it was turned round by a taint, and to end so is what is wanted.
	back bool
	// steps is how many steps of the rollout have a line.
	steps int
}

// follow watches a rollout through the CA's socket. first is the answer that it was seen in; nil: there is none yet. back
// is the watch's.
func (c *cli) follow(ctx context.Context, r *meshcav1.RolloutStatus, first *meshcav1.GetAuthoritiesResponse, back bool) error {
	w := &watch{c: c, rollout: r, back: back, every: cmp.Or(c.every, watchEvery), ask: func(ctx context.Context) (*meshcav1.GetAuthoritiesResponse, error) {
		if a := first; a != nil {
			first = nil
			return a, nil
		}
		ctx, cancel := context.WithTimeout(ctx, c.timeout)
		defer cancel()
		return c.authorities(ctx)
	}}
	return w.run(ctx)
}

// run returns nil when the rollout ended with the new root.
func (w *watch) run(ctx context.Context) error {
	var silent time.Time // since when the CA does not answer
	for {
		a, err := w.ask(ctx)
		switch {
		case ctx.Err() != nil:
			return w.interrupted()
		case err != nil:
			if silent.IsZero() {
				silent = w.c.now()
			}
			if w.c.now().Sub(silent) >= watchPatience {
				return w.lost(err)
			}
			err = w.showSilence(silent, err)
		default:
			silent = time.Time{}
			if !w.same(a.GetRollout()) {
				return w.gone(a.GetRollout())
			}
			if err = w.show(a); err == nil && !a.GetRollout().GetActive() {
				return w.ended(a)
			}
		}
		if err != nil {
			return err // the output cannot be written: nobody watches
		}
		select {
		case <-ctx.Done():
			return w.interrupted()
		case <-time.After(w.every):
		}
	}
}

// same reports whether r is the rollout that is followed.
func (w *watch) same(r *meshcav1.RolloutStatus) bool {
	return r != nil && r.GetNewRoot() == w.rollout.GetNewRoot() && r.GetBegun().AsTime().Equal(w.rollout.GetBegun().AsTime())
}

// show tells what has changed, in the form that was asked for.
func (w *watch) show(a *meshcav1.GetAuthoritiesResponse) error {
	w.rollout = a.GetRollout()
	switch {
	case w.c.format != formatTable:
		return w.document(a.GetRollout())
	case w.c.screen():
		return w.page(func(p *page) {
			drawAuthoritiesPage(p, a)
			if a.GetRollout().GetActive() {
				p.gap()
				p.line("Ctrl-C ends this view, and not the rollout")
			}
		})
	}
	if err := w.passed(a.GetRollout()); err != nil {
		return err
	}
	return w.line(lineSays(a))
}

// passed tells of the steps that came and went since the CA was last asked, each with the time when it came.
func (w *watch) passed(r *meshcav1.RolloutStatus) error {
	for i, x := range r.GetPassed() {
		if i < w.steps {
			continue
		}
		if _, err := fmt.Fprintf(w.c.out, "%s %s\n", absolute(x.GetEntered().AsTime()), plain(passageSays(r, x))); err != nil {
			return err
		}
	}
	w.steps = len(r.GetPassed()) + 1
	return nil
}

func (w *watch) showSilence(since time.Time, err error) error {
	var f *failure
	why := err.Error()
	if errors.As(err, &f) {
		why = join(f.what, f.why)
	}
	if w.c.format == formatTable && w.c.screen() {
		return w.page(func(p *page) {
			p.line("The CA does not answer since %s", p.since(since))
			p.pairs(pair{"because", text(why).as(bad)}, pair{"last seen", rolloutSays(p, w.rollout)})
			p.gap()
			p.line("It is asked again and again; a rollout goes on when its CA is back.")
		})
	}
	if w.told != why {
		w.told = why
		fmt.Fprintln(w.c.err, "certctl:", plain(why)+"; it is asked again")
	}
	return nil
}

// lineSays is a change for people who read a log.
func lineSays(a *meshcav1.GetAuthoritiesResponse) string {
	r := a.GetRollout()
	line := inStep(r, stepSays(r))
	var waits []string
	for _, name := range r.GetWaits() {
		if agent := confirmation(a, name); agent != nil && r.GetStep() == "published" {
			name = fmt.Sprintf("%s (%s)", name, hasSays(agent))
		}
		waits = append(waits, name)
	}
	if len(waits) > 0 {
		line += "; it waits for " + waitsSay(waits)
	}
	if r.GetUntil() != nil {
		line += ", until " + absolute(r.GetUntil().AsTime()) + " at most"
	}
	if r.GetError() != "" {
		line += "; its last try failed: " + r.GetError()
	}
	return line
}

func hasSays(c *meshcav1.AgentConfirmation) string {
	says := fmt.Sprintf("has bundle %d, connected", c.GetAckedBundleSequence())
	if !c.GetConnected() {
		says = fmt.Sprintf("has bundle %d, silent since %s", c.GetAckedBundleSequence(), absolute(c.GetLastSeen().AsTime()))
	}
	if n := len(c.GetRejections()); n > 0 {
		says += ", rejected: " + rejectionsSay(c.GetRejections())
	}
	return says
}

func (w *watch) line(says string) error {
	if says == w.told {
		return nil
	}
	w.told = says
	_, err := fmt.Fprintf(w.c.out, "%s %s\n", absolute(w.c.now()), plain(says))
	return err
}

// document writes the rollout for programs: a line of JSON, or a document of YAML.
func (w *watch) document(r *meshcav1.RolloutStatus) error {
	b, err := encode(r)
	if err != nil || string(b) == w.told {
		return err
	}
	w.told = string(b)
	var out bytes.Buffer
	if w.c.format == formatYAML {
		if b, err = yaml.JSONToYAML(b); err != nil {
			return err
		}
		out.WriteString("---\n")
		out.Write(b)
	} else {
		if err := json.Compact(&out, b); err != nil {
			return err
		}
		out.WriteByte('\n')
	}
	_, err = w.c.out.Write(out.Bytes())
	return err
}

// Control sequences of terminals (ECMA-48, and DEC's for lines that do not wrap).
const (
	clearAll  = "\x1b[2J"
	topLeft   = "\x1b[H"
	clearLine = "\x1b[K"
	clearDown = "\x1b[J"
	wrapOff   = "\x1b[?7l"
	wrapOn    = "\x1b[?7h"
)

// page draws one page over the last one. Each is written at once and leaves the terminal as it was, so that whoever ends
// the view at any moment has a terminal that works.
func (w *watch) page(draw func(*page)) error {
	p := &page{now: w.c.now(), colour: w.c.colour}
	draw(p)
	lines := strings.Split(strings.TrimSuffix(string(p.bytes()), "\n"), "\n")
	if rows := w.c.rows(); len(lines) > rows-2 { // one for the cursor, one for what comes last
		footer := lines[len(lines)-1]
		lines = append(slices.Clip(lines[:max(rows-4, 1)]), "...", footer)
	}
	var out strings.Builder
	if !w.drawn {
		out.WriteString(clearAll)
		w.drawn = true
	}
	out.WriteString(wrapOff + topLeft)
	for _, l := range lines {
		out.WriteString(l + clearLine + "\n")
	}
	out.WriteString(clearDown + wrapOn)
	_, err := w.c.out.Write([]byte(out.String()))
	return err
}

// interrupted is the end by Ctrl-C, or by a signal.
func (w *watch) interrupted() error {
	fmt.Fprintln(w.c.err, "certctl: the rollout goes on without this view: `certctl ca status --watch` shows it again, `certctl ca abort` goes back")
	return negative
}

func (w *watch) lost(err error) error {
	var f *failure
	if !errors.As(err, &f) {
		f = &failure{what: err.Error()}
	}
	return &failure{code: exitUnreachable, what: fmt.Sprintf("the CA has not answered for %s", spell(watchPatience)), why: join(f.what, f.why),
		next: "The rollout goes on when it is back: `certctl ca status --watch` shows it again"}
}

// gone is the end when the CA knows of another rollout, or of none.
func (w *watch) gone(now *meshcav1.RolloutStatus) error {
	f := &failure{code: exitNo, what: fmt.Sprintf("the CA knows nothing any more of the rollout to root %s", shortID(w.rollout.GetNewRoot())), next: "`certctl ca status` shows what there is; the audit log has what became of it"}
	if now != nil {
		f.why = fmt.Sprintf("there is another one, to root %s, begun at %s by %s", shortID(now.GetNewRoot()), absolute(now.GetBegun().AsTime()), now.GetBy())
	}
	return f
}

// ended is the end of the rollout, with what is left of it for people to do.
func (w *watch) ended(a *meshcav1.GetAuthoritiesResponse) error {
	r := a.GetRollout()
	if r.GetAborted() && !w.back {
		return no(fmt.Sprintf("the rollout was aborted by %s", r.GetAbortedBy()), errors.New(stepSays(r)), "")
	}
	if w.c.format != formatTable {
		return nil
	}
	p := &page{now: w.c.now(), colour: w.c.colour}
	if w.c.screen() {
		p.line("Done: %s", stepSays(r))
	}
	if behind := leftBehind(a); len(behind) > 0 {
		p.line("Left behind, as they have not confirmed: %s. What runs there refuses the others, and is refused, until it has the new root: "+
			"bring the CA's bundle file to those nodes; `certctl check` there says what else keeps them", waitsSay(behind))
	}
	_, err := w.c.out.Write(p.bytes())
	return err
}

// leftBehind are the agents that count and have not the bundle that they had to confirm.
func leftBehind(a *meshcav1.GetAuthoritiesResponse) []string {
	var names []string
	if a.GetRollout().GetAborted() {
		return nil // what they had to confirm is out
	}
	for _, c := range a.GetAgents() {
		if c.GetAckedBundleSequence() < a.GetRollout().GetBundleSequence() {
			names = append(names, c.GetSpiffeId())
		}
	}
	return names
}
