package rotation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
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
}

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
	by  string
	end time.Time
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

func (m *mesh) SwapRollout(_ context.Context, version uint64, next Rollout) error {
	if version != m.version {
		return ErrConflict
	}
	return m.at(func() { m.record, m.version = next, version+1 })
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
		if slices.Contains(m.trusted(), p.ID) {
			m.sets = append(m.sets, slices.DeleteFunc(slices.Clone(m.trusted()), func(id string) bool { return id == p.ID }))
		}
	})
}

func (m *mesh) Unconfirmed(_ context.Context, set uint64, _ time.Time) (names []string, err error) {
	for name, a := range m.agents {
		if a.holds.After(m.now) && a.confirmed < set {
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
	err = m.at(func() { m.assigned = r })
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
	if !slices.Contains(m.trusted(), by) {
		t.Fatalf("%s signs and is not trusted by the set %v", by, m.trusted())
	}
	if r := m.record; r.Goes().ID == by && (r.Step == StepRetired || r.Step == StepLeaving || r.Step == StepOut) {
		t.Fatalf("%s has retired and signs", by)
	}
	if by == m.record.New.ID && m.record.Within == 0 {
		for name, a := range m.agents {
			if a.holds.After(m.now) && !slices.Contains(m.record.Despite, name) && (a.confirmed == 0 || !slices.Contains(m.sets[a.confirmed-1], by)) {
				t.Fatalf("%s signs, and %s (confirmed %d of %d) does not trust it", by, name, a.confirmed, len(m.sets))
			}
		}
	}
	// Who has not counted connects first, and that brings the newest set.
	if a := m.agents[agent]; !a.holds.After(m.now) {
		a.confirmed = uint64(len(m.sets))
	}
	end := m.now.Add(ttl)
	m.certs = append(m.certs, modelCert{by, end})
	if a := m.agents[agent]; end.After(a.holds) {
		a.holds = end
	}
}

// TestNobodyMeetsAnAuthorityThatHeDoesNotTrust drives Rollouts through processes that die at any call, agents that
// vanish and return, and operators who change their minds.
func TestNobodyMeetsAnAuthorityThatHeDoesNotTrust(t *testing.T) {
	for range 20 { // rapid's own hundred are few for a state of this size
		rapid.Check(t, rollAbout)
	}
}

func rollAbout(t *rapid.T) {
	m := &mesh{now: time.Unix(1<<30, 0), sets: [][]string{{"root0"}}, agents: map[string]*modelAgent{}, prepared: map[string]bool{"root0": true}, die: func() death { return lives }}
	for i := range 3 {
		m.agents[fmt.Sprint("agent", i)] = &modelAgent{confirmed: 1}
	}
	process := func() *Roller {
		x := NewRoller(RollerOptions{Journal: m, Authorities: m})
		x.now = func() time.Time { return m.now }
		return x
	}
	x := process()
	active, roots := Party{ID: "root0"}, 1
	agent := rapid.SampledFrom([]string{"agent0", "agent1", "agent2"})
	command := func(f func(Rollout) (Rollout, error)) { _, _ = x.Change(t.Context(), f) }
	settle := func() { // the one that signs alone
		if r := m.record; r.Step == StepOut {
			active = r.Stays()
		}
	}
	restart := func() {
		x = process()
		m.prepared = map[string]bool{}
		m.assigned, _ = x.Resume(t.Context())
	}
	t.Repeat(map[string]func(*rapid.T){
		"begin": func(t *rapid.T) {
			settle()
			o := BeginOptions{Canary: rapid.SampledFrom([]int{0, 5, 50}).Draw(t, "canary")}
			command(func(r Rollout) (Rollout, error) {
				next, err := Begin(r, active, Party{ID: fmt.Sprint("root", roots)}, o, m.now)
				if err == nil {
					roots++
				}
				return next, err
			})
		},
		"move":     func(t *rapid.T) { x.Move(t.Context()) },
		"continue": func(*rapid.T) { command(func(r Rollout) (Rollout, error) { return r.Continue(m.now) }) },
		"abort":    func(*rapid.T) { command(func(r Rollout) (Rollout, error) { return r.Abort("op", m.now) }) },
		"give up": func(t *rapid.T) {
			command(func(r Rollout) (Rollout, error) { return r.GiveUp(agent.Draw(t, "agent")) })
		},
		"issue": func(t *rapid.T) {
			name := agent.Draw(t, "agent")
			m.sign(t, name, fmt.Sprint(rapid.IntRange(0, 99).Draw(t, "identity")), time.Duration(rapid.IntRange(1, 360).Draw(t, "minutes"))*time.Minute)
		},
		"confirm": func(t *rapid.T) { m.agents[agent.Draw(t, "agent")].confirmed = uint64(len(m.sets)) },
		"wait": func(t *rapid.T) {
			m.now = m.now.Add(time.Duration(rapid.IntRange(1, 600).Draw(t, "minutes")) * time.Minute)
		},
		"die": func(t *rapid.T) {
			after, how := rapid.IntRange(0, 3).Draw(t, "calls"), rapid.SampledFrom([]death{diesBefore, diesBehind}).Draw(t, "how")
			m.die = func() death {
				if after--; after < 0 {
					return how
				}
				return lives
			}
			for range 4 {
				x.Move(t.Context())
				if after < 0 {
					break
				}
			}
			m.die = func() death { return lives }
			restart()
		},
		"": func(t *rapid.T) {
			for _, c := range m.certs {
				if c.end.After(m.now) && !slices.Contains(m.trusted(), c.by) {
					t.Fatalf("a certificate of %s lives until %s, and the set is %v", c.by, c.end, m.trusted())
				}
			}
		},
	})
	// Left in peace, it ends.
	for range 20 {
		for _, a := range m.agents {
			a.confirmed = uint64(len(m.sets))
		}
		command(func(r Rollout) (Rollout, error) { return r.Continue(m.now) })
		for x.Move(t.Context()) {
		}
		m.now = m.now.Add(time.Hour)
	}
	if m.record.Active() {
		t.Fatalf("it hangs in %s: %+v", m.record.Step, x.standing.Value())
	}
	if settle(); len(m.trusted()) != 1 || m.trusted()[0] != active.ID {
		t.Fatalf("%s stays, and trusted are %v", active.ID, m.trusted())
	}
}
