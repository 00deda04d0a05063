package rotation

import (
	"math/rand/v2"
	"time"
)

// maxUnwatched bounds how long a jump of the wall clock can go unseen.
const maxUnwatched = 30 * time.Second

// Retry bounds what Keep does after a failure. All of it shrinks with lives that are short.
type Retry struct {
	// First is the first delay, doubled from failure to failure up to Max. Defaults: 1 s, 2 min.
	First, Max time.Duration
	// Slow is the longest delay after a refusal that time alone will not lift; the first is a tenth of it. Default: 5 min.
	Slow time.Duration
	// Timeout bounds one attempt. Default: 30 s.
	Timeout time.Duration
}

func (r Retry) withDefaults() Retry {
	set := func(d *time.Duration, to time.Duration) {
		if *d <= 0 {
			*d = to
		}
	}
	set(&r.First, time.Second)
	set(&r.Max, 2*time.Minute)
	set(&r.Slow, 5*time.Minute)
	set(&r.Timeout, 30*time.Second)
	return r
}

// setback is all that the next delay depends on.
type setback struct {
	failures   int           // before this one
	life, left time.Duration // of the term; zero where there is none (any more)
	final      bool          // time alone will not help
	retryAfter time.Duration
}

// first is the shortest delay for a credential of this life.
func (r Retry) first(life time.Duration) time.Duration { return within(r.First, life, 100) }

// within is d, or a share of the life if that is known and less.
func within(d, life, share time.Duration) time.Duration {
	if life <= 0 {
		return d
	}
	return max(min(d, life/share), time.Millisecond)
}

// delay is how long to wait: exponential, at most a quarter of what is left, jittered by half either way, and never
// sooner than the refusal asked.
func (r Retry) delay(s setback) time.Duration {
	first, most := r.first(s.life), within(r.Max, s.life, 20)
	if s.life <= 0 {
		most = min(most, 30*time.Second) // somebody waits for a first credential
	}
	if s.final {
		first, most = within(r.Slow/10, s.life, 20), within(r.Slow, s.life, 4)
	}
	d := min(first<<min(s.failures, 20), most)
	if s.left > 0 {
		d = min(d, max(s.left/4, first))
	}
	d = d/2 + jitter(d)
	if d < s.retryAfter {
		d = s.retryAfter + jitter(s.retryAfter/4)
	}
	return d
}

// jitter is a random duration below d.
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return rand.N(d)
}

// Jumps compares the wall clock with the monotonic one.
type Jumps struct{ mono, wall time.Time }

// NewJumps begins with the two clocks as they are.
func NewJumps(mono, wall time.Time) Jumps { return Jumps{mono, wall.Round(0)} }

// Jumped reports whether the wall clock moved against the monotonic one by more than the tolerance since it was last
// asked or last said so. A slow drift adds up and is reported once it is that large.
func (j *Jumps) Jumped(mono, wall time.Time, tolerance time.Duration) bool {
	wall = wall.Round(0)
	drift := wall.Sub(j.wall) - mono.Sub(j.mono)
	if drift.Abs() <= tolerance {
		return false
	}
	*j = Jumps{mono, wall}
	return true
}
