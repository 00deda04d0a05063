package policy

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strconv"
)

// Basis stands for the rules that were read for a decision: what each grants or denies, and on what condition, up to the
// one that decided. As long as policy stands, in this sense, the same workload with the same labels gets the same. It is
// no secret and proves nothing. Zero stands for nothing.
type Basis uint64

// String is 16 hex digits; empty for zero.
func (b Basis) String() string {
	if b == 0 {
		return ""
	}
	return fmt.Sprintf("%016x", uint64(b))
}

// ParseBasis reads what String wrote; zero where it did not write it.
func ParseBasis(s string) Basis {
	n, err := strconv.ParseUint(s, 16, 64)
	if err != nil || len(s) != 16 {
		return 0
	}
	return Basis(n)
}

func basisOf(r *rule) Basis { return Basis(0).and(r) }

// and goes on to a further rule (FNV-1a's step, on 64 bits at a time).
func (b Basis) and(r *rule) Basis {
	next := (uint64(b) ^ r.sum) * 1099511628211
	return Basis(max(next, 1))
}

// summed gives the rule its sum.
func (r *rule) summed() {
	h := sha256.New()
	write := func(s string) { fmt.Fprintf(h, "%d:%s", len(s), s) }
	if r.when != nil {
		write("when " + r.when.text)
	}
	if r.denied {
		write("deny")
	} else {
		g := &r.grant
		write(g.id.String())
		write(g.ttl.String())
		for _, name := range g.dnsNames {
			write(name.String())
		}
		write(fmt.Sprint(g.direct, g.nodeVouched, g.serverKeys))
	}
	r.sum = binary.BigEndian.Uint64(h.Sum(nil))
}

// Stands reports whether the rules on which an earlier decision about the workload rests are still the first that are
// for it. Then the decision would be the same, unless the workload's labels have changed.
func (p *Policy) Stands(in Input, earlier Basis) bool {
	var b Basis
	for _, r := range p.about(&in) {
		if b = b.and(r); b == earlier {
			return true
		}
	}
	return false
}

// Foresee decides what can be decided by names alone. certain reports whether that holds for every pod of the service
// account; where it does not, there is neither decision nor error.
func (p *Policy) Foresee(in Input) (d Decision, certain bool, err error) {
	about := p.about(&in)
	if len(about) > 0 && about[0].when != nil {
		return Decision{}, false, nil
	}
	if len(about) == 0 {
		return Decision{}, true, p.noRule(&in)
	}
	d, err = p.decide(context.Background(), &in, nil) // no condition is asked, so nothing can last
	return d, true, err
}

// about are the rules that can come to decide about the workload: those for it, up to the first without a condition.
func (p *Policy) about(in *Input) []*rule {
	if len(p.rules) == 0 {
		return []*rule{&p.plain}
	}
	var about []*rule
	for i := range p.rules {
		r := &p.rules[i]
		if r.mismatch(in) != anything {
			continue
		}
		about = append(about, r)
		if r.when == nil {
			break
		}
	}
	return about
}
