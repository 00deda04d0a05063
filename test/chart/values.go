package chart

import (
	"fmt"
	"regexp"
	"strings"
)

// Value is a key of values.yaml with what stands above it.
type Value struct {
	// Path is dotted.
	Path string
	// Default as it is written; empty where keys of its own follow.
	Default string
	// Doc is its comment, on one line.
	Doc string
	// Parent: keys of its own follow.
	Parent bool
}

var keyLine = regexp.MustCompile(`^( *)([A-Za-z][A-Za-z0-9]*):(?: +(.*))?$`)

// ReadValues reads values.yaml as the chart has it: comments above keys, two blanks a level, lists and maps of a default
// on the key's line or below it.
func ReadValues(text string) ([]Value, error) {
	var values []Value
	var path []string // of the keys above
	var comment []string
	inDefault := -1 // the level of a key whose default goes on below it
	for i, line := range strings.Split(text, "\n") {
		trimmed := strings.TrimSpace(line)
		level := (len(line) - len(strings.TrimLeft(line, " "))) / 2
		switch {
		case trimmed == "":
			comment = nil
			continue
		case inDefault >= 0 && level > inDefault:
			last := &values[len(values)-1]
			last.Default = strings.TrimSpace(last.Default + " " + trimmed)
			continue
		case strings.HasPrefix(trimmed, "#"):
			comment = append(comment, strings.TrimSpace(strings.TrimPrefix(trimmed, "#")))
			continue
		}
		m := keyLine.FindStringSubmatch(line)
		if m == nil || level > len(path) {
			return nil, fmt.Errorf("values.yaml:%d: %q is not understood", i+1, line)
		}
		path = append(path[:level], m[2])
		v := Value{Path: strings.Join(path, "."), Default: m[3], Doc: strings.Join(comment, " ")}
		inDefault = -1
		if v.Default == "" {
			// A comment begins keys of its own; a default that goes on below has none.
			v.Parent = v.Doc == ""
			if !v.Parent {
				inDefault = level
			}
		}
		values, comment = append(values, v), nil
	}
	return values, nil
}

const (
	tableBegin = "<!-- values: made of values.yaml by `make manifests` -->\n"
	tableEnd   = "<!-- end of values -->\n"
)

// WithTable is a README with the table of values in its place.
func WithTable(readme, values string) (string, error) {
	before, rest, ok := strings.Cut(readme, tableBegin)
	_, after, ends := strings.Cut(rest, tableEnd)
	if !ok || !ends {
		return "", fmt.Errorf("the README has no place for the table: %q, and %q", tableBegin, tableEnd)
	}
	read, err := ReadValues(values)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString("\n| value | default | what it is |\n|---|---|---|\n")
	for _, v := range read {
		if !v.Parent {
			fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", v.Path, strings.ReplaceAll(v.Default, "|", `\|`), strings.ReplaceAll(v.Doc, "|", `\|`))
		}
	}
	return before + tableBegin + b.String() + "\n" + tableEnd + after, nil
}
