package policy

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
)

const (
	// maxID is the longest SPIFFE ID in bytes (SPIFFE-ID §2.3).
	maxID = 2048
	// reserved is the first path segment that only meshca's own parts carry.
	reserved = "meshca"
)

// part is what a placeholder stands for.
type part uint8

const (
	nothing part = iota
	cluster
	namespace
	serviceAccount
)

var placeholders = [...]string{nothing: "", cluster: "{cluster}", namespace: "{namespace}", serviceAccount: "{serviceAccount}"}

func (in *Input) part(p part) string {
	switch p {
	case cluster:
		return in.Cluster
	case namespace:
		return in.Namespace
	case serviceAccount:
		return in.ServiceAccount
	}
	return ""
}

// segment is one segment of a template's path: literal text around at most one placeholder.
type segment struct {
	before string
	hole   part
	after  string
}

// String is the segment as one writes it.
func (s segment) String() string { return s.before + placeholders[s.hole] + s.after }

// template is an ID template: at least one segment.
type template []segment

// parseTemplate reads a path or a whole SPIFFE ID of the trust domain.
func parseTemplate(s string, td spiffeid.TrustDomain) (template, error) {
	if len(s) > maxID {
		return nil, fmt.Errorf("the template is %d bytes long; a SPIFFE ID has %d at most", len(s), maxID)
	}
	path := s
	if rest, ok := strings.CutPrefix(s, "spiffe://"); ok {
		host, p, _ := strings.Cut(rest, "/")
		if host != td.Name() {
			return nil, fmt.Errorf("the template %q is for trust domain %q; this CA issues in %q only", clip(s), clip(host), td.Name())
		}
		path = "/" + p
	}
	if !strings.HasPrefix(path, "/") || path == "/" {
		return nil, fmt.Errorf("the template %q must be a path that begins with / and names something, such as %s", clip(s), DefaultTemplate)
	}
	var t template
	length := len("spiffe://") + len(td.Name())
	for text := range strings.SplitSeq(path[1:], "/") {
		seg, err := parseSegment(text)
		if err != nil {
			return nil, fmt.Errorf("the template %q: %w", clip(s), err)
		}
		t = append(t, seg)
		length += 1 + len(seg.before) + len(seg.after)
	}
	if length > maxID {
		return nil, fmt.Errorf("the template makes IDs of more than %d bytes: its literal text and the trust domain alone have %d", maxID, length)
	}
	if t[0] == (segment{before: reserved}) {
		return nil, fmt.Errorf("the template %q: the path /%s is reserved for meshca's own parts; choose another first segment", clip(s), reserved)
	}
	return t, nil
}

func parseSegment(s string) (segment, error) {
	switch s {
	case "":
		return segment{}, fmt.Errorf("it has an empty segment (two slashes in a row, or one at the end)")
	case ".", "..":
		return segment{}, fmt.Errorf("segment %q: dot segments are no part of a SPIFFE ID", s)
	}
	seg, err := splitHole(s)
	if err != nil {
		return segment{}, err
	}
	return seg, checkLiteral(seg.before + seg.after)
}

// splitHole finds the one placeholder that a segment of an ID or a label of a DNS name may hold.
func splitHole(s string) (segment, error) {
	open := strings.IndexByte(s, '{')
	if open < 0 {
		return segment{before: s}, nil
	}
	end := strings.IndexByte(s[open:], '}')
	if end < 0 {
		return segment{}, fmt.Errorf("segment %q: { has no }", clip(s))
	}
	hole := s[open : open+end+1]
	seg := segment{before: s[:open], after: s[open+end+1:]}
	for p := cluster; p <= serviceAccount; p++ {
		if placeholders[p] == hole {
			seg.hole = p
		}
	}
	switch {
	case seg.hole == nothing:
		return segment{}, fmt.Errorf("unknown placeholder %s: there are {cluster}, {namespace} and {serviceAccount}", clip(hole))
	case strings.ContainsRune(seg.after, '{'):
		return segment{}, fmt.Errorf("segment %q has two placeholders: different accounts could get one ID; give each a segment of its own", clip(s))
	}
	return seg, nil
}

// checkLiteral holds to SPIFFE-ID §2.2: letters, digits, and - . _ only.
func checkLiteral(s string) error {
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '.', c == '_':
		case c == '%':
			return fmt.Errorf("it holds a percent sign: SPIFFE IDs have no percent-encoding")
		case c == '}':
			return fmt.Errorf("it holds a } without a {")
		case c == 0:
			return fmt.Errorf("it holds a NUL byte")
		default:
			return fmt.Errorf("it holds the byte %q: a path segment is made of letters, digits, - . and _", c)
		}
	}
	return nil
}

// execute makes the ID for checked names.
func (t template) execute(td spiffeid.TrustDomain, in *Input) (spiffeid.ID, *refusal.Error) {
	n := len("spiffe://") + len(td.Name())
	for i := range t {
		n += 1 + len(t[i].before) + len(in.part(t[i].hole)) + len(t[i].after)
	}
	if n > maxID {
		return spiffeid.ID{}, refusal.New(refusal.IdentityInvalid, "the ID would be %d bytes long; a SPIFFE ID has %d at most", n, maxID)
	}
	if first := &t[0]; len(first.before)+len(in.part(first.hole))+len(first.after) == len(reserved) &&
		first.before+in.part(first.hole)+first.after == reserved {
		return spiffeid.ID{}, refusal.New(refusal.IdentityReserved, "the ID's path would begin with /%s, which is reserved for meshca's own parts", reserved)
	}
	var b strings.Builder
	b.Grow(n)
	b.WriteString("spiffe://")
	b.WriteString(td.Name())
	for i := range t {
		b.WriteByte('/')
		b.WriteString(t[i].before)
		b.WriteString(in.part(t[i].hole))
		b.WriteString(t[i].after)
	}
	id, err := spiffeid.FromString(b.String())
	if err != nil {
		return spiffeid.ID{}, refusal.New(refusal.IdentityInvalid, "the ID would not be a SPIFFE ID: %w", err)
	}
	return id, nil
}

// String is the template as one writes it.
func (t template) String() string {
	var b strings.Builder
	for _, s := range t {
		b.WriteString("/" + s.String())
	}
	return b.String()
}
