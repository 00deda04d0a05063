package policy

import (
	"fmt"
	"strings"
)

// apart reports two clusters whose workloads could get one ID: two identities would be one to every relying party. It
// compares templates, not the namespaces that rules are for, so it may ask for more than is needed, never for less.
func apart(clusters []Cluster, rules []rule) error {
	for i, a := range clusters {
		for _, b := range clusters[i+1:] {
			if a.SameNamespaces && b.SameNamespaces {
				continue
			}
			if err := pairApart(a.Name, b.Name, rules); err != nil {
				return err
			}
		}
	}
	return nil
}

func pairApart(a, b string, rules []rule) error {
	forA, forB := issuing(rules, a), issuing(rules, b)
	for _, ra := range forA {
		for _, rb := range forB {
			if !ra.bound.unifies(rb.bound) {
				continue
			}
			by := ra.quoted()
			if ra.number != rb.number {
				by += " and " + rb.quoted()
			}
			return fmt.Errorf("clusters %s and %s could be given the same ID by %s (%s and %s): put {cluster} into the template, "+
				"or say sameNamespaces: true at both clusters if their namespaces are the same ones", a, b, by, ra.grant.id, rb.grant.id)
		}
	}
	return nil
}

// bound is a rule that can issue in a cluster, its template with the cluster's name put in.
type bound struct {
	*rule
	bound template
}

func issuing(rules []rule, name string) []bound {
	var out []bound
	seen := map[string]bool{} // many rules share a template; one of them is enough
	for i := range rules {
		r := &rules[i]
		if r.denied || seen[r.grant.id.String()] || !r.clusters.match(name) {
			continue
		}
		seen[r.grant.id.String()] = true
		out = append(out, bound{r, r.grant.id.bind(name)})
	}
	return out
}

// bind puts the cluster's name in: the rest of the holes stay.
func (t template) bind(name string) template {
	out := make(template, len(t))
	for i, s := range t {
		if s.hole == cluster {
			s = segment{before: s.before + name + s.after}
		}
		out[i] = s
	}
	return out
}

// unifies reports whether some names make the same path of both. Conservative: it takes every text for a name.
func (t template) unifies(u template) bool {
	if len(t) != len(u) {
		return false
	}
	for i := range t {
		if !t[i].unifies(u[i]) {
			return false
		}
	}
	return true
}

func (s segment) unifies(o segment) bool {
	switch {
	case s.hole == nothing && o.hole == nothing:
		return s.before == o.before
	case s.hole == nothing:
		return o.fits(s.before)
	case o.hole == nothing:
		return s.fits(o.before)
	}
	return (strings.HasPrefix(s.before, o.before) || strings.HasPrefix(o.before, s.before)) &&
		(strings.HasSuffix(s.after, o.after) || strings.HasSuffix(o.after, s.after))
}

// fits reports whether the literal could come out of the segment; names are never empty.
func (s segment) fits(literal string) bool {
	return len(literal) > len(s.before)+len(s.after) && strings.HasPrefix(literal, s.before) && strings.HasSuffix(literal, s.after)
}
