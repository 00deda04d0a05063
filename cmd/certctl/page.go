package main

import (
	"bytes"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// page is text for people: headings, lists of names and values, and tables.
type page struct {
	now    time.Time
	colour bool
	buf    bytes.Buffer
}

func (p *page) bytes() []byte { return p.buf.Bytes() }

// tone colours a cell on a terminal.
type tone string

const (
	plainTone tone = ""
	good      tone = "\x1b[32m"
	doubtful  tone = "\x1b[33m"
	bad       tone = "\x1b[31m"
)

// cell is a table's cell.
type cell struct {
	text string
	tone tone
}

func text(s string) cell { return cell{text: s} }

func textf(format string, args ...any) cell { return text(fmt.Sprintf(format, args...)) }

func (c cell) as(t tone) cell { return cell{c.text, t} }

// line prints one line of text.
func (p *page) line(format string, args ...any) {
	p.buf.WriteString(plain(fmt.Sprintf(format, args...)) + "\n")
}

// gap prints an empty line between parts.
func (p *page) gap() {
	if p.buf.Len() > 0 {
		p.buf.WriteByte('\n')
	}
}

// pair is a name and a value.
type pair struct {
	name  string
	value cell
}

// pairs prints names and values, indented and aligned; empty values are left out.
func (p *page) pairs(list ...pair) {
	width := 0
	for _, e := range list {
		if e.value.text != "" {
			width = max(width, utf8.RuneCountInString(e.name))
		}
	}
	for _, e := range list {
		if e.value.text != "" {
			fmt.Fprintf(&p.buf, "  %-*s  %s\n", width, e.name, p.paint(e.value, plain(e.value.text)))
		}
	}
}

// table prints rows under a header, aligned. Columns in which no row has anything are left out.
func (p *page) table(header []string, rows [][]cell) {
	widths := make([]int, len(header))
	for i := range header {
		for _, r := range rows {
			r[i].text = plain(r[i].text)
			widths[i] = max(widths[i], utf8.RuneCountInString(r[i].text))
		}
		if widths[i] > 0 {
			widths[i] = max(widths[i], len(header[i]))
		}
	}
	top := make([]cell, len(header))
	for i, h := range header {
		top[i] = cell{text: h}
	}
	for _, r := range append([][]cell{top}, rows...) {
		var line strings.Builder
		for i, c := range r {
			if widths[i] == 0 {
				continue
			}
			line.WriteString(p.paint(c, c.text) + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text)+2))
		}
		p.buf.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
}

func (p *page) paint(c cell, shown string) string {
	if !p.colour || c.tone == plainTone {
		return shown
	}
	return string(c.tone) + shown + "\x1b[0m"
}

// when is a moment, relative and absolute: "in 5h59m (2026-11-21 18:00:00Z)".
func (p *page) when(t *timestamppb.Timestamp) cell {
	if t == nil {
		return cell{}
	}
	return p.moment(t.AsTime())
}

func (p *page) moment(t time.Time) cell {
	return textf("%s (%s)", p.relative(t), absolute(t))
}

func absolute(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") }

func (p *page) relative(t time.Time) string {
	switch d := t.Sub(p.now).Round(time.Second); {
	case d > 0:
		return "in " + spell(d)
	case d < 0:
		return spell(-d) + " ago"
	}
	return "now"
}

// ends is the moment of an end, coloured by how near it is to a life's last quarter.
func (p *page) ends(from, end *timestamppb.Timestamp) cell {
	c := p.when(end)
	if end == nil {
		return c
	}
	switch left := end.AsTime().Sub(p.now); {
	case left <= 0:
		c.tone = bad
	case from != nil && left < end.AsTime().Sub(from.AsTime())/4:
		c.tone = doubtful
	}
	return c
}

// spell writes a duration in its two largest units: 5h59m, 12m30s, 89d4h.
func spell(d time.Duration) string {
	const day = 24 * time.Hour
	d = d.Round(time.Second)
	switch {
	case d >= 3*day:
		return two(d/day, "d", d%day/time.Hour, "h")
	case d >= time.Hour:
		return two(d/time.Hour, "h", d%time.Hour/time.Minute, "m")
	case d >= time.Minute:
		return two(d/time.Minute, "m", d%time.Minute/time.Second, "s")
	}
	return fmt.Sprintf("%ds", d/time.Second)
}

func two(n time.Duration, unit string, m time.Duration, sub string) string {
	if m == 0 {
		return fmt.Sprintf("%d%s", n, unit)
	}
	return fmt.Sprintf("%d%s%d%s", n, unit, m, sub)
}

func yes(b bool) cell {
	if b {
		return cell{"yes", good}
	}
	return cell{"no", bad}
}

// plain keeps what strangers named (a pod in a made-up token) from moving the cursor: what does not print is spelled out.
func plain(s string) string {
	if strings.IndexFunc(s, unprintable) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if unprintable(r) {
			fmt.Fprintf(&b, "\\u{%x}", r)
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }
