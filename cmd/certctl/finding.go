package main

import (
	"strings"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// Levels of a finding.
const (
	levelOK      = "ok"
	levelWarning = "warning"
	levelError   = "error"
)

// finding is one thing that was looked at.
type finding struct {
	// Source is who looked: ca, agent or local; empty for a certificate's own.
	Source  string `json:"source,omitempty"`
	Subject string `json:"subject"`
	Level   string `json:"level"`
	Detail  string `json:"detail"`
	Hint    string `json:"hint,omitempty"`
}

// findings is the output of `check`.
type findings struct {
	OK       bool      `json:"ok"`
	Findings []finding `json:"findings"`
}

func imported(source string, list []*meshcav1.Finding) []finding {
	out := make([]finding, 0, len(list))
	for _, f := range list {
		level := levelError // what a newer peer calls otherwise is no reason to be calm
		switch f.GetLevel() {
		case meshcav1.Finding_LEVEL_OK:
			level = levelOK
		case meshcav1.Finding_LEVEL_WARNING:
			level = levelWarning
		case meshcav1.Finding_LEVEL_ERROR, meshcav1.Finding_LEVEL_UNSPECIFIED:
		}
		out = append(out, finding{source, f.GetSubject(), level, f.GetDetail(), f.GetHint()})
	}
	return out
}

func count(list []finding, level string) int {
	n := 0
	for _, f := range list {
		if f.Level == level {
			n++
		}
	}
	return n
}

// drawFindings prints a table, and the hints below it, each under the finding it belongs to.
func drawFindings(p *page, list []finding) {
	tones := map[string]tone{levelOK: good, levelWarning: doubtful, levelError: bad}
	width := 0
	for _, f := range list {
		width = max(width, len([]rune(plain(f.subject()))))
	}
	for _, f := range list {
		level := cell{strings.ToUpper(f.Level), tones[f.Level]}
		subject := plain(f.subject())
		p.buf.WriteString(p.paint(level, level.text) + strings.Repeat(" ", len("WARNING")-len(level.text)+2) +
			subject + strings.Repeat(" ", width-len([]rune(subject))+2) + plain(f.Detail) + "\n")
		if f.Hint != "" {
			p.buf.WriteString(strings.Repeat(" ", len("WARNING")+2+width+2) + "-> " + plain(f.Hint) + "\n")
		}
	}
}

func (f finding) subject() string {
	if f.Source == "" {
		return f.Subject
	}
	return f.Source + ": " + f.Subject
}
