package sds

import (
	"slices"
	"strings"

	"github.com/meshca/meshca/api/refusal"
)

// subscription is what one stream asks for and what it was sent: the state machine of the xDS protocol, without the
// wire. It is owned by the stream's goroutine.
type subscription struct {
	limits       *Limits
	systemBundle string
	// delta: answers can say what is gone, and requests change the subscription rather than restate it.
	delta      bool
	validation validation

	// names is written by put and drop alone, which keep the counts below.
	names  map[string]held
	asked  int // entries of names that are asked for by name
	bytes  int // their length together
	length int // what all names weigh
	// absent are the names that are asked for and not served, in no order; an entry knows its place.
	absent []string
	// wildcard: everything is asked for. explicit: some name was once asked for, so that an empty list no longer means
	// everything.
	wildcard, explicit bool

	// A stream may ask for thousands of names, and change one at a time for ever: next looks at the changed ones alone,
	// or with all at each, and at each when the secrets are others than last time.
	all     bool
	changed []string
	secrets *Secrets
	// contexts: a validation context of ours was due, or known to be there, once.
	contexts bool
	// looked counts the names that were looked at: what the peer is charged for.
	looked int
}

// held is what a stream knows of one name.
type held struct {
	// version is what was sent last, or absent; empty if nothing was.
	version string
	// asked: by name. Otherwise the entry stands for what a wildcard brought.
	asked bool
	// place in subscription.absent, if the version is absent.
	place uint32
}

// absent stands in held.version for a name that is not served: the peer was told so, or cannot be told.
const absent = "absent"

func newSubscription(p Protocol, limits *Limits, systemBundle string) subscription {
	return subscription{limits: limits, systemBundle: systemBundle, delta: p == Delta, names: map[string]held{}, all: true}
}

// put makes h what is known of a name.
func (b *subscription) put(name string, h held) {
	was, known := b.names[name]
	if !known {
		b.length += weight(name)
	}
	b.count(name, was.asked, -1)
	b.count(name, h.asked, 1)
	switch {
	case was.version == h.version:
		h.place = was.place
	case was.version == absent:
		b.unlist(was.place)
	case h.version == absent:
		h.place = uint32(len(b.absent))
		b.absent = append(b.absent, name)
	}
	b.names[name] = h
}

// drop forgets a name.
func (b *subscription) drop(name string) {
	was, known := b.names[name]
	if !known {
		return
	}
	b.length -= weight(name)
	b.count(name, was.asked, -1)
	if was.version == absent {
		b.unlist(was.place)
	}
	delete(b.names, name)
}

func (b *subscription) count(name string, asked bool, n int) {
	if asked {
		b.asked += n
		b.bytes += n * len(name)
	}
}

// unlist takes a place out of absent; the last name moves there.
func (b *subscription) unlist(place uint32) {
	last := len(b.absent) - 1
	name := b.absent[last]
	moved := b.names[name]
	moved.place = place
	b.names[name], b.absent[place] = moved, name
	if b.absent = b.absent[:last]; last == 0 {
		b.absent = nil
	}
}

// look makes next look at a name.
func (b *subscription) look(name string) {
	switch {
	case b.all:
	case len(b.changed) >= len(b.names): // a peer that does not read its answers cannot make the list grow
		b.all, b.changed = true, nil
	default:
		b.changed = append(b.changed, name)
	}
}

// restate makes names the whole of what is asked for (SotW), and reports whether that is a change.
func (b *subscription) restate(names []string) (changed bool, err error) {
	names, wildcard := split(names)
	switch {
	case len(names) > 0 || wildcard:
		b.explicit = true
	case !b.explicit:
		wildcard = true
	}
	if wildcard == b.wildcard && b.asksExactly(names) {
		return false, nil
	}
	next := &subscription{limits: b.limits, names: make(map[string]held, len(names)), all: true}
	for _, name := range names {
		if h := b.names[name]; h.asked {
			next.put(name, h)
		} else if err := next.ask(name); err != nil {
			return false, err
		}
	}
	if err := next.check(); err != nil {
		return false, err
	}
	for name, h := range b.names {
		if _, again := next.names[name]; wildcard && !h.asked && !again {
			next.put(name, h)
		}
	}
	b.names, b.asked, b.bytes, b.length, b.absent = next.names, next.asked, next.bytes, next.length, next.absent
	b.wildcard, b.all, b.changed = wildcard, true, nil
	return true, nil
}

// change adds and removes names (delta). What is subscribed to is sent even if it was sent before: the peer may have
// forgotten it.
func (b *subscription) change(subscribe, unsubscribe []string, first bool) error {
	if first && len(subscribe) == 0 && len(unsubscribe) == 0 {
		b.wildcard, b.all = true, true
		return nil
	}
	subscribe, all := split(subscribe)
	if all {
		b.wildcard, b.all, b.changed = true, true, nil
		b.forgetUnasked(true)
	}
	for _, name := range subscribe {
		if err := b.ask(name); err != nil {
			return err
		}
	}
	unsubscribe, none := split(unsubscribe)
	for _, name := range unsubscribe {
		b.unask(name)
	}
	if none {
		b.wildcard = false
		b.forgetUnasked(false)
	}
	return nil
}

// ask subscribes to one name, anew if it was already.
func (b *subscription) ask(name string) error {
	if len(name) > maxName {
		return refusal.New(refusal.RequestMalformed, "a secret's name of %d bytes was asked for, and none is longer than %d",
			len(name), maxName).On("resource_names")
	}
	b.put(name, held{asked: true})
	b.look(name)
	return b.check()
}

// check holds what is asked for by name to the limits.
func (b *subscription) check() error {
	switch {
	case b.asked > b.limits.Names:
		return refusal.New(refusal.PeerLimit, "the stream asks for more than %d names (limit: %s)", b.limits.Names, b.limits.called("Names"))
	case b.bytes > b.limits.NameBytes+b.limits.SpareNameBytes: // before many are kept, of which charge would hear then
		return refusal.New(refusal.PeerLimit, "the names that the stream asks for are longer than %d bytes together (limits: %s and %s)",
			b.limits.NameBytes+b.limits.SpareNameBytes, b.limits.called("NameBytes"), b.limits.called("SpareNameBytes"))
	}
	return nil
}

// keeping is what a name takes besides its own length: the entry, the version that was sent.
const keeping = 128

// weight is what a name takes by its length: a `file-` name is in its secret twice, for as long as that waits to be read.
func weight(name string) int {
	if strings.HasPrefix(name, prefixFile) {
		return 3 * len(name)
	}
	return len(name)
}

// cost is what the names take in memory, in bytes. Those of a first request that resumes count too.
func (b *subscription) cost() int { return len(b.names)*keeping + b.length }

func (b *subscription) unask(name string) {
	if !b.names[name].asked {
		return
	}
	if b.wildcard {
		// The peer cannot know whether the wildcard still brings it: the next answer says (xDS protocol, "Unsubscribing
		// from Resources").
		b.put(name, held{})
		b.look(name)
		return
	}
	b.drop(name)
}

// forgetUnasked drops what a wildcard brought, or with again only that it was sent.
func (b *subscription) forgetUnasked(again bool) {
	b.looked += len(b.names)
	for name, h := range b.names {
		switch {
		case h.asked:
		case again:
			b.put(name, held{})
		default:
			b.drop(name)
		}
	}
}

// resume takes from a peer's first request what it already has, so that it is not sent again: versions are hashes of
// name and content, the same in every process.
func (b *subscription) resume(versions map[string]string) {
	for name, v := range versions {
		h := b.names[name]
		if (!h.asked && !b.wildcard) || len(v) > sizeVersion || v == absent || len(name) > maxName {
			continue
		}
		if !h.asked && len(b.names) >= b.limits.Names {
			continue
		}
		h.version = v
		b.put(name, h)
	}
}

// resumeOne is resume for SotW, where a version stands for a whole answer: with one name it is that secret's.
func (b *subscription) resumeOne(version string) {
	if b.wildcard || b.asked != 1 || version == "" {
		return
	}
	for name := range b.names {
		b.resume(map[string]string{name: version})
	}
}

// unknown lists names that are asked for and not served, at most limit, in order; nil where there is none.
func (b *subscription) unknown(limit int) []string {
	return slices.Sorted(slices.Values(b.absent[:min(limit, len(b.absent))]))
}

func (b *subscription) asksExactly(names []string) bool {
	if len(names) != b.asked {
		return false
	}
	for _, name := range names {
		if !b.names[name].asked {
			return false
		}
	}
	return true
}

// split takes the wildcard and empty names out of a list, and repetitions.
func split(names []string) (rest []string, wildcard bool) {
	if len(names) == 1 && names[0] != nameWildcard && names[0] != "" {
		return names, false
	}
	rest = slices.Clone(names)
	slices.Sort(rest)
	rest = slices.Compact(rest)
	rest = slices.DeleteFunc(rest, func(name string) bool {
		wildcard = wildcard || name == nameWildcard
		return name == "" || name == nameWildcard
	})
	return rest, wildcard
}
