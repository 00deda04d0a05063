package rotation

import (
	"sync"
	"time"
)

// Clock is the wall clock for those who end something when its time is over, and cannot take that back. A clock that is set
// forward says at once that all has ended; so what it was ahead of before is believed only when it has stood for a day. One
// that is set back is followed at once: then everything lasts longer, but for what has a bound (RollerOptions.Running).
//
// It is the wall clock less what it was set forward by within the last day, measured against the monotonic clock. A clock
// that was wrong before the process began cannot be told from a right one. It is safe for concurrent use.
type Clock struct {
	wall func() time.Time // with a monotonic reading
	// running is how long the process runs, with the time that the machine was suspended.
	running func() time.Duration

	mu sync.Mutex
	// offsets are of the wall clock from the time that the process runs, in the order in which they were seen. One that a
	// later one lies below is not needed any more, so they rise; the first is the one that is believed.
	offsets []offset
	began   time.Time // its wall clock; the monotonic reading is stripped
}

type offset struct {
	by    time.Duration
	since time.Duration // when it was seen first, on running
}

const (
	// believedAfter is how long a clock that was set forward has to stand: longer than any SVID lives, and long enough for
	// people to set it right.
	believedAfter = 24 * time.Hour
	// drift is how far the wall clock may go from the monotonic one before that counts as another offset: it is slewed all
	// the time.
	drift = time.Second
)

// ClockOptions are where a Clock looks; the zero value is the machine's own clocks.
type ClockOptions struct {
	// Wall is the wall clock.
	Wall func() time.Time
	// Running is how long something runs that no setting of a clock changes.
	Running func() time.Duration
}

// NewClock returns a Clock that believes the wall clock as it is now.
func NewClock(o ClockOptions) *Clock {
	if o.Wall == nil {
		o.Wall = time.Now
	}
	if o.Running == nil {
		began, slept := time.Now(), asleep()
		o.Running = func() time.Duration { return time.Since(began) + asleep() - slept }
	}
	return &Clock{wall: o.Wall, running: o.Running, began: o.Wall().Round(0).Add(-o.Running())}
}

// Now returns the time. Who asks seldom learns of a jump late, and no jump is believed before it was seen for a day.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	running := c.running()
	by := c.wall().Round(0).Sub(c.began) - running
	c.see(by, running)
	return c.began.Add(running + min(by, c.offsets[0].by))
}

// Running is how long the clock has run, whatever the wall clock was set to meanwhile.
func (c *Clock) Running() time.Duration { return c.running() }

// Ahead is how far the wall clock is ahead of Now: what it was set forward by.
func (c *Clock) Ahead() time.Duration { return c.wall().Round(0).Sub(c.Now()) }

// see notes an offset, and forgets those that do not count any more.
func (c *Clock) see(by, running time.Duration) {
	n := len(c.offsets)
	for n > 0 && c.offsets[n-1].by > by {
		n--
	}
	c.offsets = c.offsets[:n]
	if n == 0 || by-c.offsets[n-1].by >= drift {
		c.offsets = append(c.offsets, offset{by, running})
	}
	for len(c.offsets) > 1 && running-c.offsets[1].since > believedAfter {
		c.offsets = c.offsets[1:]
	}
}
