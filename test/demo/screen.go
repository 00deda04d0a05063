package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/meshca/meshca/test/mesh"
)

// frame is one moment of the demo, for people.
type frame struct {
	running time.Duration
	ttl     time.Duration
	rate    float64 // requests a second, lately
	ok      int64
	failed  int64
	fault   string
	proxies [2]proxyFrame
	hints   []string
}

// proxyFrame is one proxy at that moment.
type proxyFrame struct {
	mesh.Reading
	rotations int64
	left      time.Duration
	// trouble is why the proxy could not be read; what is shown is then the last that was.
	trouble string
}

const (
	clearScreen = "\x1b[2J"
	home        = "\x1b[H"
	clearLine   = "\x1b[K"
	clearBelow  = "\x1b[J"
	hideCursor  = "\x1b[?25l"
	showCursor  = "\x1b[?25h"
	bold        = "\x1b[1m"
	green       = "\x1b[32m"
	red         = "\x1b[31m"
	plain       = "\x1b[0m"
)

// display shows frames until it is closed.
type display interface {
	show(frame)
	close()
}

// screen redraws one page in place.
type screen struct{ w io.Writer }

var _ display = screen{}

func newScreen(w io.Writer) screen {
	fmt.Fprint(w, hideCursor, clearScreen)
	return screen{w}
}

// close leaves the last page standing, and the cursor below it.
func (s screen) close() { fmt.Fprint(s.w, showCursor, "\n") }

func (s screen) show(f frame) {
	page := strings.ReplaceAll(render(f), "\n", clearLine+"\n")
	fmt.Fprint(s.w, home, page, clearBelow)
}

// render is the page as text with colours, without anything that moves the cursor.
func render(f frame) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%smeshca demo%s   running %s, SVIDs live %s, renewed about every %s\n\n",
		bold, plain, clock(f.running), f.ttl, f.ttl/2)
	fmt.Fprintf(&b, "  requests > Envoy (client) > mTLS, a handshake for each > Envoy (server) > HTTP service\n\n")
	for i, p := range f.proxies {
		fmt.Fprintf(&b, "  %sEnvoy, %s side%s\n", bold, mesh.Sides[i], plain)
		fmt.Fprintf(&b, "    identity   %s\n", p.Identity)
		fmt.Fprintf(&b, "    serial     %s\n", p.Serial)
		fmt.Fprintf(&b, "    time left  %s %s\n", bar(p.left, f.ttl), clock(p.left))
		fmt.Fprintf(&b, "    rotations  %d\n", p.rotations)
		fmt.Fprintf(&b, "    requests   ok %d  failed %s\n", p.OK, count(p.Failed))
		if p.trouble != "" {
			fmt.Fprintf(&b, "    %s%s%s\n", red, p.trouble, plain)
		}
		fmt.Fprintln(&b)
	}
	fmt.Fprintf(&b, "  %srequests%s   ok %s%d%s  failed %s  (%.0f a second)\n", bold, plain, green, f.ok, plain, count(f.failed), f.rate)
	if f.fault != "" {
		fmt.Fprintf(&b, "  %slast fault%s %s\n", red, plain, f.fault)
	}
	fmt.Fprintf(&b, "\n  Ctrl-C ends it. Look inside from a second terminal:\n")
	for _, hint := range f.hints {
		fmt.Fprintf(&b, "    %s\n", hint)
	}
	return b.String()
}

// bar draws what is left of a life.
func bar(left, life time.Duration) string {
	const width = 24
	full := 0
	if life > 0 {
		full = min(width, int(left*width/life))
	}
	return "[" + strings.Repeat("=", full) + strings.Repeat(" ", width-full) + "]"
}

func count(failed int64) string {
	if failed == 0 {
		return "0"
	}
	return fmt.Sprintf("%s%d%s", red, failed, plain)
}

func clock(d time.Duration) string { return d.Round(time.Second).String() }

// lines prints a line every few seconds, and one at once when a proxy rotated: for logs and pipes.
type lines struct {
	w     io.Writer
	every time.Duration

	started   bool
	last      time.Duration // running time of the last line
	rotations [2]int64
}

var _ display = (*lines)(nil)

func (l *lines) close() {}

func (l *lines) show(f frame) {
	if !l.started {
		for i, p := range f.proxies {
			fmt.Fprintf(l.w, "%s is %s\n", mesh.Sides[i], p.Identity)
		}
		for _, hint := range f.hints {
			fmt.Fprintf(l.w, "look inside: %s\n", hint)
		}
	}
	rotated := [2]int64{f.proxies[0].rotations, f.proxies[1].rotations}
	if l.started && rotated == l.rotations && f.running-l.last < l.every {
		return
	}
	l.started, l.last, l.rotations = true, f.running, rotated
	fmt.Fprintf(l.w, "%6s  ok=%d failed=%d", clock(f.running), f.ok, f.failed)
	for i, p := range f.proxies {
		fmt.Fprintf(l.w, "  %s: serial=%s left=%s rotations=%d ok=%d failed=%d",
			mesh.Sides[i], short(p.Serial), clock(p.left), p.rotations, p.OK, p.Failed)
		if p.trouble != "" {
			fmt.Fprintf(l.w, " (%s)", p.trouble)
		}
	}
	fmt.Fprintln(l.w)
	if f.failed > 0 {
		fmt.Fprintf(l.w, "        last fault: %s\n", f.fault)
	}
}

// short is enough of a serial to tell two apart in a line.
func short(serial string) string {
	if len(serial) > 8 {
		return serial[:8]
	}
	return serial
}
