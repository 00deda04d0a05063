package agent

import (
	"context"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshca/meshca/rotation"
)

// maxMeasured is the longest round trip from which the skew can be told well enough.
const maxMeasured = 2 * time.Second

// clock is what is known of the CA's clock.
type clock struct {
	now func() instant

	mu       sync.Mutex
	skew     time.Duration
	measured bool
	theirs   time.Time // what it said
	at       instant   // when that was
}

// measure takes the CA's time from an answer that came now to a call that began `took` ago; half of that it was under
// way.
func (c *clock) measure(theirs *timestamppb.Timestamp, took time.Duration) {
	if theirs.CheckValid() != nil || took > maxMeasured {
		return
	}
	skew := theirs.AsTime().Sub(time.Now().Round(0).Add(-took / 2))
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.skew, c.measured = skew, true
	c.theirs, c.at = theirs.AsTime().Add(took/2), now
}

// reads is what the CA's clock says now, by what it said last and clocks that nobody can set; ok is false where it was not
// heard yet.
func (c *clock) reads(now instant) (t time.Time, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.measured {
		return t, false
	}
	return c.theirs.Add(now.lived(c.at)), true
}

// offset is the CA's clock minus ours.
func (c *clock) offset() (skew time.Duration, measured bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.skew, c.measured
}

// clockEvery is how often the node's clock is looked at, and clockStep how much it has to be set by.
const (
	clockEvery = 20 * time.Second
	clockStep  = datedBack / 2
)

// watchClock holds what workloads hold against the clocks when the node's own was set, until ctx ends. The CA says by itself
// when its clock was; where both were wrong, either may be the last that is set right.
func (a *Agent) watchClock(ctx context.Context) {
	look := time.NewTicker(clockEvery)
	defer look.Stop()
	jumps := rotation.NewJumps(time.Now(), a.config.now().wall)
	for {
		select {
		case <-look.C:
		case <-ctx.Done():
			return
		}
		if jumps.Jumped(time.Now(), a.config.now().wall, clockStep) {
			for _, w := range a.roster.list() {
				w.heardClock()
			}
		}
	}
}
