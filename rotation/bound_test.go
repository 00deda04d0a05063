package rotation

import (
	"testing"
	"time"
)

// A clock that is set back amid an emergency puts off nothing that has a bound. What has none lasts longer, as does all that
// one who comes after a restart sees first.
func TestABoundOutlastsAClockThatIsSetBack(t *testing.T) {
	now := time.Now()
	const within = 10 * time.Minute
	retired := func(r Rollout) Rollout {
		r.Old, r.New, r.Step, r.NewShare = oldRoot, newRoot, StepRetired, 100
		r.Entered, r.Begun, r.Since = now, now, now
		return r
	}
	for name, c := range map[string]struct {
		r       Rollout
		restart bool
		lives   time.Duration
		// early and late are how long the process runs when it has yet to go on, and when it has.
		early, late time.Duration
	}{
		"a stolen root leaves": {retired(Rollout{Within: within, LastEnd: now.Add(6 * time.Hour), Taints: []Taint{{ID: oldRoot.ID}}}), false, 0,
			within/2 - time.Second, within / 2},
		"and its certificates end before": {retired(Rollout{Within: within, LastEnd: now.Add(4 * time.Minute), Taints: []Taint{{ID: oldRoot.ID}}}), false, 0,
			4 * time.Minute, within / 2},
		"confirmations": {Rollout{Old: oldRoot, New: newRoot, Step: StepPublished, Entered: now, Begun: now, Since: now, Within: within, Taints: []Taint{{ID: oldRoot.ID}}}, false, 0,
			within/2 - time.Second, within / 2},
		"one that is behind": {Rollout{Old: oldRoot, New: newRoot, Step: StepOut, NewShare: 100, Behind: []Behind{{Party: Party{ID: "third"}, By: now.Add(within)}}}, false, 0,
			within - time.Second, within},
		"no emergency": {retired(Rollout{LastEnd: now.Add(within)}), false, 0, within + 59*time.Minute, within + time.Hour},
		"no emergency, and what lives is in use no more": {retired(Rollout{LastEnd: now.Add(10 * time.Hour)}), false, 7 * time.Hour, 7*time.Hour - time.Second, 7 * time.Hour},
		"and a clock was years ahead":                    {retired(Rollout{LastEnd: now.Add(9000 * time.Hour)}), false, 7 * time.Hour, 7*time.Hour - time.Second, 7 * time.Hour},
		"and who comes after a restart waits anew":       {retired(Rollout{LastEnd: now.Add(9000 * time.Hour)}), true, 7 * time.Hour, 7*time.Hour + 59*time.Second, 7*time.Hour + time.Minute},
		"and a restart": {retired(Rollout{Within: within, LastEnd: now.Add(6 * time.Hour), Taints: []Taint{{ID: oldRoot.ID}}}), true, 0,
			within/2 + 59*time.Minute, within/2 + time.Hour},
	} {
		var wall, running time.Duration
		clock := NewClock(ClockOptions{Wall: func() time.Time { return now.Add(wall) }, Running: func() time.Duration { return running }})
		p := &plain{record: c.r, unconfirmed: []string{"agent-1"}}
		roller := func() *Roller {
			return NewRoller(RollerOptions{Journal: p, Authorities: p, Now: clock.Now, Running: clock.Running, Lives: c.lives})
		}
		x := roller()
		stays := func() bool {
			for x.Move(t.Context()) {
			}
			return p.record.Step == c.r.Step && len(p.record.Behind) == len(c.r.Behind)
		}
		if !stays() {
			t.Fatalf("%s: at once it is %s", name, p.record.Step)
		}
		running, wall = time.Minute, time.Minute-time.Hour
		if c.restart {
			x = roller()
		}
		if !stays() {
			t.Errorf("%s: when the clock was set back it is %s", name, p.record.Step)
		}
		running, wall = c.early, c.early-time.Hour
		if !stays() {
			t.Errorf("%s: after %s it is %s", name, running, p.record.Step)
		}
		if s, _ := x.Standing(); !s.Until.IsZero() && !s.Until.Equal(clock.Now().Add(c.late-c.early)) {
			t.Errorf("%s: after %s it is said to last %s", name, running, s.Until.Sub(clock.Now()))
		}
		running, wall = c.late, c.late-time.Hour
		if stays() {
			t.Errorf("%s: after %s it is %s", name, running, p.record.Step)
		}
	}
}

// What is said of when something is over stands still while no clock is set, though clocks are read one after the other: whoever
// watches is told of each change.
func TestABoundStandsStill(t *testing.T) {
	now := time.Now()
	for name, r := range map[string]Rollout{
		"a clock was years ahead": {Old: oldRoot, New: newRoot, Step: StepRetired, NewShare: 100, Entered: now, Begun: now, LastEnd: now.Add(9000 * time.Hour)},
		"a stolen root": {
			Old: oldRoot, New: newRoot, Step: StepRetired, NewShare: 100, Entered: now, Begun: now, Since: now, LastEnd: now.Add(9000 * time.Hour),
			Within: 4 * time.Hour, Taints: []Taint{{ID: oldRoot.ID}},
		},
	} {
		var passed, set, step time.Duration
		tick := func() time.Duration { step += time.Nanosecond; passed += step; return passed }
		clock := NewClock(ClockOptions{Wall: func() time.Time { return now.Add(tick() + set) }, Running: tick})
		p := &plain{record: r}
		x := NewRoller(RollerOptions{Journal: p, Authorities: p, Now: clock.Now, Running: clock.Running, Lives: 30 * time.Hour})
		for _, set = range []time.Duration{0, -time.Hour} { // by which it is set back
			x.Move(t.Context())
			first, stale := x.Standing()
			for range 5 {
				passed += 2 * time.Second
				x.Move(t.Context())
			}
			last, _ := x.Standing()
			select {
			case <-stale:
				t.Errorf("%s: set by %s, it is said to last until %s, and then until %s", name, set, first.Until, last.Until)
			default:
			}
			if p.record.Step != r.Step || first.Until.IsZero() {
				t.Errorf("%s: it is %s, until %s", name, p.record.Step, first.Until)
			}
		}
	}
}

// Few bounds are remembered, and a clock that is slewed moves none.
func TestBoundsAreFew(t *testing.T) {
	now := time.Now()
	var slewed, running time.Duration
	b := &bounds{running: func() time.Duration { return running }}
	of := func(until time.Time) time.Time { return b.of(until, now.Add(running+slewed)) }
	for i := range 3 * maxBounds {
		until := now.Add(time.Hour + time.Duration(i))
		slewed = 0
		of(until)
		slewed = -drift / 2
		if got := of(until); !got.Equal(until) {
			t.Fatalf("a clock that was slewed puts %s at %s", until, got)
		}
	}
	if len(b.ends) > maxBounds {
		t.Errorf("it keeps %d", len(b.ends))
	}
	running = believedAfter + 2*time.Hour
	if until := now.Add(running + time.Hour); !of(until).Equal(until) || len(b.ends) != 1 {
		t.Errorf("a day later it keeps %d", len(b.ends))
	}
}
