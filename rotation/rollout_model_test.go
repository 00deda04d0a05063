package rotation

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestNobodyMeetsAnAuthorityThatHeDoesNotTrust drives Rollouts through processes that die at any call, agents that
// vanish and return, and operators who change their minds.
func TestNobodyMeetsAnAuthorityThatHeDoesNotTrust(t *testing.T) {
	for range 100 { // rapid's own hundred are few for a state of this size
		rapid.Check(t, func(t *rapid.T) { rollAbout(t, 1, false) })
	}
}

// TestNobodyMeetsATaintedKey is the same with roots of which two have one key: a taint of either is one of both.
func TestNobodyMeetsATaintedKey(t *testing.T) {
	for range 30 {
		rapid.Check(t, func(t *rapid.T) { rollAbout(t, 2, false) })
	}
}

// rollAbout has so many roots share a key. With restores, backups are taken and put back.
func rollAbout(t *rapid.T, share int, restores bool) {
	m := &mesh{now: time.Unix(1<<30, 0), sets: [][]string{{"root0"}}, agents: map[string]*modelAgent{}, prepared: map[string]bool{"root0": true}, die: func() death { return lives },
		taints: map[string][]taintSeen{}, may: map[string]time.Time{}, despite: map[string]map[string]bool{}, left: map[string]bool{}, wanted: map[string]bool{}}
	for i := range 3 {
		m.agents[fmt.Sprint("agent", i)] = &modelAgent{confirmed: 1}
	}
	process := func() *Roller {
		x := NewRoller(RollerOptions{Journal: m, Authorities: m})
		x.now = func() time.Time { return m.now }
		return x
	}
	x := process()
	root := func(n int) Party { return Party{ID: fmt.Sprint("root", n), Key: fmt.Sprint("key", n/share)} }
	party := func(id string) Party {
		n := 0
		for root(n).ID != id {
			n++
		}
		return root(n)
	}
	active, roots := root(0), 1 // from roots on nobody has seen any
	var inHand func()           // an order that is being made up
	// fresh is the number of one that nobody has seen, of a key that is not tainted, and not that of this one.
	fresh := func(not Party) int {
		n := roots
		for len(m.taints[root(n).ID]) > 0 || root(n).same(not) {
			n++
		}
		return n
	}
	used := func(n int) { roots = max(roots, n+1) }
	// told notes a taint, of all roots of the key.
	told := func(what Party, seen taintSeen) {
		for n := range roots + 2*share {
			if p := root(n); p.same(what) {
				m.taints[p.ID] = append(m.taints[p.ID], seen)
			}
		}
	}
	agent := rapid.SampledFrom([]string{"agent0", "agent1", "agent2"})
	command := func(f func(Rollout) (Rollout, error)) bool { _, err := x.Change(t.Context(), f); return err == nil }
	settle := func() { // the one that signs alone
		if r := m.record; r.Step == StepOut {
			active = r.Stays()
		}
	}
	restart := func() {
		x, inHand = process(), nil
		m.prepared = map[string]bool{}
		m.assigned, _ = x.Resume(t.Context())
		m.dark = map[string]bool{}
		for _, p := range []Party{m.record.Old, m.record.New} {
			m.dark[p.ID] = m.record.Barred(p.ID) != nil
		}
	}
	// taint draws an order to do without a root, a party's more often than another one's. Who signs and who can follow is as it
	// was when that was looked up: the upstream may have answered late.
	taint := func(t *rapid.T) (give func()) {
		settle()
		drawn := rapid.IntRange(0, roots).Draw(t, "root")
		what, party := root(drawn), rapid.SampledFrom([]string{"none", "signs", "stays", "goes"}).Draw(t, "party")
		switch party {
		case "signs":
			what = active
		case "stays":
			what = m.record.Stays()
		case "goes":
			what = m.record.Goes()
		}
		next := fresh(what)
		e := Emergency{Within: time.Duration(rapid.IntRange(1, 400).Draw(t, "within")) * time.Minute, First: active, Successor: root(next)}
		return func() {
			if party == "none" {
				used(drawn)
			}
			for n := range roots {
				if p := root(n); p.ID != what.ID && p.same(what) && slices.Contains(m.trusted(), p.ID) {
					e.Twins = append(e.Twins, p)
				}
			}
			before := m.record
			if !command(func(r Rollout) (Rollout, error) { return r.Taint(what, e, m.now) }) {
				return
			}
			told(what, taintSeen{m.now, e.Within})
			r := m.record
			anew := r.Active() && (!before.Active() || r.Old.ID != before.Old.ID || r.New.ID != before.New.ID)
			if anew {
				used(next)
			}
			if anew && !r.Old.same(what) { // which was tainted before, and has the new bound
				told(r.Old, taintSeen{m.now, e.Within})
			}
			for _, b := range r.Behind { // one that came back tainted has had no bound before
				if anew && restores && len(m.taints[b.ID]) > 0 && !b.By.After(m.now.Add(e.Within)) {
					told(b.Party, taintSeen{m.now, e.Within})
				}
			}
			if _, tainted := r.Tainted(what.ID); !tainted || r.Active() && what.same(r.Stays()) {
				t.Fatalf("%s is tainted, and it is %+v", what.ID, r)
			}
			if (r.Step == StepChosen || r.Step == StepPublished) && (anew || what.same(r.Goes())) {
				may := m.now.Add(e.Within / 2)
				if have, bound := m.may[r.New.ID]; !bound || may.Before(have) {
					m.may[r.New.ID] = may
				}
			}
		}
	}
	actions := map[string]func(*rapid.T){
		"make up a taint": func(t *rapid.T) { inHand = taint(t) },
		"make up a beginning": func(*rapid.T) {
			settle()
			old, n := active, fresh(Party{})
			inHand = func() {
				o := BeginOptions{Trusted: slices.Contains(m.trusted(), root(n).ID)}
				if command(func(r Rollout) (Rollout, error) { return Begin(r, old, root(n), o, m.now) }) {
					used(n)
					delete(m.wanted, old.ID)
				}
			}
		},
		"give the order": func(*rapid.T) {
			if inHand != nil {
				inHand()
			}
			inHand = nil
		},
		"begin": func(t *rapid.T) {
			settle()
			o := BeginOptions{Canary: rapid.SampledFrom([]int{0, 5, 50}).Draw(t, "canary")}
			command(func(r Rollout) (Rollout, error) {
				n := fresh(Party{})
				next, err := Begin(r, active, root(n), o, m.now)
				if err == nil {
					used(n)
					delete(m.wanted, active.ID)
				}
				return next, err
			})
		},
		"begin with one of before": func(t *rapid.T) {
			settle()
			old := root(rapid.IntRange(0, roots-1).Draw(t, "root"))
			o := BeginOptions{Canary: rapid.SampledFrom([]int{0, 50}).Draw(t, "canary"), Trusted: slices.Contains(m.trusted(), old.ID)}
			begun := command(func(r Rollout) (Rollout, error) { return Begin(r, active, old, o, m.now) })
			if begun && len(m.taints[old.ID]) > 0 {
				t.Fatalf("a rollout to %s, which is tainted", old.ID)
			}
			if begun {
				delete(m.wanted, active.ID)
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
			n := fresh(Party{})
			m.sets = append(m.sets, append(slices.Clone(m.trusted()), root(n).ID))
			used(n)
			m.imported++
			m.wanted[root(n).ID] = true
		},
		"import one of before": func(t *rapid.T) {
			id := rapid.SampledFrom([]string{m.record.Old.ID, m.record.New.ID, root(rapid.IntRange(0, roots-1).Draw(t, "root")).ID}).Draw(t, "which")
			if id == "" || len(m.taints[id]) > 0 || !command(func(r Rollout) (Rollout, error) { return r.Trust(id) }) {
				return
			}
			if !slices.Contains(m.trusted(), id) {
				m.sets = append(m.sets, append(slices.Clone(m.trusted()), id))
			}
			m.imported++
			m.wanted[id] = true
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
			if !restores || m.told(party) { // who comes is told of the set first
				m.sign(t, name, fmt.Sprint(rapid.IntRange(0, 99).Draw(t, "identity")), time.Duration(rapid.IntRange(1, 360).Draw(t, "minutes"))*time.Minute)
			}
		},
		"confirm": func(t *rapid.T) {
			if a := m.agents[agent.Draw(t, "agent")]; m.told(party) {
				a.confirmed = uint64(len(m.sets))
			}
		},
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
			for id := range m.wanted {
				if len(m.taints[id]) == 0 && !slices.Contains(m.trusted(), id) {
					t.Fatalf("%s was taken in by a command, and the set is %v: %+v", id, m.trusted(), m.record)
				}
			}
			told := m.told(party)
			if !told && !restores {
				t.Fatalf("nobody is told of %v: %+v", m.trusted(), m.record)
			}
			for _, id := range m.trusted() {
				if told && m.left[id] {
					t.Fatalf("%s was tainted and had left, and is told of again: %+v", id, m.record)
				}
			}
		},
	}
	if restores {
		m.record = Rollout{New: active, Step: StepOut, NewShare: 100} // as the first start enters it
		actions["back up"] = func(*rapid.T) { m.backup = &kept{m.record, slices.Clone(m.trusted())} }
		actions["put back"] = func(t *rapid.T) {
			if m.backup == nil {
				return
			}
			m.putBack(party)
			restart()
			if active = m.signer(); rapid.Bool().Draw(t, "in peace") {
				m.restored(t, x, party)
			}
		}
	}
	t.Repeat(actions)
	// Left in peace, it ends; where nothing may be signed it takes an order.
	for range 30 {
		if m.restored(t, x, party); m.record.Barred(m.signer().ID) != nil {
			settle()
			what, next := active, fresh(active)
			if m.record.Active() {
				what, next = m.record.Stays(), fresh(m.record.Stays())
			}
			used(next)
			told(what, taintSeen{m.now, time.Hour})
			e := Emergency{Within: time.Hour, First: active, Successor: root(next)}
			if !command(func(r Rollout) (Rollout, error) { return r.Taint(what, e, m.now) }) {
				t.Fatalf("no order leads out of %+v", m.record)
			}
			for _, b := range m.record.Behind { // which have the new bound, as in an order amid all else
				if len(m.taints[b.ID]) > 0 && !b.By.After(m.now.Add(time.Hour)) {
					told(b.Party, taintSeen{m.now, time.Hour})
				}
			}
		}
		for _, a := range m.agents {
			if m.told(party) {
				a.confirmed = uint64(len(m.sets))
			}
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
