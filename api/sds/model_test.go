package sds

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"pgregory.net/rapid"
)

// model is a proxy that keeps the xDS protocol's books: what it asked for, and what it was sent since it asked.
type model struct {
	sub      *subscription
	secrets  *Secrets
	asked    map[string]bool
	wildcard bool
	explicit bool
	first    bool
	// has is the version that the proxy holds of a name, or absent where it was told so.
	has   map[string]string
	nonce uint64
}

// modelNames are few, so that they meet often: two that exist as aliases only, four that a wildcard can bring, one
// that never exists, and a file.
var modelNames = []string{"alias-1", "alias-2", "id-1", "id-2", "id-3", "id-4", "nobody", "file-root:/r"}

// TestSubscriptionModel drives the state machine of both protocols with requests, rotations and resumptions in any
// order, and holds every answer against the books.
func TestSubscriptionModel(t *testing.T) {
	for _, p := range []Protocol{SotW, Delta} {
		t.Run(string(p), rapid.MakeCheck(func(t *rapid.T) {
			limits := Limits{AnswerBytes: rapid.SampledFrom([]int{1, 150, 1 << 20}).Draw(t, "answer bytes")}.withDefaults()
			sub := newSubscription(p, &limits, DefaultSystemBundle)
			m := &model{
				sub: &sub, first: true,
				asked: map[string]bool{}, has: map[string]string{},
			}
			actions := map[string]func(*rapid.T){
				"rotate": m.rotate,
				"":       m.answer,
			}
			if p == SotW {
				actions["restate"] = m.restate
			} else {
				actions["change"] = m.change
			}
			t.Repeat(actions)
		}))
	}
}

// rotate draws which secrets exist, and in which version.
func (m *model) rotate(t *rapid.T) {
	s := &Secrets{}
	for v := range s.byName {
		s.byName[v] = map[string]*resource{}
	}
	for _, name := range modelNames[:6] {
		n := rapid.IntRange(0, 2).Draw(t, name)
		if n == 0 {
			continue
		}
		s.byName[validateSPIFFE][name] = &resource{
			name: name, version: fmt.Sprintf("%s@%d", name, n),
			secret: func() (*tlsv3.Secret, error) { return &tlsv3.Secret{Name: name}, nil },
		}
		if name[0] == 'i' {
			s.own = append(s.own, name)
		}
	}
	slices.Sort(s.own)
	m.secrets = s
}

func (m *model) restate(t *rapid.T) {
	names := rapid.SliceOfN(rapid.SampledFrom(append([]string{"*", ""}, modelNames...)), 0, 6).Draw(t, "names")
	if _, err := m.sub.restate(names); err != nil {
		t.Fatal(err)
	}
	asked, wildcard := map[string]bool{}, slices.Contains(names, "*")
	for _, name := range names {
		if name != "*" && name != "" {
			asked[name] = true
		}
	}
	if len(asked) > 0 || wildcard {
		m.explicit = true
	} else if !m.explicit {
		wildcard = true
	}
	for name := range asked {
		if !m.asked[name] {
			delete(m.has, name) // newly asked for: sent even if a wildcard had brought it
		}
	}
	for name := range m.has {
		if !asked[name] && (m.asked[name] || !wildcard) {
			delete(m.has, name)
		}
	}
	m.asked, m.wildcard, m.first = asked, wildcard, false
}

func (m *model) change(t *rapid.T) {
	draw := rapid.SliceOfN(rapid.SampledFrom(append([]string{"*"}, modelNames...)), 0, 3)
	subscribe, unsubscribe := draw.Draw(t, "subscribe"), draw.Draw(t, "unsubscribe")
	if err := m.sub.change(subscribe, unsubscribe, m.first); err != nil {
		t.Fatal(err)
	}
	if m.first && len(subscribe) == 0 && len(unsubscribe) == 0 {
		m.wildcard = true
	}
	for _, name := range subscribe {
		if name == "*" {
			m.wildcard = true
			for name := range m.has {
				if !m.asked[name] {
					m.has[name] = "forgotten" // sent again, or called gone
				}
			}
		}
	}
	for _, name := range subscribe {
		if name != "*" {
			m.asked[name] = true
			delete(m.has, name)
		}
	}
	for _, name := range unsubscribe {
		if name != "*" && m.asked[name] {
			delete(m.asked, name)
			delete(m.has, name)
			if m.wildcard {
				m.has[name] = "forgotten" // the wildcard still brings it, or it is called gone
			}
		}
	}
	if slices.Contains(unsubscribe, "*") {
		m.wildcard = false
		maps.DeleteFunc(m.has, func(name, _ string) bool { return !m.asked[name] })
	}
	m.first = false
}

// answer takes all answers that are due, and checks each of them and where they lead.
func (m *model) answer(t *rapid.T) {
	if m.first {
		return
	}
	for more := true; more; {
		m.nonce++
		var a answer
		var err error
		if a, _, more, err = m.sub.next(m.secrets, m.nonce); err != nil {
			t.Fatal(err)
		}
		m.check(t, a)
		if more && a.empty() {
			t.Fatal("an empty answer promises more")
		}
	}
	for name := range m.wanted() {
		version, known := m.version(name)
		switch {
		case known && m.has[name] != version:
			t.Fatalf("the proxy has %q of %s, and the server %q", m.has[name], name, version)
		case !known && m.sub.delta && m.secrets != nil && m.asked[name] && m.has[name] != absent:
			t.Fatalf("the proxy was not told that there is no %s", name)
		}
	}
	for name, version := range m.has {
		if _, known := m.version(name); m.sub.delta && !known && version != absent && m.secrets != nil {
			t.Fatalf("the proxy still holds %s, which is gone", name)
		}
	}
	if a, unknown, more, _ := m.sub.next(m.secrets, m.nonce+1); !a.empty() || len(unknown) > 0 || more {
		t.Fatal("with nothing changed there is another answer")
	}
	if m.sub.asked != len(m.asked) || m.sub.wildcard != m.wildcard {
		t.Fatalf("%d names are asked for (wildcard %v), counted %d (%v)", len(m.asked), m.wildcard, m.sub.asked, m.sub.wildcard)
	}
	m.counts(t)
}

// counts holds what the subscription keeps running totals of against its entries.
func (m *model) counts(t *rapid.T) {
	bytes, cost := 0, 0
	var unserved []string
	for name, h := range m.sub.names {
		cost += keeping + len(name)
		if strings.HasPrefix(name, "file-") {
			cost += 2 * len(name)
		}
		if h.asked {
			bytes += len(name)
		}
		if h.version == absent {
			unserved = append(unserved, name)
		}
	}
	slices.Sort(unserved)
	if m.sub.bytes != bytes || m.sub.cost() != cost || !slices.Equal(m.sub.unknown(len(modelNames)), unserved) {
		t.Fatalf("%d bytes are asked for, which cost %d, %q are unknown; counted %d, %d, %q",
			bytes, cost, unserved, m.sub.bytes, m.sub.cost(), m.sub.unknown(len(modelNames)))
	}
}

// check takes one answer into the books.
func (m *model) check(t *rapid.T, a answer) {
	wanted := m.wanted()
	for _, r := range a.resources {
		version, known := m.version(r.GetName())
		if !known || version != r.GetVersion() || !wanted[r.GetName()] {
			t.Fatalf("%s %s was sent, unasked or out of nothing", r.GetName(), r.GetVersion())
		}
		if m.has[r.GetName()] == version {
			t.Fatalf("%s was sent twice", r.GetName())
		}
		m.has[r.GetName()] = version
	}
	if len(a.removed) > 0 && !m.sub.delta {
		t.Fatal("SotW cannot say what is gone")
	}
	for _, name := range a.removed {
		if _, known := m.version(name); known && wanted[name] {
			t.Fatalf("%s was called gone, and it is there", name)
		}
		if m.has[name] == absent && m.asked[name] {
			t.Fatalf("%s was called gone twice", name)
		}
		if m.asked[name] {
			m.has[name] = absent
		} else {
			delete(m.has, name)
		}
	}
	if !m.sub.delta {
		// The protocol cannot say so: the proxy keeps what it holds, and is sent the next one that exists.
		maps.DeleteFunc(m.has, func(name, _ string) bool { _, known := m.version(name); return !known })
	}
}

// wanted are the names that the proxy asks for now.
func (m *model) wanted() map[string]bool {
	all := maps.Clone(m.asked)
	if m.wildcard && m.secrets != nil {
		for _, name := range m.secrets.own {
			all[name] = true
		}
	}
	return all
}

func (m *model) version(name string) (version string, known bool) {
	if f, ok := parseFileName(name, DefaultSystemBundle); ok {
		return newFile(name, f).version, true
	}
	if r := m.secrets.lookup(name, validateSPIFFE); r != nil {
		return r.version, true
	}
	return "", false
}
