package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// watched runs a watch against answers that follow each other; the last one stays. It runs in a synctest bubble.
type watched struct {
	out, err bytes.Buffer
	asked    []time.Time
	format   string
	rows     int // of a terminal; 0: there is none
	answers  []any
}

// rolled is a rollout in a step.
func rolled(step string, change func(*meshcav1.RolloutStatus)) *meshcav1.GetAuthoritiesResponse {
	r := &meshcav1.RolloutStatus{
		OldRoot: strings.Repeat("aa", 32), NewRoot: strings.Repeat("bb", 32), Step: step, Begun: timestamppb.New(time.Unix(946684800, 0)),
		Entered: timestamppb.New(time.Unix(946684800, 0)), By: "uid 0", Active: step != "out", BundleSequence: 4,
	}
	if change != nil {
		change(r)
	}
	return &meshcav1.GetAuthoritiesResponse{BundleSequence: 4, Rollout: r}
}

func (w *watched) run(ctx context.Context) (took time.Duration, err error) {
	ctx, stop := context.WithTimeout(ctx, 24*time.Hour) // what does not end fails, and does not hang
	defer stop()
	start := time.Now()
	c := &cli{out: &w.out, err: &w.err, now: time.Now, format: w.format}
	if c.format == "" {
		c.format = formatTable
	}
	if w.rows > 0 {
		c.size = func() (int, int, error) { return 80, w.rows, nil }
	}
	x := &watch{c: c, rollout: rolled("chosen", nil).GetRollout(), every: watchEvery}
	x.ask = func(context.Context) (*meshcav1.GetAuthoritiesResponse, error) {
		w.asked = append(w.asked, time.Now())
		next := w.answers[0]
		if len(w.answers) > 1 {
			w.answers = w.answers[1:]
		}
		if err, ok := next.(error); ok {
			return nil, err
		}
		return next.(*meshcav1.GetAuthoritiesResponse), nil
	}
	err = x.run(ctx)
	return time.Since(start), err
}

func codeOf(err error) int {
	var f *failure
	switch {
	case err == nil:
		return exitFine
	case errors.As(err, &f):
		return f.code
	}
	return -1
}

// A line for each change, none for what stays, and then the end.
func TestWatchTellsChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n2 := &meshcav1.AgentConfirmation{SpiffeId: "spiffe://d/n2", AckedBundleSequence: 3, Connected: true}
		published := func(change func(*meshcav1.GetAuthoritiesResponse)) *meshcav1.GetAuthoritiesResponse {
			a := rolled("published", func(r *meshcav1.RolloutStatus) { r.Waits = []string{"spiffe://d/n2"} })
			a.Agents = []*meshcav1.AgentConfirmation{n2}
			if change != nil {
				change(a)
			}
			return a
		}
		rejects := published(func(a *meshcav1.GetAuthoritiesResponse) {
			a.Agents = []*meshcav1.AgentConfirmation{{SpiffeId: "spiffe://d/n2", AckedBundleSequence: 3, Connected: true, Rejections: []string{"/run/x: no"}}}
		})
		fails := published(func(a *meshcav1.GetAuthoritiesResponse) { a.Rollout.Error = "disk full" })
		w := &watched{answers: []any{
			rolled("chosen", nil), published(nil), published(nil), published(nil), rejects, fails,
			rolled("retired", func(r *meshcav1.RolloutStatus) {
				r.LastEnd, r.Until, r.Waits = timestamppb.New(time.Unix(946688400, 0)), timestamppb.New(time.Unix(946688400, 0)), []string{"the last certificate under it to end"}
			}),
			rolled("out", nil),
		}}
		took, err := w.run(t.Context())
		const want = `2000-01-01 00:00:00Z chosen: bbbbbbbbbbbb is chosen, and about to come into the trust bundle
2000-01-01 00:00:02Z published: bbbbbbbbbbbb is in trust bundle 4, and signs for nobody before all who count have that; it waits for 1 agent: spiffe://d/n2 (has bundle 3, connected)
2000-01-01 00:00:08Z published: bbbbbbbbbbbb is in trust bundle 4, and signs for nobody before all who count have that; it waits for 1 agent: spiffe://d/n2 (has bundle 3, connected, rejected: /run/x: no)
2000-01-01 00:00:10Z published: bbbbbbbbbbbb is in trust bundle 4, and signs for nobody before all who count have that; it waits for 1 agent: spiffe://d/n2 (has bundle 3, connected); its last try failed: disk full
2000-01-01 00:00:12Z retired: bbbbbbbbbbbb signs for all; aaaaaaaaaaaa is trusted until the last certificate under it has ended; it waits for the last certificate under it to end, until 2000-01-01 01:00:00Z at most
2000-01-01 00:00:14Z out: bbbbbbbbbbbb signs for all, and aaaaaaaaaaaa has left the trust bundle
`
		if err != nil || w.out.String() != want || w.err.Len() > 0 || took != 14*time.Second {
			t.Errorf("%v after %s, %q, got\n%s", err, took, w.err.String(), w.out.String())
		}
	})
}

// Steps that came and went between two looks have their lines too, with the times when they came.
func TestWatchTellsStepsThatPassed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		at := func(second int64, steps ...string) (all []*meshcav1.RolloutPassage) {
			for i, s := range steps {
				all = append(all, &meshcav1.RolloutPassage{Step: s, Entered: timestamppb.New(time.Unix(946684800+second+int64(i), 0)), Had: &meshcav1.RolloutPassage_Had{BundleSequence: 4}})
			}
			return all
		}
		w := &watched{answers: []any{
			rolled("published", func(r *meshcav1.RolloutStatus) { r.Passed = at(0, "chosen") }),
			rolled("retired", func(r *meshcav1.RolloutStatus) { r.Passed = at(0, "chosen", "published", "confirmed", "signing") }),
			rolled("out", func(r *meshcav1.RolloutStatus) {
				r.Passed = append(at(0, "chosen", "published", "confirmed", "signing"), &meshcav1.RolloutPassage{Step: "retired", Entered: timestamppb.New(time.Unix(946684803, 0)), Aborted: true})
				r.Aborted, r.AbortedBy = true, "uid 7"
			}),
		}}
		_, _ = w.run(t.Context())
		const want = `2000-01-01 00:00:00Z chosen: bbbbbbbbbbbb is chosen, and about to come into the trust bundle
2000-01-01 00:00:00Z published: bbbbbbbbbbbb is in trust bundle 4, and signs for nobody before all who count have that
2000-01-01 00:00:02Z confirmed: all who count trust bbbbbbbbbbbb; it signs as soon as it has an intermediate
2000-01-01 00:00:03Z signing: bbbbbbbbbbbb signs for all; what aaaaaaaaaaaa has begun is being finished
2000-01-01 00:00:02Z retired: bbbbbbbbbbbb signs for all; nothing lives under aaaaaaaaaaaa, and it leaves the trust bundle
2000-01-01 00:00:04Z aborted by uid 7, out: aaaaaaaaaaaa signs for all, and bbbbbbbbbbbb has left the trust bundle
`
		if w.out.String() != want {
			t.Errorf("got\n%s", w.out.String())
		}
	})
}

func TestWatchEnds(t *testing.T) {
	refused := &failure{code: exitNo, what: "the CA could not do it", why: "disk full"}
	away := &failure{code: exitUnreachable, what: "cannot reach the CA", why: "nobody answers"}
	for name, c := range map[string]struct {
		answers []any
		code    int
		says    string
		took    time.Duration
	}{
		"done": {[]any{rolled("out", nil)}, exitFine, "", 0},
		"aborted": {[]any{rolled("canary", nil), rolled("out", func(r *meshcav1.RolloutStatus) { r.Aborted, r.AbortedBy = true, "uid 7" })},
			exitNo, "the rollout was aborted by uid 7: aaaaaaaaaaaa signs for all, and bbbbbbbbbbbb has left the trust bundle", 2 * time.Second},
		"another one": {[]any{rolled("chosen", nil), rolled("canary", func(r *meshcav1.RolloutStatus) { r.Begun = timestamppb.New(time.Unix(946684801, 0)) })},
			exitNo, "knows nothing any more of the rollout to root bbbbbbbbbbbb: there is another one, to root bbbbbbbbbbbb, begun at 2000-01-01 00:00:01Z by uid 0", 2 * time.Second},
		"another root": {[]any{rolled("out", func(r *meshcav1.RolloutStatus) { r.NewRoot = strings.Repeat("cc", 32) })}, exitNo, "there is another one, to root cccccccccccc", 0},
		"restored":     {[]any{&meshcav1.GetAuthoritiesResponse{}}, exitNo, "knows nothing any more of the rollout to root bbbbbbbbbbbb. `certctl ca status`", 0},
		// A CA that is restarted is waited for, and forgotten only behind all patience.
		"restarted":    {[]any{rolled("chosen", nil), away, away, refused, rolled("out", nil)}, exitFine, "", 8 * time.Second},
		"away":         {[]any{rolled("chosen", nil), away}, exitUnreachable, "the CA has not answered for 5m: cannot reach the CA: nobody answers. The rollout goes on when it is back", 2*time.Second + watchPatience},
		"now and then": {append(answersEvery(200, rolled("chosen", nil), away), rolled("out", nil)), exitFine, "", 400 * watchEvery},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &watched{answers: c.answers}
				took, err := w.run(t.Context())
				if codeOf(err) != c.code || (c.says == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.says) || took != c.took {
					t.Errorf("%v after %s", err, took)
				}
			})
		})
	}
}

// answersEvery repeats answers.
func answersEvery(times int, answers ...any) (all []any) {
	for range times {
		all = append(all, answers...)
	}
	return all
}

// What the CA does not answer is told once each time, and by which means it can be seen again.
func TestWatchTellsSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		away := &failure{code: exitUnreachable, what: "cannot reach the CA", why: "nobody \x1b[2Janswers"}
		w := &watched{answers: []any{rolled("chosen", nil), away, away, rolled("chosen", nil), away, rolled("out", nil)}}
		if _, err := w.run(t.Context()); err != nil {
			t.Error(err)
		}
		if got := w.err.String(); strings.Count(got, "nobody \\u{1b}[2Janswers; it is asked again") != 2 {
			t.Errorf("got\n%s", got)
		}
		if got := w.out.String(); strings.Count(got, "chosen: ") != 2 { // that it is back is a change too
			t.Errorf("got\n%s", got)
		}
	})
}

// The end of the view, in a wait and in a call, is not the end of the rollout, and says so.
func TestWatchIsInterrupted(t *testing.T) {
	for name, after := range map[string]time.Duration{"in a wait": watchEvery / 2, "before a call": 2 * watchEvery} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, stop := context.WithTimeout(t.Context(), after)
				defer stop()
				w := &watched{answers: []any{rolled("canary", nil)}}
				took, err := w.run(ctx)
				if codeOf(err) != exitNo || took > after || !strings.Contains(w.err.String(), "the rollout goes on without this view: `certctl ca status --watch` shows it again, `certctl ca abort` goes back") {
					t.Errorf("%v after %s: %s", err, took, w.err.String())
				}
			})
		})
	}
}

// On a terminal it is one page, drawn again over itself, no longer than the terminal, and whole in itself.
func TestWatchOnATerminal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := rolled("published", func(r *meshcav1.RolloutStatus) { r.Within = durationpb.New(time.Minute) })
		for range 100 {
			a.Agents = append(a.Agents, &meshcav1.AgentConfirmation{SpiffeId: "spiffe://d/n", AckedBundleSequence: 3})
		}
		away := &failure{code: exitUnreachable, what: "cannot reach the CA", why: "nobody answers"}
		done := rolled("out", nil)
		done.Agents = a.GetAgents()[:1]
		w := &watched{rows: 24, answers: []any{a, a, away, done}}
		if _, err := w.run(t.Context()); err != nil {
			t.Error(err)
		}
		got := w.out.String()
		if n := strings.Count(got, clearAll); n != 1 || !strings.HasPrefix(got, clearAll) {
			t.Errorf("the screen is cleared %d times", n)
		}
		pages := strings.Split(got, wrapOff+topLeft)[1:]
		if len(pages) != 4 {
			t.Fatalf("%d pages for four answers", len(pages))
		}
		for i, p := range pages {
			body, _, ended := strings.Cut(p, clearDown+wrapOn)
			if lines := strings.Split(strings.TrimSuffix(body, "\n"), "\n"); !ended || len(lines) > 22 {
				t.Errorf("page %d of %d lines, ended: %t", i, len(lines), ended)
			} else if i < 2 && lines[len(lines)-1] != "Ctrl-C ends this view, and not the rollout"+clearLine {
				t.Errorf("the last line of page %d is %q", i, lines[len(lines)-1])
			}
		}
		if !strings.Contains(pages[2], "The CA does not answer since 0s") || !strings.Contains(pages[2], "published since 4s") {
			t.Errorf("while it is silent:\n%s", pages[2])
		}
		if _, last, _ := strings.Cut(pages[3], wrapOn); !strings.HasPrefix(last, "Done: bbbbbbbbbbbb signs for all") || !strings.Contains(last, "Left behind, as they have not confirmed: 1 agent: spiffe://d/n.") {
			t.Errorf("the end:\n%s", last)
		}
		// Between two looks nobody is asked.
		for i, at := range w.asked[1:] {
			if at.Sub(w.asked[i]) != watchEvery {
				t.Errorf("asked after %s", at.Sub(w.asked[i]))
			}
		}
	})
}

// However many lines there are to show, two rows stay free: for the cursor, and for what comes last.
func TestWatchFitsTheTerminal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &watched{rows: 24}
		for n := range 30 {
			a := rolled("published", nil)
			for range n {
				a.Agents = append(a.Agents, &meshcav1.AgentConfirmation{SpiffeId: "spiffe://d/n"})
			}
			w.answers = append(w.answers, a)
		}
		w.answers = append(w.answers, rolled("out", nil))
		if _, err := w.run(t.Context()); err != nil {
			t.Error(err)
		}
		longest := 0
		for _, p := range strings.Split(w.out.String(), wrapOff+topLeft)[1:] {
			body, _, _ := strings.Cut(p, clearDown+wrapOn)
			longest = max(longest, strings.Count(body, "\n"))
		}
		if longest != 22 {
			t.Errorf("the longest page has %d lines on a terminal of 24", longest)
		}
	})
}

// For programs: a document for each change.
func TestWatchForPrograms(t *testing.T) {
	for format, want := range map[string][]string{formatJSON: {`{"oldRoot":"aaaa`, `"step":"chosen"`, `"step":"out"`}, formatYAML: {"---\n", "step: chosen\n", "step: out\n"}} {
		synctest.Test(t, func(t *testing.T) {
			w := &watched{format: format, rows: 24, answers: []any{rolled("chosen", nil), rolled("chosen", nil), rolled("out", nil)}}
			if _, err := w.run(t.Context()); err != nil {
				t.Error(err)
			}
			got := w.out.String()
			for _, x := range want {
				if !strings.Contains(got, x) {
					t.Errorf("%s lacks %q:\n%s", format, x, got)
				}
			}
			if n := strings.Count(got, "chosen"); n != 1 || format == formatJSON && strings.Count(got, "\n") != 2 {
				t.Errorf("%s:\n%s", format, got)
			}
		})
	}
}

// Who closes the pipe ends the watch.
func TestWatchWithoutAReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("broken pipe")
		x := &watch{c: &cli{out: brokenWriter{broken}, err: &bytes.Buffer{}, now: time.Now, format: formatTable}, rollout: rolled("chosen", nil).GetRollout(), every: watchEvery}
		x.ask = func(context.Context) (*meshcav1.GetAuthoritiesResponse, error) { return rolled("chosen", nil), nil }
		if err := x.run(t.Context()); !errors.Is(err, broken) {
			t.Errorf("got %v", err)
		}
	})
}

type brokenWriter struct{ err error }

func (b brokenWriter) Write([]byte) (int, error) { return 0, b.err }

func TestAtMost(t *testing.T) {
	now := time.Unix(946684800, 0)
	at := func(h int) *timestamppb.Timestamp { return timestamppb.New(now.Add(time.Duration(h) * time.Hour)) }
	silent, later := &meshcav1.AgentConfirmation{SpiffeId: "spiffe://d/n2", CountsUntil: at(3)}, &meshcav1.AgentConfirmation{SpiffeId: "spiffe://d/n3", CountsUntil: at(5)}
	connected := &meshcav1.AgentConfirmation{SpiffeId: "spiffe://d/n4", CountsUntil: at(1), Connected: true}
	reader, unwritten := &meshcav1.ReaderConfirmation{Name: "x", Until: at(4)}, &meshcav1.ReaderConfirmation{Name: "y", Fault: "forbidden"}
	for name, c := range map[string]struct {
		step  string
		waits []string
		until *timestamppb.Timestamp
		err   string
		want  string
	}{
		"an end that is known": {"published", []string{"spiffe://d/n4"}, at(2), "", "in 2h (2000-01-01 02:00:00Z)"},
		"the silent ones":      {"published", []string{"spiffe://d/n2", "spiffe://d/n3"}, nil, "", "in 5h (2000-01-01 05:00:00Z): who is silent"},
		"a reader, longest": {"published", []string{"spiffe://d/n2", "reader x"}, nil, "",
			"in 4h (2000-01-01 04:00:00Z): who is silent then counts no more, for all below it has ended; who comes back before gets the trust bundle first; a reader cannot confirm: its refresh time is waited out"},
		"readers alone":         {"published", []string{"reader x"}, nil, "", "in 4h (2000-01-01 04:00:00Z): a reader cannot confirm: its refresh time is waited out, and then it has the trust bundle"},
		"a reader, unreachable": {"published", []string{"spiffe://d/n2", "reader x", "reader y"}, nil, "", "no bound while the CA cannot bring it to a reader"},
		"one that is connected": {"published", []string{"spiffe://d/n2", "spiffe://d/n4"}, nil, "", "no bound while an agent is connected"},
		"one that is not known": {"published", []string{"spiffe://d/n9"}, nil, "", "no bound while an agent is connected"},
		"nobody":                {"published", nil, nil, "", ""},
		"an operator":           {"canary", nil, nil, "", "no bound: `certctl ca continue`"},
		"a success":             {"chosen", nil, nil, "sealed", "no bound: it is tried until it succeeds"},
		"nothing":               {"signing", nil, nil, "", ""},
	} {
		a := rolled(c.step, func(r *meshcav1.RolloutStatus) { r.Waits, r.Until, r.Error = c.waits, c.until, c.err })
		a.Agents, a.Readers = []*meshcav1.AgentConfirmation{silent, later, connected}, []*meshcav1.ReaderConfirmation{reader, unwritten}
		if got := atMost(&page{now: now}, a).text; !strings.HasPrefix(got, c.want) || (c.want == "") != (got == "") {
			t.Errorf("%s: got %q", name, got)
		}
	}
}

// What leads out of a step that fails is a command that the CA takes then.
func TestWayOut(t *testing.T) {
	for want, adjust := range map[string]func(r *meshcav1.RolloutStatus){
		"`certctl ca abort` goes back":                 func(*meshcav1.RolloutStatus) {},
		"`certctl ca continue` turns it forward":       func(r *meshcav1.RolloutStatus) { r.Aborted, r.NewShare = true, 5 },
		"it is being aborted, which needs no order":    func(r *meshcav1.RolloutStatus) { r.Aborted, r.NewShare = true, 0 },
		"`certctl ca taint root " + shortID("b") + "`": func(r *meshcav1.RolloutStatus) { r.Within, r.NewRoot = durationpb.New(time.Minute), "b" },
	} {
		a := rolled("confirmed", func(r *meshcav1.RolloutStatus) { r.Error = "sealed"; adjust(r) })
		if got := atMost(&page{}, a).text; !strings.Contains(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// What the CA cannot bring the bundle to is named with its fault.
func TestAReaderThatIsNotReached(t *testing.T) {
	a := rolled("published", func(r *meshcav1.RolloutStatus) { r.Waits = []string{"reader prod/configmap/x"} })
	a.Readers = []*meshcav1.ReaderConfirmation{{Name: "prod/configmap/x", Fault: "somebody else's"}, {Name: "another", Fault: "not waited for"}}
	p := &page{}
	drawConfirmations(p, a)
	if got := string(p.bytes()); !strings.Contains(got, "reader prod/configmap/x") || !strings.Contains(got, "somebody else's") || strings.Contains(got, "another") {
		t.Errorf("got\n%s", got)
	}
}

func TestMeantWaits(t *testing.T) {
	waits := []string{"spiffe://d/prod/n1", "spiffe://d/lab/n1", "spiffe://d/prod/n2", "reader x"}
	for typed, want := range map[string]string{
		"n2": "spiffe://d/prod/n2", "lab/n1": "spiffe://d/lab/n1", "x": "reader x", "reader x": "reader x", "spiffe://d/prod/n1": "spiffe://d/prod/n1",
		"n1": "n1", "": "", "2": "2", "n9": "n9",
	} {
		if got := meantWaits([]string{typed}, waits); len(got) != 1 || got[0] != want {
			t.Errorf("%q: got %q, want %q", typed, got, want)
		}
	}
}

func TestFindRoot(t *testing.T) {
	f := &facts{start: time.Now()}
	var roots []*x509.Certificate
	for len(roots) < 2 {
		r, err := f.root("root")
		if err != nil {
			t.Fatal(err)
		}
		roots = append(roots, r.cert)
	}
	id := fingerprint(roots[1].Raw)
	var colons []string
	for i := 0; i < len(id); i += 2 {
		colons = append(colons, strings.ToUpper(id[i:i+2]))
	}
	for _, typed := range []string{id, id[:12], strings.Join(colons, ":")} {
		if got, err := findRoot(roots, typed); err != nil || !got.Equal(roots[1]) {
			t.Errorf("%s: %v", typed, err)
		}
	}
	for _, typed := range []string{"", id[:leastID-1], id + "0", "zzzz"} {
		if got, err := findRoot(roots, typed); err == nil || codeOf(err) != exitNo || got != nil || !strings.Contains(err.Error(), id[:12]) {
			t.Errorf("%q: %v", typed, err)
		}
	}
	if got, err := findRoot([]*x509.Certificate{roots[0], roots[0]}, fingerprint(roots[0].Raw)); err == nil || got != nil {
		t.Error("one of two was taken")
	}
}

func TestBrief(t *testing.T) {
	for d, want := range map[time.Duration]string{10 * time.Minute: "10m", 90 * time.Second: "1m30s", time.Hour: "1h", 61 * time.Minute: "1h1m", 20 * time.Second: "20s", 10 * time.Hour: "10h"} {
		if got := brief(d); got != want {
			t.Errorf("%s: got %s", want, got)
		}
		if back, err := time.ParseDuration(brief(d)); err != nil || back != d {
			t.Errorf("%s is read as %s, %v", brief(d), back, err)
		}
	}
}
