// Package readme reads what the README tells people to type, and what it says they will see. Its tests run that in a copy of
// the repository; those on a real cluster run the part that needs one.
package readme

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Snippet is a block of commands of the README, and what it says they show.
type Snippet struct {
	Line     int
	Commands string
	Shows    []string // lines, in order; … stands for anything, and other lines may stand between
}

// The README marks the blocks, in comments that a reader does not see: Here or OnACluster stands before a block of commands
// that a test runs, shows before what the block above it prints.
const (
	Here       = "<!-- runs -->"
	OnACluster = "<!-- runs on a cluster -->"
	shows      = "<!-- shows -->"
)

// Parse finds the blocks with one of the marks.
func Parse(text, where string) ([]Snippet, error) {
	var out []Snippet
	lines := strings.Split(text, "\n")
	ours := true // whether the last block of commands has the mark
	for i := 0; i < len(lines); i++ {
		mark := strings.TrimSpace(lines[i])
		if mark != Here && mark != OnACluster && mark != shows {
			continue
		}
		if i+1 >= len(lines) || !strings.HasPrefix(lines[i+1], "```") {
			return nil, fmt.Errorf("line %d: no block follows %s", i+1, mark)
		}
		length := slices.Index(lines[i+2:], "```")
		if length < 0 {
			return nil, fmt.Errorf("line %d: the block has no end", i+2)
		}
		block := lines[i+2 : i+2+length]
		switch {
		case mark != shows:
			if ours = mark == where; ours {
				out = append(out, Snippet{Line: i + 3, Commands: strings.Join(block, "\n")})
			}
		case !ours:
		case len(out) == 0 || out[len(out)-1].Shows != nil:
			return nil, fmt.Errorf("line %d: no block of commands stands above", i+1)
		default:
			out[len(out)-1].Shows = block
		}
		i += 2 + length
	}
	return out, nil
}

// Missing returns the first line that the output does not show, or "".
func Missing(output string, want []string) string {
	rest := strings.Split(output, "\n")
	for _, line := range want {
		words := strings.Fields(line)
		for i, w := range words {
			words[i] = strings.ReplaceAll(regexp.QuoteMeta(w), "…", ".*")
		}
		pattern := regexp.MustCompile(`^\s*` + strings.Join(words, `\s+`) + `\s*$`)
		i := slices.IndexFunc(rest, pattern.MatchString)
		if i < 0 {
			return line
		}
		rest = rest[i+1:]
	}
	return ""
}
