package main

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/test/mesh"
)

func TestDue(t *testing.T) {
	for _, c := range []struct {
		elapsed, ttl time.Duration
		want         int64
	}{
		{0, 30 * time.Second, 0},
		{25 * time.Second, 30 * time.Second, 0}, // 22.5 s and the slack are not over
		{26 * time.Second, 30 * time.Second, 1},
		{41 * time.Second, 30 * time.Second, 2},
		{60 * time.Second, 30 * time.Second, 3},
		{60 * time.Second, time.Minute, 1},
		{60 * time.Second, 6 * time.Hour, 0},
	} {
		if got := due(c.elapsed, c.ttl); got != c.want {
			t.Errorf("after %s with SVIDs of %s: %d due, want %d", c.elapsed, c.ttl, got, c.want)
		}
	}
}

func TestResult(t *testing.T) {
	good := result{ok: 3000, rotations: [2]int64{3, 4}, handshakes: 3001, elapsed: time.Minute, ttl: 30 * time.Second}
	for name, c := range map[string]struct {
		spoil func(*result)
		fault string
	}{
		"all well":                  {func(*result) {}, ""},
		"a request failed":          {func(r *result) { r.failed, r.fault = 1, "503" }, "1 requests failed, the last one: 503"},
		"nothing was answered":      {func(r *result) { r.ok = 0 }, "no request was answered"},
		"one side did not rotate":   {func(r *result) { r.rotations[1] = 2 }, "the server rotated 2 times"},
		"nothing was due":           {func(r *result) { r.rotations, r.elapsed = [2]int64{}, 20*time.Second }, ""},
		"connections were kept":     {func(r *result) { r.handshakes = 12 }, "over 12 handshakes"},
		"Envoy refused its secrets": {func(r *result) { r.rejected = 2 }, "Envoy rejected 2 secrets"},
		"it was cut short": {func(r *result) {
			*r = result{ok: 12, rotations: [2]int64{3, 4}, elapsed: time.Minute, ttl: r.ttl, cut: true}
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := good
			c.spoil(&r)
			faults := strings.Join(r.faults(), "\n")
			if (c.fault == "") != (faults == "") || !strings.Contains(faults, c.fault) {
				t.Errorf("faults %q, want %q", faults, c.fault)
			}
			var out strings.Builder
			r.print(&out)
			if !strings.Contains(out.String(), c.fault) {
				t.Errorf("the summary does not tell it:\n%s", out.String())
			}
		})
	}
	var out strings.Builder
	good.print(&out)
	if want := "\nrequests ok=3000 failed=0 rotations=7\n"; !strings.HasSuffix(out.String(), want) {
		t.Errorf("the summary is\n%s\nand its last line is to be%s", out.String(), want)
	}
}

func TestOptions(t *testing.T) {
	fine := options{upstream: upstreamDisk, ttl: 30 * time.Second, rate: 50}
	if err := fine.check(nil); err != nil {
		t.Errorf("%+v: %v", fine, err)
	}
	for name, spoil := range map[string]func(*options){
		"a life that is over before it began": func(o *options) { o.ttl = time.Second },
		"more than meshca issues":             func(o *options) { o.ttl = 7 * time.Hour },
		"a root that is nowhere":              func(o *options) { o.upstream = "tape" },
		"no requests":                         func(o *options) { o.rate = 0 },
		"a negative time":                     func(o *options) { o.runFor = -time.Second },
	} {
		o := fine
		spoil(&o)
		if err := o.check(nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := fine.check([]string{"60s"}); err == nil {
		t.Error("a word that is no flag: no error")
	}
}

// moment is a frame with everything in it.
func moment() frame {
	f := frame{running: 83 * time.Second, ttl: 30 * time.Second, rate: 49.6, ok: 4150, root: "on disk", hints: []string{"certctl svid list", "certctl ca rotate root", "certctl status"}}
	for i, side := range mesh.Sides {
		f.proxies[i] = proxyFrame{
			Reading: mesh.Reading{Identity: "spiffe://demo.test/ns/demo/sa/" + side, Serial: "0123456789abcdef", OK: 4150},
			left:    12 * time.Second, rotations: int64(5 + i),
		}
	}
	return f
}

func TestScreen(t *testing.T) {
	f := moment()
	page := render(f)
	for _, want := range []string{
		"spiffe://demo.test/ns/demo/sa/client", "spiffe://demo.test/ns/demo/sa/server", "0123456789abcdef",
		"[=========               ] 12s", "rotations  5\n", "rotations  6\n", "ok 4150  failed 0\n", "(50 a second)", "running 1m23s", "certctl status", "CA's root  on disk\n",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q:\n%s", want, page)
		}
	}
	if strings.Contains(page, "last fault") {
		t.Errorf("the page tells a fault where none was:\n%s", page)
	}
	f.failed, f.fault, f.proxies[1].trouble = 2, "503 Service Unavailable", "the server's Envoy: gone"
	for _, want := range []string{"failed " + red + "2", "503 Service Unavailable", "the server's Envoy: gone"} {
		if page := render(f); !strings.Contains(page, want) {
			t.Errorf("the page lacks %q:\n%s", want, page)
		}
	}
	var out strings.Builder
	s := newScreen(&out, func() (int, int, error) { return 80, 24, nil })
	s.show(f)
	s.show(f)
	s.close()
	if n := strings.Count(out.String(), home); n != 2 {
		t.Errorf("two frames moved the cursor home %d times", n)
	}
	if strings.Count(out.String(), hideCursor) != 1 || !strings.Contains(out.String(), showCursor) {
		t.Error("the cursor is not hidden once and shown again")
	}
}

// A page that is larger than the terminal would scroll at every frame.
func TestScreenFits(t *testing.T) {
	f := moment()
	f.failed, f.fault = 2, "12:00:00 503 Service Unavailable:\nupstream connect error or disconnect/reset before headers. reset reason: connection termination"
	f.proxies[0].trouble, f.proxies[1].trouble = "the client's Envoy: "+strings.Repeat("gone ", 30), "the server's Envoy: gone"
	f.hints = []string{strings.Repeat("x", 79), strings.Repeat("y", 200)}
	escapes := regexp.MustCompile("\x1b\\[[0-9;?]*[a-zA-Z]")
	for _, size := range [][2]int{{80, 24}, {200, 60}, {40, 10}, {20, 3}, {1, 1}} {
		var out strings.Builder
		newScreen(&out, func() (int, int, error) { return size[0], size[1], nil }).show(f)
		lines := strings.Split(escapes.ReplaceAllString(out.String(), ""), "\r\n")
		if len(lines) > size[1] {
			t.Errorf("%v: %d lines", size, len(lines))
		}
		for _, line := range lines {
			if n := len([]rune(line)); n > size[0] || strings.ContainsAny(line, "\n\r") {
				t.Errorf("%v: %d columns: %q", size, n, line)
			}
		}
		if !strings.HasPrefix(lines[0], "meshca demo"[:min(11, size[0]-1)]) {
			t.Errorf("%v: the first line is %q", size, lines[0])
		}
		if size[1] >= 10 && (!strings.Contains(out.String(), "failed "+red+"2") || !strings.Contains(out.String(), "503 Service")) {
			t.Errorf("%v: the requests and their last fault are cut off:\n%s", size, out.String())
		}
	}
	// What fits is not touched.
	if got := fit(render(moment()), 120, 40); strings.Join(got, "\n")+"\n" != render(moment()) {
		t.Errorf("got %q", got)
	}
	// 80 columns and 24 rows have all of it, while nothing is wrong.
	if got := fit(render(moment()), 120, 24); !strings.Contains(got[len(got)-1], "certctl status") {
		t.Errorf("24 rows end in %q", got[len(got)-1])
	}
}

func TestBar(t *testing.T) {
	for left, want := range map[time.Duration]int{-time.Second: 0, 0: 0, 15 * time.Second: 12, 30 * time.Second: 24, time.Hour: 24} {
		if got := strings.Count(bar(max(0, left), 30*time.Second), "="); got != want {
			t.Errorf("%s of 30s: %d marks, want %d", left, got, want)
		}
	}
}

func TestLines(t *testing.T) {
	var out strings.Builder
	l := &lines{w: &out, every: 5 * time.Second}
	count := func() int { return strings.Count(out.String(), "ok=4150 failed=0  client: serial=01234567 ") }
	f := moment()
	for _, step := range []struct {
		at      time.Duration
		rotated int64
		want    int
	}{
		{1 * time.Second, 5, 1}, // the first at once
		{2 * time.Second, 5, 1},
		{3 * time.Second, 6, 2}, // a rotation at once
		{7 * time.Second, 6, 2},
		{8 * time.Second, 6, 3}, // five seconds after the last line
	} {
		f.running, f.proxies[0].rotations = step.at, step.rotated
		l.show(f)
		if got := count(); got != step.want {
			t.Errorf("after %s: %d lines, want %d:\n%s", step.at, got, step.want, out.String())
		}
	}
	if strings.Contains(out.String(), "\x1b") {
		t.Error("lines for a pipe hold escape sequences")
	}
	f.failed, f.fault, f.running = 1, "503", time.Minute
	l.show(f)
	if !strings.Contains(out.String(), "last fault: 503") {
		t.Errorf("the fault is not told:\n%s", out.String())
	}
	l.close()
}

func TestPace(t *testing.T) {
	begin := time.Now()
	w := watch{begin: begin}
	for _, step := range []struct {
		after time.Duration
		done  int64
		want  float64
	}{{500 * time.Millisecond, 25, 0}, {time.Second, 50, 50}, {1500 * time.Millisecond, 500, 50}, {2 * time.Second, 150, 100}} {
		if got := w.pace(begin.Add(step.after), step.done); got != step.want {
			t.Errorf("after %s: %.0f a second, want %.0f", step.after, got, step.want)
		}
	}
}
