package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"

	"sigs.k8s.io/yaml"
)

// Bounds of a policy document. They are far above what people write, and keep a decision fast.
const (
	MaxBytes    = 256 << 10
	MaxRules    = 1000
	MaxPatterns = 200             // in one list
	MinTTL      = 5 * time.Second // as for every SVID: NotAfter has whole seconds, and an agent needs time to fetch and push
	maxName     = 63              // bytes of a rule's name
	maxWhy      = 200             // bytes of a deny's reason
)

// Parse reads a policy document strictly: an unknown key, a list that could be meant as "all" or as "none", a template
// that could make an ID that is not one, and clusters that could share IDs unsaid are all refused.
func Parse(data []byte, c PolicyContext) (*Policy, error) {
	if len(data) > MaxBytes {
		return nil, fmt.Errorf("policy: the document has %d bytes; the most is %d", len(data), MaxBytes)
	}
	if bytes.Contains(data, []byte("\n---")) || bytes.Contains(data, []byte("\n...")) {
		return nil, errors.New("policy: --- and ... are for several YAML documents, of which only the first would be read: take these lines out")
	}
	js, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		return nil, fmt.Errorf("policy: not YAML: %s", oneLine(err))
	}
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(js, &doc); err != nil || doc == nil {
		return nil, fmt.Errorf("policy: the document must be a mapping with the key rules; for the plain ID for all write `rules: []`")
	}
	for _, key := range slices.Sorted(maps.Keys(doc)) {
		if key != "rules" {
			return nil, fmt.Errorf("policy: unknown key %q at the top: there is only rules", clip(key))
		}
	}
	var raw []map[string]json.RawMessage
	if err := json.Unmarshal(doc["rules"], &raw); err != nil || raw == nil {
		return nil, fmt.Errorf("policy: rules must be a list of rules; for the plain ID for all write `rules: []`")
	}
	if len(raw) > MaxRules {
		return nil, fmt.Errorf("policy: %d rules; the most is %d", len(raw), MaxRules)
	}
	return build(c, raw)
}

// oneLine joins the lines of a YAML error: they stand in logs and in a table's cell.
func oneLine(err error) string {
	s := strings.Join(strings.Fields(err.Error()), " ")
	return s[:min(len(s), 300)]
}

func build(c PolicyContext, raw []map[string]json.RawMessage) (*Policy, error) {
	if c.TrustDomain.IsZero() {
		return nil, fmt.Errorf("policy: no trust domain to issue in")
	}
	if c.MaxTTL == 0 {
		c.MaxTTL = DefaultMaxTTL
	}
	if c.MaxTTL < MinTTL {
		return nil, fmt.Errorf("policy: a maximum life of %s is too short: at least %s", c.MaxTTL, MinTTL)
	}
	plain, err := parseTemplate(DefaultTemplate, c.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	p := &Policy{trustDomain: c.TrustDomain, plain: rule{label: DefaultRule, grant: grant{id: plain, ttl: c.MaxTTL}}}
	p.plain.summed()
	numbers := map[string]int{}
	var conditions language
	var cost uint64
	for i, fields := range raw {
		r, err := parseRule(fields, i+1, p.plain.grant, c, &conditions)
		if err != nil {
			return nil, fmt.Errorf("policy: %s: %w", r.quoted(), err)
		}
		if first := numbers[r.label]; first != 0 {
			return nil, fmt.Errorf("policy: rules %d and %d are both called %q: refusals name the rule, so give each a name of its own", first, i+1, r.label)
		}
		numbers[r.label] = i + 1
		if r.when != nil {
			cost += r.when.cost
		}
		p.rules = append(p.rules, r)
	}
	if cost > maxTotalCost {
		return nil, fmt.Errorf("policy: its conditions can cost up to %d together, and the most is %d: a decision may ask them all. "+
			"Make them cheaper, or fewer", cost, maxTotalCost)
	}
	if err := apart(c.Clusters, p.effective()); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return p, nil
}

func parseString(value json.RawMessage) (string, error) {
	var s *string
	if err := json.Unmarshal(value, &s); err != nil || s == nil {
		return "", fmt.Errorf("must be text, not %s", clip(string(value)))
	}
	return *s, nil
}

func parseName(value json.RawMessage) (string, error) {
	s, err := parseString(value)
	if err != nil {
		return "", fmt.Errorf("name: %w", err)
	}
	if s == "" || len(s) > maxName || s == DefaultRule || strings.HasPrefix(s, "rule ") {
		return "", fmt.Errorf("name: %q must have 1 to %d bytes and be neither %q nor begin with \"rule \"", clip(s), maxName, DefaultRule)
	}
	return s, printable("name", s)
}

func parsePatterns(value json.RawMessage) (patterns, error) {
	var texts []*string
	if err := json.Unmarshal(value, &texts); err != nil {
		return nil, fmt.Errorf("must be a list of names or globs, not %s", clip(string(value)))
	}
	if len(texts) == 0 {
		return nil, fmt.Errorf("the list is empty: leave the key out to match all, or take the rule away to match none")
	}
	if len(texts) > MaxPatterns {
		return nil, fmt.Errorf("%d entries; the most is %d", len(texts), MaxPatterns)
	}
	ps := make(patterns, 0, len(texts))
	for _, text := range texts {
		if text == nil {
			return nil, fmt.Errorf("an entry is empty")
		}
		p, err := parsePattern(*text)
		if err != nil {
			return nil, err
		}
		ps = append(ps, p)
	}
	return ps, nil
}

// known refuses a cluster that is not there: a misspelt one would make a deny rule match nobody.
func known(ps patterns, clusters []Cluster) error {
	if len(clusters) == 0 {
		return nil
	}
	for _, p := range ps {
		if !slices.ContainsFunc(clusters, func(c Cluster) bool { return p.match(c.Name) }) {
			return fmt.Errorf("%q matches no cluster of the configuration", p.text)
		}
	}
	return nil
}

// printable keeps what later stands in logs and terminals to one line of text.
func printable(what, s string) error {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }) {
		return fmt.Errorf("%s: %q holds a character that does not print", what, clip(s))
	}
	return nil
}
