package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// keys of a rule, as an error lists them.
const ruleKeys = "name, clusters, namespaces, serviceAccounts, when, id, ttl, dnsNames, direct, nodeVouched, serverKeys and deny"

// parseRule returns the rule's label also beside an error.
func parseRule(fields map[string]json.RawMessage, number int, plain grant, c PolicyContext, conditions *language) (rule, error) {
	r := rule{label: fmt.Sprintf("rule %d", number), number: number, grant: plain}
	if name, ok := fields["name"]; ok {
		s, err := parseName(name)
		if err != nil {
			return r, err
		}
		r.label = s
	}
	granted := ""
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		isGrant, err := r.parseKey(key, fields[key], c, conditions)
		if err != nil {
			return r, err
		}
		if isGrant && granted == "" {
			granted = key
		}
	}
	if r.denied && granted != "" {
		return r, fmt.Errorf("it has deny and a grant (%s): take one away", granted)
	}
	r.summed()
	return r, r.fits(c.Clusters)
}

// parseKey reads one key, and reports whether it is a part of what is granted.
func (r *rule) parseKey(key string, value json.RawMessage, c PolicyContext, conditions *language) (isGrant bool, err error) {
	var s string
	switch key {
	case "name": // read before, so that every error can say it
	case "clusters":
		if r.clusters, err = parsePatterns(value); err == nil {
			err = known(r.clusters, c.Clusters)
		}
	case "namespaces":
		r.namespaces, err = parsePatterns(value)
	case "serviceAccounts":
		r.serviceAccounts, err = parsePatterns(value)
	case "when":
		if s, err = parseString(value); err == nil {
			r.when, err = conditions.compile(s)
		}
	case "deny":
		r.denied, r.deny, err = parseDeny(value)
	default:
		isGrant = true
		if err = r.grant.parseKey(key, value, c); errors.Is(err, errUnknownKey) {
			return false, fmt.Errorf("unknown key %q: a rule has %s", clip(key), ruleKeys)
		}
	}
	if err != nil {
		return isGrant, fmt.Errorf("%s: %w", key, err)
	}
	return isGrant, nil
}

var errUnknownKey = errors.New("unknown key")

func (g *grant) parseKey(key string, value json.RawMessage, c PolicyContext) (err error) {
	switch key {
	case "id":
		var s string
		if s, err = parseString(value); err == nil {
			g.id, err = parseTemplate(s, c.TrustDomain)
		}
	case "ttl":
		g.ttl, err = parseTTL(value, c.MaxTTL)
	case "dnsNames":
		g.dnsNames, err = parseDNSNames(value)
	case "direct":
		g.direct, err = parseBool(value)
	case "nodeVouched":
		g.nodeVouched, err = parseBool(value)
	case "serverKeys":
		g.serverKeys, err = parseBool(value)
	default:
		return errUnknownKey
	}
	return err
}

// fits refuses what could never be known of the pods of a cluster that the rule is for.
func (r *rule) fits(clusters []Cluster) error {
	for _, c := range clusters {
		if !c.NoPods || !r.clusters.match(c.Name) {
			continue
		}
		if r.when != nil && r.when.uses&ofObjects != 0 {
			return fmt.Errorf("when: it asks for %s, and cluster %s has liveness: none, so that nobody can be asked for that: name the clusters that the rule is for (clusters)",
				r.when.uses&ofObjects, c.Name)
		}
		if r.grant.nodeVouched {
			return fmt.Errorf("nodeVouched: cluster %s has liveness: none, so that no pod of it is known: name the clusters that the rule is for (clusters)", c.Name)
		}
	}
	return nil
}

func parseDNSNames(value json.RawMessage) ([]dnsTemplate, error) {
	var texts []*string
	if err := json.Unmarshal(value, &texts); err != nil {
		return nil, fmt.Errorf("must be a list of DNS names, not %s", clip(string(value)))
	}
	if len(texts) == 0 || len(texts) > MaxDNSNames {
		return nil, fmt.Errorf("%d names; 1 to %d can be granted, and without the key there are none", len(texts), MaxDNSNames)
	}
	names := make([]dnsTemplate, len(texts))
	for i, text := range texts {
		if text == nil {
			return nil, fmt.Errorf("an entry is empty")
		}
		var err error
		if names[i], err = parseDNSName(*text); err != nil {
			return nil, err
		}
	}
	return names, nil
}

func parseBool(value json.RawMessage) (bool, error) {
	switch string(bytes.TrimSpace(value)) {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, fmt.Errorf("must be true or false, not %s", clip(string(value)))
}

func parseTTL(value json.RawMessage, most time.Duration) (time.Duration, error) {
	s, err := parseString(value)
	if err != nil {
		return 0, fmt.Errorf("%w; write a duration such as 1h or 30m", err)
	}
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%q is not a duration such as 1h or 30m", clip(s))
	case d < MinTTL:
		return 0, fmt.Errorf("%s is too short: at least %s", d, MinTTL)
	case d > most:
		return 0, fmt.Errorf("%s is over the CA's maximum of %s: shorten it, or raise the maximum in the CA's configuration", d, most)
	}
	return d, nil
}

// parseDeny reads true, or the reason why.
func parseDeny(value json.RawMessage) (denied bool, why string, err error) {
	switch string(bytes.TrimSpace(value)) {
	case "true":
		return true, "", nil
	case "false":
		return false, "", nil
	}
	why, err = parseString(value)
	if err != nil || why == "" || len(why) > maxWhy {
		return false, "", fmt.Errorf("must be true, or the reason in 1 to %d bytes", maxWhy)
	}
	return true, why, printable("deny", why)
}
