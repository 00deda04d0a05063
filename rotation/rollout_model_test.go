package rotation

import (
	"cmp"
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

	// What operators did, as the test saw it.
	taints  map[string][]taintSeen
	may     map[string]time.Time       // when a root may sign though it is not confirmed
	despite map[string]map[string]bool // by root: whose confirmation was given up
	ordered []orderSeen
	wrong   string
	// imported is how many were taken into the set by a command.
	imported int
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
		if c.by != id || !c.end.After(m.now) || !slices.Contains(m.trusted(), id) {
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

// TestNobodyMeetsAnAuthorityThatHeDoesNotTrust drives Rollouts through processes that die at any call, agents that
// vanish and return, and operators who change their minds.
func TestNobodyMeetsAnAuthorityThatHeDoesNotTrust(t *testing.T) {
	for range 100 { // rapid's own hundred are few for a state of this size
		rapid.Check(t, rollAbout)
	}
}

func rollAbout(t *rapid.T) {
	m := &mesh{now: time.Unix(1<<30, 0), sets: [][]string{{"root0"}}, agents: map[string]*modelAgent{}, prepared: map[string]bool{"root0": true}, die: func() death { return lives },
		taints: map[string][]taintSeen{}, may: map[string]time.Time{}, despite: map[string]map[string]bool{}}
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
	command := func(f func(Rollout) (Rollout, error)) bool { _, err := x.Change(t.Context(), f); return err == nil }
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
	// taint draws an order to do without a root, a party's more often than another one's.
	taint := func(t *rapid.T) func() {
		settle()
		what := Party{ID: fmt.Sprint("root", rapid.IntRange(0, roots).Draw(t, "root"))}
		party := rapid.SampledFrom([]string{"none", "signs", "stays", "goes"}).Draw(t, "party")
		e := Emergency{Within: time.Duration(rapid.IntRange(1, 400).Draw(t, "within")) * time.Minute}
		return func() {
			settle()
			e.Signs, e.Successor = active, Party{ID: fmt.Sprint("root", roots)}
			switch party {
			case "signs":
				what = active
			case "stays":
				what = m.record.Stays()
			case "goes":
				what = m.record.Goes()
			}
			if !command(func(r Rollout) (Rollout, error) { return r.Taint(what, "", e, m.now) }) {
				return
			}
			m.taints[what.ID] = append(m.taints[what.ID], taintSeen{m.now, e.Within})
			r := m.record
			anew := r.New.ID == e.Successor.ID
			if anew || what.ID == e.Successor.ID {
				roots++
			}
			if anew && r.Old.ID != what.ID { // which was tainted before, and has the new bound
				m.taints[r.Old.ID] = append(m.taints[r.Old.ID], taintSeen{m.now, e.Within})
			}
			if _, tainted := r.Tainted(what.ID); !tainted || r.Active() && what.ID == r.Stays().ID {
				t.Fatalf("%s is tainted, and it is %+v", what.ID, r)
			}
			if (r.Step == StepChosen || r.Step == StepPublished) && (anew || what.ID == r.Goes().ID) {
				may := m.now.Add(e.Within / 2)
				if have, bound := m.may[r.New.ID]; !bound || may.Before(have) {
					m.may[r.New.ID] = may
				}
			}
		}
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
		"begin with one of before": func(t *rapid.T) {
			settle()
			old := fmt.Sprint("root", rapid.IntRange(0, roots-1).Draw(t, "root"))
			begun := command(func(r Rollout) (Rollout, error) { return Begin(r, active, Party{ID: old}, BeginOptions{}, m.now) })
			if begun && len(m.taints[old]) > 0 {
				t.Fatalf("a rollout to %s, which is tainted", old)
			}
		},
		"taint": func(t *rapid.T) { taint(t)() },
		"taint amid a step": func(t *rapid.T) {
			after, order := rapid.IntRange(0, 5).Draw(t, "calls"), taint(t)
			m.die = func() death {
				if after--; after == -1 {
					order()
				}
				return lives
			}
			for range 4 {
				x.Move(t.Context())
			}
			m.die = func() death { return lives }
		},
		"import": func(*rapid.T) {
			m.sets = append(m.sets, append(slices.Clone(m.trusted()), fmt.Sprint("root", roots)))
			roots++
			m.imported++
		},
		"move":     func(t *rapid.T) { x.Move(t.Context()) },
		"continue": func(*rapid.T) { command(func(r Rollout) (Rollout, error) { return r.Continue(m.now) }) },
		"abort":    func(*rapid.T) { command(func(r Rollout) (Rollout, error) { return r.Abort("op", m.now) }) },
		"give up": func(t *rapid.T) {
			name := agent.Draw(t, "agent")
			if command(func(r Rollout) (Rollout, error) { return r.GiveUp(name) }) {
				if m.despite[m.record.New.ID] == nil {
					m.despite[m.record.New.ID] = map[string]bool{}
				}
				m.despite[m.record.New.ID][name] = true
			}
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
			if m.wrong != "" {
				t.Fatal(m.wrong)
			}
			for _, c := range m.certs {
				if c.end.After(m.now) && !slices.Contains(m.trusted(), c.by) && len(m.taints[c.by]) == 0 {
					t.Fatalf("a certificate of %s lives until %s, and the set is %v", c.by, c.end, m.trusted())
				}
			}
		},
	})
	// Left in peace, it ends.
	for range 30 {
		for _, a := range m.agents {
			a.confirmed = uint64(len(m.sets))
		}
		command(func(r Rollout) (Rollout, error) { return r.Continue(m.now) })
		for x.Move(t.Context()) {
		}
		m.now = m.now.Add(time.Hour)
	}
	if m.record.Active() || len(m.record.Behind) > 0 {
		t.Fatalf("it hangs in %s: %+v", m.record.Step, x.standing.Value())
	}
	if m.wrong != "" {
		t.Fatal(m.wrong)
	}
	settle()
	for _, id := range m.trusted() {
		if len(m.taints[id]) > 0 {
			t.Fatalf("%s is tainted, and trusted are %v", id, m.trusted())
		}
	}
	if !slices.Contains(m.trusted(), active.ID) || len(m.trusted()) > 1+m.imported {
		t.Fatalf("%s stays, and trusted are %v", active.ID, m.trusted())
	}
}
