package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestLintersHaveReasons asks for a reason at each line of the linters' configuration that decides something: who wants
// to take a rule away, or to add one, has to know what it is for.
func TestLintersHaveReasons(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(filepath.Dir(goMod(t)), ".golangci.yml"))
	if err != nil {
		t.Fatal(err)
	}
	lines, bare := unreasoned(string(text))
	if lines < 80 {
		t.Fatalf("%d lines decide something: the rule was checked against nothing", lines)
	}
	for _, b := range bare {
		t.Errorf(".golangci.yml:%s: why? Say it behind a # on the line, or in a comment above", b)
	}
}

func TestAMissingReasonIsFound(t *testing.T) {
	for text, want := range map[string]int{
		"enable:\n  - govet # faults\n":                           0,
		"enable:\n  - govet\n":                                    1,
		"enable:\n  - govet #\n":                                  1,
		"enable:\n  # faults\n  - govet\n":                        1,
		"enable:\n  # faults\n  - govet # why\n  - unused\n":      1,
		"enable:\n  # faults\n\n  - govet\n":                      1,
		"lines: 65\n":                                             1,
		"rules:\n  - name: a # why\n    arguments: [b]\n":         0,
		"rules:\n  - name: a\n    arguments: [b]\n":               2,
		"deny:\n  - pkg: log$\n    desc: log/slog\n":              0,
		"forbid:\n  - pattern: ^os\n    msg: use b\n":             0,
		"deny:\n  - pkg: log$\n    desc:\n":                       1,
		"rules:\n  # tests\n  - path: a\n    linters: [b, c]\n":   0,
		"deny:\n  - pkg: a#b\n":                                   1,
		"rules:\n  - name: a # why\n  - name: b\n    max: 3\n":    2,
		"rules:\n  - name: a # why\n    max: 3\nother: [1]\n":     1,
		"rules:\n  - a # why\n  - b # the same\n  - c # same\n\n": 0,
	} {
		if _, bare := unreasoned(text); len(bare) != want {
			t.Errorf("%q: %d lines without a reason (%q), want %d", text, len(bare), bare, want)
		}
	}
}

// unreasoned counts the lines of a YAML text that decide something (all but comments and keys that only hold others), and
// returns those without a reason. A reason is a comment behind the line or right above it, or the desc or msg that its
// list item goes on with; it holds for what is nested below the line too.
func unreasoned(text string) (lines int, bare []string) {
	all := strings.Split(text, "\n")
	covered := -1 // the indent of the line whose reason holds for deeper ones; -1: none
	for i, line := range all {
		content := strings.TrimSpace(line)
		indent := len(line) - len(strings.TrimLeft(line, " "))
		if content == "" || strings.HasPrefix(content, "#") {
			continue
		}
		if covered >= 0 && indent > covered {
			lines++
			continue
		}
		covered = -1
		value, reason, _ := strings.Cut(content, " #")
		reasoned := strings.TrimSpace(reason) != "" || i > 0 && headed(content, all[i-1]) || i+1 < len(all) && explains(all[i+1])
		switch holds := strings.HasSuffix(strings.TrimSpace(value), ":"); {
		case holds: // a comment above a group is its heading, not the reason of all in it
		case reasoned:
			lines++
			covered = indent
		default:
			lines++
			bare = append(bare, fmt.Sprintf("%d: %s", i+1, content))
		}
	}
	return lines, bare
}

// headed tells whether the line above is a comment on this one. Above a bare name in a list it is the heading of many.
func headed(content, above string) bool {
	return strings.HasPrefix(strings.TrimSpace(above), "# ") && strings.Contains(content, ": ")
}

// explains tells whether a line is the explanation that depguard and forbidigo show to whoever breaks the rule before it.
func explains(line string) bool {
	for _, key := range []string{"desc: ", "msg: "} {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), key); ok && strings.TrimSpace(text) != "" {
			return true
		}
	}
	return false
}
