package rotation

import (
	"maps"
	"sync"
	"time"
)

// bounds are the moments by which something has to be over that nobody may put off: an emergency's. Each is kept by the clock
// and, from when it was seen first, by the time that the process runs, and the earlier one holds: a clock that is set back
// lengthens everything else that is waited for. It is safe for concurrent use.
type bounds struct {
	running func() time.Duration

	mu sync.Mutex
	// ends is by when each is over, on running.
	ends map[time.Time]time.Duration
}

// maxBounds bounds how many are remembered: a Rollout has one for its step, and one for each that leaves behind it.
const maxBounds = 2 * maxTaints

// of is when a bound is over, by the clock that says it is now: that lies before the bound where the clock was set back.
func (b *bounds) of(until, now time.Time) time.Time {
	left := until.Sub(now)
	kept := b.kept(until, left)
	if late := left - kept; late < drift { // a clock is slewed all the time
		return until
	}
	return now.Add(kept)
}

// kept is what is left, by the time that the process runs, of what was left when this moment was seen first.
func (b *bounds) kept(moment time.Time, left time.Duration) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	running, key := b.running(), moment.UTC().Round(0)
	end, known := b.ends[key]
	if !known {
		if b.ends == nil {
			b.ends = map[time.Time]time.Duration{}
		}
		maps.DeleteFunc(b.ends, func(_ time.Time, end time.Duration) bool { return running-end > believedAfter })
		end = running + left
		if len(b.ends) < maxBounds {
			b.ends[key] = end
		}
	}
	return end - running
}

// outBy is when the one that goes leaves the set: when the last certificate under it has ended, which is waited for by the
// clock, for as long as one can be in use, and in an emergency at its bound.
func (x *Roller) outBy(r Rollout) time.Time {
	until, now := r.outBy(), x.now()
	forced := until
	switch {
	case r.Within > 0:
		forced = x.bounds.of(r.Entered.Add(r.Within/2), now)
	case x.o.Lives > 0: // by the time that the process runs alone: what clock was right as it was entered, nobody knows
		forced = now.Add(x.bounds.kept(r.Entered, x.o.Lives))
	}
	if forced.Before(until) {
		return forced
	}
	return until
}
