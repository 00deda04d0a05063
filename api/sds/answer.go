package sds

import (
	"slices"
	"strings"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// answer is one response, whichever protocol it goes out by.
type answer struct {
	nonce     uint64
	resources []*discoveryv3.Resource
	// removed are names that are not served (delta only).
	removed []string
	// context: a validation context is among them.
	context bool
	version string
	// size is about how many bytes it has.
	size int
}

func (a *answer) empty() bool { return len(a.resources) == 0 && len(a.removed) == 0 }

// names are those that it speaks of, at most limit.
func (a *answer) names(limit int) []string {
	var names []string
	for _, r := range a.resources[:min(limit, len(a.resources))] {
		names = append(names, r.GetName())
	}
	return append(names, a.removed[:min(limit-len(names), len(a.removed))]...)
}

// seal gives the answer its version: that of the one secret in it, or of all of them together.
func (a *answer) seal() {
	if len(a.resources) == 1 && len(a.removed) == 0 {
		a.version = a.resources[0].GetVersion()
		return
	}
	d := newDigest("answer", "")
	for _, r := range a.resources {
		d.add([]byte(r.GetVersion()))
	}
	for _, name := range a.removed {
		d.add([]byte(name))
	}
	a.version = d.String()
}

// due is what a stream has not been sent of the secrets of now.
type due struct {
	resources []*resource
	// gone are names that are asked for, or that a wildcard brought, and are not served.
	gone []string
}

// next makes the next answer out of what is due, at most AnswerBytes of it unless a single secret is larger, and takes
// it for sent. more tells that another answer is due at once. unknown are the names that have newly come to nothing.
func (b *subscription) next(s *Secrets, nonce uint64) (a answer, unknown []string, more bool, err error) {
	d := b.due(s)
	a.nonce = nonce
	defer a.seal()
	for _, r := range d.resources {
		wire, err := r.encoded()
		if err != nil {
			return answer{}, nil, false, err
		}
		if !a.fits(len(r.name)+len(r.version)+len(wire.GetResource().GetValue()), b.limits.AnswerBytes) {
			return a, unknown, true, nil
		}
		a.resources = append(a.resources, wire)
		a.context = a.context || r.context
		b.put(r.name, held{version: r.version, asked: b.names[r.name].asked})
	}
	for _, name := range d.gone {
		if b.delta {
			if !a.fits(len(name), b.limits.AnswerBytes) {
				return a, unknown, true, nil
			}
			a.removed = append(a.removed, name)
		}
		if !b.names[name].asked {
			b.drop(name)
			continue
		}
		unknown = append(unknown, name)
		b.put(name, held{version: absent, asked: true})
	}
	b.all, b.changed = false, nil
	return a, unknown, false, nil
}

// fits counts a part of n bytes in, if that keeps the answer below limit or is the first.
func (a *answer) fits(n, limit int) bool {
	n += overhead
	if a.size+n > limit && !a.empty() {
		return false
	}
	a.size += n
	return true
}

// overhead is room for the tags and lengths around a name, a version and a value.
const overhead = 32

// due compares what is asked for with what was sent, as far as either may have changed. Both lists are in order of name.
// While s is nil only files are known, and nothing is unknown.
func (b *subscription) due(s *Secrets) due {
	if s != b.secrets {
		b.secrets, b.all, b.changed = s, true, nil
	}
	var d due
	if b.all {
		b.looked += len(b.names)
		for name, h := range b.names {
			b.consider(&d, s, name, h)
		}
	} else {
		slices.Sort(b.changed)
		b.changed = slices.Compact(b.changed)
		b.looked += len(b.changed)
		for _, name := range b.changed {
			if h, known := b.names[name]; known {
				b.consider(&d, s, name, h)
			}
		}
	}
	if b.wildcard && s != nil {
		for _, name := range s.own {
			if _, seen := b.names[name]; !seen {
				b.consider(&d, s, name, held{})
			}
		}
	}
	slices.SortFunc(d.resources, func(x, y *resource) int { return strings.Compare(x.name, y.name) })
	slices.Sort(d.gone)
	return d
}

// consider puts a name into d if something is to be said of it.
func (b *subscription) consider(d *due, s *Secrets, name string, h held) {
	if !h.asked && !(b.wildcard && s.owns(name)) {
		if s != nil {
			d.gone = append(d.gone, name)
		}
		return
	}
	if r := s.lookup(name, b.validation); r != nil {
		b.contexts = b.contexts || r.context
		if r.version != h.version {
			d.resources = append(d.resources, r)
		}
		return
	}
	if f, ok := parseFileName(name, b.systemBundle); ok {
		if r := newFile(name, f); r.version != h.version {
			d.resources = append(d.resources, r)
		}
		return
	}
	if s != nil && h.version != absent {
		d.gone = append(d.gone, name)
	}
}
