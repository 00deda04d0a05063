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

	mu   sync.Mutex
	ends map[time.Time]ending
}

// ending is when a bound is over.
type ending struct {
	running time.Duration // on bounds.running
	told    time.Time     // by the clock, as it was told last
}

// maxBounds bounds how many are remembered: a Rollout has one for its step, and one for each that leaves behind it.
const maxBounds = 2 * maxTaints

// of is when a bound is over, by the clock that says it is now: that lies before the bound where the clock was set back.
func (b *bounds) of(until, now time.Time) time.Time {
	if kept := b.kept(until, until.Sub(now), now); until.Sub(kept) >= drift { // a clock is slewed all the time
		return kept
	}
	return until
}

// kept is when it is over by the time that the process runs, of which so much was left when this moment was seen first. It
// stands still but where the clock was set: the two are read one after the other, and whoever watches is told of each change.
func (b *bounds) kept(moment time.Time, left time.Duration, now time.Time) time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	running, key := b.running(), moment.UTC().Round(0)
	end, known := b.ends[key]
	if !known {
		end.running = running + left
	}
	if at := now.Add(end.running - running); at.Sub(end.told).Abs() >= drift {
		end.told = at
	}
	if b.ends == nil {
		b.ends = map[time.Time]ending{}
	}
	if !known {
		maps.DeleteFunc(b.ends, func(_ time.Time, end ending) bool { return running-end.running > believedAfter })
	}
	if known || len(b.ends) < maxBounds {
		b.ends[key] = end
	}
	return end.told
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
		forced = x.bounds.kept(r.Entered, x.o.Lives, now)
	}
	if forced.Before(until) {
		return forced
	}
	return until
}
