package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode"

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
	root    string // where the CA's root is
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
type screen struct {
	w io.Writer
	// size is the terminal's, as it is now.
	size       func() (columns, rows int, err error)
	cols, rows int // of the last frame
}

var _ display = (*screen)(nil)

func newScreen(w io.Writer, size func() (columns, rows int, err error)) *screen {
	fmt.Fprint(w, hideCursor, clearScreen)
	return &screen{w: w, size: size}
}

// close leaves the last page standing, and the cursor below it.
func (s *screen) close() { fmt.Fprint(s.w, showCursor, "\n") }

func (s *screen) show(f frame) {
	cols, rows, err := s.size()
	if err != nil || cols < 1 || rows < 1 {
		cols, rows = 80, 24
	}
	if s.cols != 0 && (cols != s.cols || rows != s.rows) {
		fmt.Fprint(s.w, clearScreen) // the terminal has wrapped what stood there
	}
	s.cols, s.rows = cols, rows
	// No line end after the last line: in the lowest row it would scroll.
	fmt.Fprint(s.w, home, strings.Join(fit(render(f), cols, rows), clearLine+"\r\n"), clearLine, clearBelow)
}

// fit cuts a page to a terminal: lines that would wrap end in an ellipsis. Where there are too few rows, empty lines go
// first, and then what stands lowest.
func fit(page string, cols, rows int) []string {
	lines := strings.Split(strings.TrimSuffix(page, "\n"), "\n")
	for i := len(lines) - 1; i >= 0 && len(lines) > rows; i-- {
		if lines[i] == "" {
			lines = slices.Delete(lines, i, i+1)
		}
	}
	lines = lines[:min(len(lines), rows)]
	for i, line := range lines {
		lines[i] = cut(line, cols)
	}
	return lines
}

// cut shortens a line to so many columns. Colours take none.
func cut(line string, cols int) string {
	var out strings.Builder
	width, escape := 0, false
	total := 0
	for _, r := range line {
		switch {
		case r == '\x1b':
			escape = true
		case escape:
			escape = r != 'm'
		default:
			total++
		}
	}
	if total <= cols {
		return line
	}
	for _, r := range line {
		switch {
		case r == '\x1b' || escape:
			escape = r != 'm'
			out.WriteRune(r)
		case width < cols-1:
			width++
			out.WriteRune(r)
		}
	}
	return out.String() + "…" + plain
}

// render is the page as text with colours, without anything that moves the cursor.
// What matters most stands highest: a small terminal shows no more.
func render(f frame) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%smeshca demo%s   running %s, SVIDs live %s, renewed about every %s\n\n",
		bold, plain, clock(f.running), f.ttl, f.ttl/2)
	fmt.Fprintf(&b, "  requests > Envoy (client) > mTLS, a handshake for each > Envoy (server) > HTTP service\n")
	fmt.Fprintf(&b, "  %srequests%s   ok %s%d%s  failed %s  (%.0f a second)\n", bold, plain, green, f.ok, plain, count(f.failed), f.rate)
	fmt.Fprintf(&b, "  CA's root  %s\n", f.root)
	if f.fault != "" {
		fmt.Fprintf(&b, "  %slast fault%s %s\n", red, plain, oneLine(f.fault))
	}
	fmt.Fprintln(&b)
	for i, p := range f.proxies {
		fmt.Fprintf(&b, "  %sEnvoy, %s side%s\n", bold, mesh.Sides[i], plain)
		if p.trouble != "" {
			fmt.Fprintf(&b, "    %s%s%s\n", red, oneLine(p.trouble), plain)
		}
		fmt.Fprintf(&b, "    identity   %s\n", p.Identity)
		fmt.Fprintf(&b, "    serial     %s\n", p.Serial)
		fmt.Fprintf(&b, "    time left  %s %s\n", bar(p.left, f.ttl), clock(p.left))
		fmt.Fprintf(&b, "    rotations  %d\n", p.rotations)
		fmt.Fprintf(&b, "    requests   ok %d  failed %s\n", p.OK, count(p.Failed))
		fmt.Fprintln(&b)
	}
	fmt.Fprintf(&b, "  Ctrl-C ends it. Look inside from a second terminal:\n")
	for _, hint := range f.hints {
		fmt.Fprintf(&b, "  %s\n", hint)
	}
	return b.String()
}

// oneLine keeps what others wrote from moving the cursor.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
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
		fmt.Fprintf(l.w, "the CA's root is %s\n", f.root)
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
		fmt.Fprintf(l.w, "        last fault: %s\n", oneLine(f.fault))
	}
}

// short is enough of a serial to tell two apart in a line.
func short(serial string) string {
	if len(serial) > 8 {
		return serial[:8]
	}
	return serial
}
