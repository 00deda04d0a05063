package rotation

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"pgregory.net/rapid"
)

// mesh is what a Rollout moves, made of a few variables: the trusted set, agents that confirm it or not, certificates
// that live. It dies where it is told to: the call returns, with its effect or without, and the process is gone.
type mesh struct {
	now     time.Time
	record  Rollout
	version uint64

	sets   [][]string // trusted sets by sequence-1
	agents map[string]*modelAgent
	certs  []modelCert

	assigned Rollout // what this process signs by
	prepared map[string]bool
	die      func() death

	// What operators did, as the test saw it.
	taints  map[string][]taintSeen
	may     map[string]time.Time       // when a root may sign though it is not confirmed
	despite map[string]map[string]bool // by root: whose confirmation was given up
	ordered []orderSeen
	wrong   string
	// imported is how many were taken into the set by a command.
	imported int
	// wanted are those of them that nobody has begun to replace since.
	wanted map[string]bool

	// What restores need to know: the backup, if there is one, the sequence of the set that was put back last, and who was
	// tainted and not in the set when one was put back.
	backup *kept
	floor  uint64
	left   map[string]bool
	// dark are those that had no intermediate when this process began, for they must not sign: they get none any more.
	dark map[string]bool
}

// taintSeen is a taint that was taken, orderSeen an order to renew all that was issued before.
type (
	taintSeen struct {
		at     time.Time
		within time.Duration
	}
	orderSeen struct {
		at     time.Time
		within time.Duration
	}
)

type death int

const (
	lives death = iota
	diesBefore
	diesBehind
)

type modelAgent struct {
	confirmed uint64
	holds     time.Time // it counts until then
}

type modelCert struct {
	by         string
	begin, end time.Time
}

var errDead = errors.New("the process died")

// at runs the effect of a call at which the process may die.
func (m *mesh) at(effect func()) error {
	d := m.die()
	if d != diesBefore {
		effect()
	}
	if d != lives {
		return errDead
	}
	return nil
}

func (m *mesh) Rollout(context.Context) (Rollout, uint64, error) { return m.record, m.version, nil }

func (m *mesh) SwapRollout(_ context.Context, version uint64, next Rollout) (err error) {
	// The version is looked at when the store has the call: a command may have come before.
	died := m.at(func() {
		if version != m.version {
			err = ErrConflict
			return
		}
		m.record, m.version = next, version+1
		m.excuse()
	})
	return cmp.Or(died, err)
}

func (m *mesh) trusted() []string { return m.sets[len(m.sets)-1] }

func (m *mesh) Publish(_ context.Context, p Party) (uint64, error) {
	err := m.at(func() {
		if !slices.Contains(m.trusted(), p.ID) {
			m.sets = append(m.sets, append(slices.Clone(m.trusted()), p.ID))
		}
	})
	return uint64(len(m.sets)), err
}

func (m *mesh) Withdraw(_ context.Context, p Party) error {
	return m.at(func() {
		m.justify(p.ID)
		if slices.Contains(m.trusted(), p.ID) {
			m.sets = append(m.sets, slices.DeleteFunc(slices.Clone(m.trusted()), func(id string) bool { return id == p.ID }))
		}
	})
}

// justify wants a reason for what is withdrawn while certificates under it live: it was tainted, and they were ordered to
// be renewed and had half of the bound for that, or the whole bound is over.
func (m *mesh) justify(id string) {
	for _, c := range m.certs {
		if c.by != id || !c.end.After(m.now) || !slices.Contains(m.trusted(), id) || m.left[id] {
			continue
		}
		late := slices.ContainsFunc(m.taints[id], func(x taintSeen) bool { return !m.now.Before(x.at.Add(x.within)) })
		renewed := slices.ContainsFunc(m.ordered, func(o orderSeen) bool { return !c.begin.After(o.at) && !m.now.Before(o.at.Add(o.within/2)) })
		if len(m.taints[id]) == 0 || !late && !renewed {
			m.wrong = fmt.Sprintf("%s leaves at %s, a certificate of it lives from %s until %s; taints %v, orders %v", id, m.now, c.begin, c.end, m.taints[id], m.ordered)
		}
	}
}

func (m *mesh) Unconfirmed(_ context.Context, set uint64, _ time.Time) (names []string, err error) {
	for name, a := range m.agents {
		if a.holds.After(m.now) && a.confirmed < max(set, m.floor) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, m.at(func() {})
}

func (m *mesh) Prepare(_ context.Context, p Party) error {
	return m.at(func() { m.prepared[p.ID] = true })
}

func (m *mesh) Assign(_ context.Context, r Rollout) (end time.Time, err error) {
	err = m.at(func() {
		m.assigned = r
		if r.Step == StepSigning && r.Within > 0 {
			m.ordered = append(m.ordered, orderSeen{m.now, r.Within})
		}
	})
	for _, c := range m.certs {
		if c.by == r.Goes().ID && c.end.After(end) {
			end = c.end
		}
	}
	return end, err
}

// sign issues one certificate through an agent, as the process would.
func (m *mesh) sign(t *rapid.T, agent, identity string, ttl time.Duration) {
	by := m.assigned.Old.ID
	if InShare(identity, m.assigned.NewShare) {
		by = m.assigned.New.ID
	}
	if by == "" {
		by = m.trusted()[0]
	}
	if m.dark[by] || m.record.Barred(by) != nil {
		return
	}
	if !slices.Contains(m.trusted(), by) {
		t.Fatalf("%s signs and is not trusted by the set %v", by, m.trusted())
	}
	if r := m.record; r.Goes().ID == by && (r.Step == StepRetired || r.Step == StepLeaving || r.Step == StepOut) {
		t.Fatalf("%s has retired and signs", by)
	}
	if may, bound := m.may[by]; !bound || m.now.Before(may) {
		for name, a := range m.agents {
			if a.holds.After(m.now) && !m.despite[by][name] && !slices.Contains(m.sets[a.confirmed-1], by) {
				t.Fatalf("%s signs, and %s (confirmed %d of %d) does not trust it", by, name, a.confirmed, len(m.sets))
			}
		}
	}
	if !m.record.Active() && len(m.taints[by]) > 0 {
		t.Fatalf("%s is tainted, and signs, and nothing is under way", by)
	}
	// Who has not counted connects first, and that brings the newest set.
	if a := m.agents[agent]; !a.holds.After(m.now) {
		a.confirmed = uint64(len(m.sets))
	}
	end := m.now.Add(ttl)
	m.certs = append(m.certs, modelCert{by, m.now, end})
	if a := m.agents[agent]; end.After(a.holds) {
		a.holds = end
	}
}
