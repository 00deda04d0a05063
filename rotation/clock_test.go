package rotation

import (
	"testing"
	"time"
)

// A clock that runs 40 days ahead must not say that all has ended; one that was set right for good is believed in the end.
func TestAClockThatIsSetForwardIsBelievedAfterADay(t *testing.T) {
	const days = 24 * time.Hour
	began := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for name, steps := range map[string][]struct {
		what                string
		wall, running, says time.Duration
	}{
		"and set right": {
			{"slewed", time.Hour + 500*time.Millisecond, time.Hour, time.Hour},
			{"40 days ahead", 40*days + 2*time.Hour, 2 * time.Hour, 2 * time.Hour},
			{"still so", 40*days + 20*time.Hour, 20 * time.Hour, 20 * time.Hour},
			{"set right", 21 * time.Hour, 21 * time.Hour, 21 * time.Hour},
			{"a day later", 46 * time.Hour, 46 * time.Hour, 46 * time.Hour},
		},
		"for good": {
			{"seven hours", 8 * time.Hour, time.Hour, time.Hour},
			{"almost a day later", 31*time.Hour + 59*time.Minute, 24*time.Hour + 59*time.Minute, 24*time.Hour + 59*time.Minute},
			{"a day later", 33 * time.Hour, 26 * time.Hour, 33 * time.Hour},
		},
		"twice": {
			{"an hour", 2 * time.Hour, time.Hour, time.Hour},
			{"another hour", 14 * time.Hour, 12 * time.Hour, 12 * time.Hour},
			{"a day after the first", 28 * time.Hour, 26 * time.Hour, 27 * time.Hour},
			{"a day after the second", 39 * time.Hour, 37 * time.Hour, 39 * time.Hour},
		},
		"while nobody asked": {
			{"for two days", 3 * days, 2 * days, 2 * days},
			{"a day later", 4*days + time.Hour, 3*days + time.Hour, 4*days + time.Hour},
		},
		"after it was set back": {
			{"back", -5 * time.Hour, time.Hour, -5 * time.Hour},
			{"and forward again", 2 * time.Hour, 2 * time.Hour, -4 * time.Hour},
			{"a day later", 27 * time.Hour, 27 * time.Hour, 27 * time.Hour},
		},
	} {
		var wall, running time.Duration
		c := NewClock(ClockOptions{Wall: func() time.Time { return began.Add(wall) }, Running: func() time.Duration { return running }})
		if got := c.Now(); !got.Equal(began) {
			t.Fatalf("%s: it begins at %s", name, got)
		}
		for _, s := range steps {
			wall, running = s.wall, s.running
			if got := c.Now().Sub(began); got != s.says || c.Ahead() != s.wall-s.says {
				t.Errorf("%s: %s: it says %s and that the wall clock is %s ahead, want %s", name, s.what, got, c.Ahead(), s.says)
			}
		}
	}
}

// It goes with the wall clock, and keeps little, however long it is slewed.
func TestAClockThatIsSlewed(t *testing.T) {
	began := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var wall, running time.Duration
	c := NewClock(ClockOptions{Wall: func() time.Time { return began.Add(wall) }, Running: func() time.Duration { return running }})
	for running < 30*24*time.Hour {
		running += time.Minute
		wall += time.Minute + 30*time.Millisecond // 500 ppm, the most that a kernel slews
		if late := c.Ahead(); late < 0 || late > time.Minute {
			t.Fatalf("after %s it is %s behind", running, late)
		}
	}
	if len(c.offsets) > 100 {
		t.Errorf("it keeps %d offsets", len(c.offsets))
	}
	real := NewClock(ClockOptions{})
	if late := time.Since(real.Now()); late < -time.Second || late > time.Minute {
		t.Errorf("the machine's own: it is %s behind", late)
	}
}

// What is waited for by the clock is not over when that is set forward: nothing retires early.
func TestARolloutWhoseClockIsSetForward(t *testing.T) {
	now := time.Now()
	jump := time.Duration(0)
	c := NewClock(ClockOptions{Wall: func() time.Time { return now.Add(jump) }, Running: func() time.Duration { return 0 }})
	for name, r := range map[string]Rollout{
		"the last certificate": {Old: oldRoot, New: newRoot, Step: StepRetired, NewShare: 100, Entered: now, LastEnd: now.Add(6 * time.Hour)},
		"an emergency's confirmations": {
			Old: oldRoot, New: newRoot, Step: StepPublished, Entered: now, Begun: now, Since: now, Within: time.Hour, Taints: []Taint{{ID: oldRoot.ID}},
		},
		"one that is behind": {Old: oldRoot, New: newRoot, Step: StepOut, NewShare: 100, Behind: []Behind{{Party: Party{ID: "third"}, By: now.Add(time.Hour)}}},
	} {
		jump = 0
		p := &plain{record: r, unconfirmed: []string{"agent-1"}}
		x := NewRoller(RollerOptions{Journal: p, Authorities: p, Now: c.Now})
		_ = c.Now()
		jump = 7 * time.Hour
		for x.Move(t.Context()) {
		}
		if p.record.Step != r.Step || len(p.record.Behind) != len(r.Behind) {
			t.Errorf("%s: the rollout went to %s", name, p.record.Step)
		}
	}
}
