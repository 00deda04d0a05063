package policy

import (
	"fmt"
	"strings"
)

// maxStars bounds the work of one match.
const maxStars = 8

// pattern is a name, or a glob in which * stands for any run of characters, also none.
type pattern struct {
	text string
	glob bool
}

func parsePattern(s string) (pattern, error) {
	if s == "" || len(s) > 253 {
		return pattern{}, fmt.Errorf("%q is not a name or glob of 1 to 253 characters", clip(s))
	}
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '*') {
			return pattern{}, fmt.Errorf("%q holds %q: names are made of lower-case letters, digits, - and .; the one wildcard is *", clip(s), c)
		}
	}
	stars := strings.Count(s, "*")
	if stars > maxStars {
		return pattern{}, fmt.Errorf("%q has %d wildcards; the most is %d", clip(s), stars, maxStars)
	}
	return pattern{s, stars > 0}, nil
}

func (p pattern) match(name string) bool {
	if !p.glob {
		return p.text == name
	}
	// Greedy with one point to come back to: an earlier star never needs to take more once a later one was reached.
	text, at, resume, star := p.text, 0, 0, -1
	i := 0
	for i < len(name) {
		switch {
		case at < len(text) && text[at] == '*':
			star, resume = at, i
			at++
		case at < len(text) && text[at] == name[i]:
			at++
			i++
		case star >= 0:
			resume++
			at, i = star+1, resume
		default:
			return false
		}
	}
	for at < len(text) && text[at] == '*' {
		at++
	}
	return at == len(text)
}

// patterns is a list of which one must match; nil (the key was left out) matches all.
type patterns []pattern

func (ps patterns) match(name string) bool {
	if ps == nil {
		return true
	}
	for _, p := range ps {
		if p.match(name) {
			return true
		}
	}
	return false
}

func (ps patterns) String() string {
	texts := make([]string, len(ps))
	for i, p := range ps {
		texts[i] = p.text
	}
	if len(texts) > 5 {
		texts = append(texts[:5], fmt.Sprintf("... %d more", len(ps)-5))
	}
	return strings.Join(texts, ", ")
}
