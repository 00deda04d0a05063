package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/meshca/meshca/api/refusal"
)

const (
	// MaxDNSNames is how many DNS names a rule may grant.
	MaxDNSNames = 16
	// maxDNSName and maxDNSLabel are RFC 1035's, in bytes.
	maxDNSName, maxDNSLabel = 253, 63
)

// dnsTemplate is a DNS name with at most one placeholder in each label, as for a path's segments. A placeholder never
// makes several labels of one: a name with a dot in it does not fit.
type dnsTemplate []segment

// parseDNSName holds a template to what its names must be: lower-case letters, digits and dashes (RFC 5280 §4.2.1.6 by
// RFC 1034 §3.5 and RFC 1123 §2.1). A wildcard would let one workload stand for names that others have.
func parseDNSName(s string) (dnsTemplate, error) {
	switch {
	case s == "" || len(s) > maxDNSName+len("{serviceAccount}")*MaxDNSNames:
		return nil, fmt.Errorf("%q is not a DNS name of 1 to %d bytes", clip(s), maxDNSName)
	case strings.Contains(s, "*"):
		return nil, fmt.Errorf("%q has a wildcard: name what the workload is called, one workload must not stand for others", clip(s))
	}
	var t dnsTemplate
	for text := range strings.SplitSeq(s, ".") {
		label, err := parseDNSLabel(text)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", clip(s), err)
		}
		t = append(t, label)
	}
	if fault := dnsFault(t.String()); fault != "" && !strings.Contains(s, "{") {
		return nil, fmt.Errorf("%q: %s", clip(s), fault)
	}
	return t, nil
}

func parseDNSLabel(s string) (segment, error) {
	if s == "" {
		return segment{}, fmt.Errorf("it has an empty label (a dot at an end, or two in a row)")
	}
	label, err := splitHole(s)
	if err != nil {
		return segment{}, err
	}
	literal := label.before + label.after
	for i := range len(literal) {
		if c := literal[i]; !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-') {
			return segment{}, fmt.Errorf("it holds %q: DNS names are made of lower-case letters, digits and dashes", c)
		}
	}
	switch {
	case strings.HasPrefix(s, "-") || strings.HasSuffix(s, "-"):
		return segment{}, fmt.Errorf("label %q begins or ends with a dash", clip(s))
	case len(literal) > maxDNSLabel || label.hole != nothing && len(literal) >= maxDNSLabel:
		return segment{}, fmt.Errorf("label %q is longer than %d bytes", clip(s), maxDNSLabel)
	}
	return label, nil
}

// String is the template as one writes it.
func (t dnsTemplate) String() string {
	labels := make([]string, len(t))
	for i, s := range t {
		labels[i] = s.String()
	}
	return strings.Join(labels, ".")
}

// execute makes the name for checked names of an input.
func (t dnsTemplate) execute(in *Input) (string, *refusal.Error) {
	var b strings.Builder
	for i := range t {
		if i > 0 {
			b.WriteByte('.')
		}
		name := in.part(t[i].hole)
		if strings.Contains(name, ".") {
			return "", refusal.New(refusal.DNSNameInvalid, "the DNS name %s has one label for %s, and %s holds a dot", t, placeholders[t[i].hole], clip(name))
		}
		b.WriteString(t[i].before)
		b.WriteString(name)
		b.WriteString(t[i].after)
	}
	if fault := dnsFault(b.String()); fault != "" {
		return "", refusal.New(refusal.DNSNameInvalid, "the DNS name %s would be %q: %s", t, clip(b.String()), fault)
	}
	return b.String(), nil
}

// dnsNames are the names of a grant, each once.
func dnsNames(templates []dnsTemplate, in *Input) ([]string, *refusal.Error) {
	if len(templates) == 0 {
		return nil, nil
	}
	names := make([]string, 0, len(templates))
	for _, t := range templates {
		name, err := t.execute(in)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names, nil
}

// dnsFault says why a name of valid characters is none; empty when it is one.
func dnsFault(s string) string {
	if len(s) > maxDNSName {
		return fmt.Sprintf("it has %d bytes, and a DNS name %d at most", len(s), maxDNSName)
	}
	last := ""
	for label := range strings.SplitSeq(s, ".") {
		switch {
		case len(label) > maxDNSLabel:
			return fmt.Sprintf("label %q is longer than %d bytes", clip(label), maxDNSLabel)
		case label == "" || label[0] == '-' || label[len(label)-1] == '-':
			return fmt.Sprintf("label %q is empty, or begins or ends with a dash", clip(label))
		}
		last = label
	}
	if strings.Trim(last, "0123456789") == "" { // RFC 1123 §2.1: it would be read as an address
		return "its last label is a number, as an IP address's is"
	}
	return ""
}
