package rotation

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

var errDown = errors.New("the CA is down")

// credential is a Subject whose issuer obeys the test. It fails the test when Keep breaks the contract of Subject.
//
// The test holds mu but while it sleeps: the bubble orders the two goroutines anyway, mu lets the race detector see it.
type credential struct {
	t        *testing.T
	life     time.Duration
	schedule Schedule

	mu             sync.Mutex
	answer         func(ctx context.Context) error // nil: success
	began, renewed []time.Time
	expired        int
	live           bool
	end            time.Time
	inRenew        bool
	notBefore      func() time.Time // of what comes; nil: that is not looked at
}

var _ Subject = (*credential)(nil)

func (c *credential) Renew(ctx context.Context) (Term, error) {
	c.mu.Lock()
	c.inRenew = true
	if _, bounded := ctx.Deadline(); !bounded {
		c.t.Error("an attempt without a deadline")
	}
	c.began = append(c.began, time.Now())
	answer := c.answer
	c.mu.Unlock()
	var err error
	if answer != nil {
		err = answer(ctx)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inRenew = false
	if err != nil {
		return Term{}, err
	}
	c.renewed = append(c.renewed, time.Now())
	c.live, c.end = true, time.Now().Add(c.life)
	term := Term{Life: c.life, Left: c.life, Received: time.Now()}
	if c.notBefore != nil {
		term.NotBefore = c.notBefore()
	}
	return term, nil
}

func (c *credential) Due(t Term) time.Time {
	if c.schedule != nil {
		return c.schedule(t)
	}
	return HalfLife(t)
}

func (c *credential) Expired() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.inRenew {
		c.t.Error("Expired during Renew")
	}
	if time.Now().Before(c.end) {
		c.t.Errorf("told of the end %v early", time.Until(c.end))
	}
	c.expired++
	c.live = false
}

// keep runs Keep in the bubble until the test ends.
func (c *credential) keep(o KeepOptions) {
	ctx, cancel := context.WithCancel(c.t.Context())
	done := make(chan error)
	if observe := o.Observe; observe != nil {
		o.Observe = func(a Attempt) {
			c.mu.Lock()
			defer c.mu.Unlock()
			observe(a)
		}
	}
	c.mu.Lock()
	go func() { done <- Keep(ctx, c, o) }()
	c.t.Cleanup(func() {
		c.mu.Unlock()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			c.t.Errorf("Keep returned %v", err)
		}
	})
}

func (c *credential) sleep(d time.Duration) {
	c.mu.Unlock()
	time.Sleep(d)
	synctest.Wait()
	c.mu.Lock()
}

func TestKeepRenewsAtOnceAndThenWhenDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		c := &credential{t: t, life: 6 * time.Hour}
		c.keep(KeepOptions{})
		c.sleep(9*time.Hour + time.Second)
		for i, at := range c.renewed {
			if want := start.Add(time.Duration(i) * 3 * time.Hour); !at.Equal(want) {
				t.Errorf("renewal %d at %v, want %v", i, at.Sub(start), want.Sub(start))
			}
		}
		if len(c.renewed) != 4 || c.expired != 0 {
			t.Errorf("%d renewals, %d ends", len(c.renewed), c.expired)
		}
	})
}

func TestKeepAfterARestartGoesOnWhereItWas(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		c := &credential{t: t, life: 6 * time.Hour, end: start.Add(4 * time.Hour)}
		// Received as a file brings it: without a monotonic reading, before this process began.
		have := Term{Life: 6 * time.Hour, Left: 5 * time.Hour, Received: start.Add(-time.Hour).Round(0)}
		c.keep(KeepOptions{Have: &have})
		c.sleep(time.Hour - time.Second)
		if len(c.began) != 0 {
			t.Fatal("renewed before it was due")
		}
		c.sleep(2 * time.Second)
		if len(c.renewed) != 1 {
			t.Fatal("not renewed when due")
		}
	})
}

func TestKeepRestartedWithWhatHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &credential{t: t, life: time.Hour}
		c.answer = func(context.Context) error { return errDown }
		have := Term{Life: time.Hour, Left: time.Minute, Received: time.Now().Add(-2 * time.Minute)}
		c.keep(KeepOptions{Have: &have})
		c.sleep(time.Millisecond)
		if c.expired != 1 || len(c.began) != 1 {
			t.Errorf("told %d times of the end, %d attempts", c.expired, len(c.began))
		}
	})
}

func TestKeepWithTheCAGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		c := &credential{t: t, life: 6 * time.Hour}
		c.keep(KeepOptions{})
		c.sleep(time.Second)
		c.answer = func(context.Context) error { return errDown }
		c.sleep(6*time.Hour - 2*time.Second)
		if c.expired != 0 || !c.live {
			t.Fatal("ended early")
		}
		tries := c.began[1:]
		if n := len(tries); n < 90 || n > 400 {
			t.Errorf("%d attempts in three hours", n)
		}
		last := start.Add(6 * time.Hour).Sub(tries[len(tries)-1])
		if last > 10*time.Second {
			t.Errorf("the last attempt was %v before the end", last)
		}
		c.sleep(3 * time.Hour)
		if c.expired != 1 || c.live {
			t.Fatalf("told %d times of the end", c.expired)
		}
		c.answer = nil
		c.sleep(4 * time.Minute)
		if !c.live {
			t.Fatal("did not come back by itself")
		}
		renewals := len(c.renewed)
		c.sleep(3*time.Hour - 5*time.Minute)
		if len(c.renewed) != renewals {
			t.Error("the schedule did not go on as before")
		}
	})
}

func TestKeepCutsAnAttemptThatHangsAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		c := &credential{t: t, life: time.Minute}
		c.keep(KeepOptions{})
		c.sleep(time.Second)
		c.answer = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		c.sleep(time.Until(start.Add(time.Minute)))
		if c.expired != 1 {
			t.Errorf("told %d times at the end", c.expired)
		}
		c.answer = nil
		c.sleep(40 * time.Second)
		if !c.live {
			t.Error("did not recover")
		}
	})
}

func TestKeepHonoursRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wake := make(chan struct{}, 1)
		refused := refusal.New(refusal.Overloaded, "busy").After(time.Minute)
		c := &credential{t: t, life: time.Hour}
		c.answer = func(context.Context) error { return refused }
		c.keep(KeepOptions{Wake: wake})
		c.sleep(5 * time.Second)
		wake <- struct{}{} // "renew now" does not overrule an overloaded CA
		c.sleep(30 * time.Minute)
		for i := 1; i < len(c.began); i++ {
			if gap := c.began[i].Sub(c.began[i-1]); gap < time.Minute || gap > 2*time.Minute {
				t.Errorf("attempt %d came after %v", i, gap)
			}
		}
		if len(c.began) < 20 {
			t.Errorf("%d attempts", len(c.began))
		}
	})
}

func TestKeepRetriesFinalRefusalsSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &credential{t: t, life: time.Hour}
		c.answer = func(context.Context) error { return refusal.New(refusal.PolicyDenied, "rule 3") }
		c.keep(KeepOptions{})
		c.sleep(time.Hour)
		if n := len(c.began); n < 8 || n > 30 {
			t.Errorf("%d attempts in an hour", n)
		}
		c.answer = nil
		c.sleep(8 * time.Minute)
		if !c.live {
			t.Error("a lifted refusal was not noticed")
		}
	})
}

func TestKeepWake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wake := make(chan struct{}, 1)
		var causes []Cause
		c := &credential{t: t, life: time.Hour}
		c.keep(KeepOptions{Wake: wake, Observe: func(a Attempt) { causes = append(causes, a.Cause) }})
		c.sleep(time.Minute)
		wake <- struct{}{}
		c.sleep(0)
		if len(c.renewed) != 2 {
			t.Fatalf("%d renewals after a wake", len(c.renewed))
		}
		c.answer = func(context.Context) error { return errDown }
		wake <- struct{}{}
		c.sleep(10 * time.Minute) // deep in its backoff
		c.answer = nil
		wake <- struct{}{}
		c.sleep(0)
		if len(c.renewed) != 3 {
			t.Errorf("%d renewals: a wake does not end a backoff", len(c.renewed))
		}
		close(wake)
		c.sleep(time.Minute)
		if causes[0] != CauseStart || causes[1] != CauseWake || causes[3] != CauseRetry {
			t.Errorf("causes %v", causes)
		}
	})
}

func TestKeepWhenTheWallClockJumps(t *testing.T) {
	for name, jump := range map[string]time.Duration{"forward": 5 * time.Hour, "back": -48 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var offset atomic.Int64
				var causes []Cause
				c := &credential{t: t, life: 6 * time.Hour}
				c.keep(KeepOptions{
					Wall:    func() time.Time { return time.Now().Add(time.Duration(offset.Load())).Round(0) },
					Observe: func(a Attempt) { causes = append(causes, a.Cause) },
				})
				c.sleep(time.Minute)
				c.answer = func(context.Context) error { return errDown }
				offset.Store(int64(jump))
				c.sleep(91 * time.Minute) // a quarter of what is left, and the time to see it
				if got := causes; len(got) < 2 || got[1] != CauseClock {
					t.Fatalf("causes %v: no early renewal", got)
				}
				c.sleep(3*time.Hour + 30*time.Minute)
				if c.expired != 0 {
					t.Error("ended early")
				}
				c.answer = nil
				c.sleep(5 * time.Minute)
				renewals := len(c.renewed)
				c.sleep(time.Hour)
				if renewals != 2 || len(c.renewed) != renewals {
					t.Errorf("%d, then %d renewals: one jump is one early renewal", renewals, len(c.renewed))
				}
			})
		})
	}
}

// What was issued by a clock that has been set back since is valid for nobody: it does not wait for its turn.
func TestKeepRenewsAtOnceWhatIsNotValidYet(t *testing.T) {
	const life = 72 * time.Hour
	for name, c := range map[string]struct {
		back time.Duration
		at   []time.Duration // of all renewals in the first hour
	}{
		"set back behind its beginning": {2 * time.Hour, []time.Duration{0, time.Minute}},
		"set back a little":             {20 * time.Second, []time.Duration{0}}, // no beginning lies ahead
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start, back := time.Now(), atomic.Int64{}
				wall := func() time.Time { return time.Now().Add(-time.Duration(back.Load())).Round(0) }
				k := &credential{t: t, life: life, notBefore: func() time.Time { return wall().Add(-5 * time.Minute) }}
				k.keep(KeepOptions{Wall: wall})
				k.sleep(time.Minute)
				back.Store(int64(c.back))
				k.sleep(10 * time.Minute)
				if len(k.renewed) != len(c.at) || k.expired != 0 {
					t.Fatalf("%d renewals ten minutes later, %d ends", len(k.renewed), k.expired)
				}
				for i, want := range c.at {
					if at := k.renewed[i].Sub(start); at < want || at > want+maxUnwatched {
						t.Errorf("renewal %d came at %v, want %v", i, at, want)
					}
				}
			})
		})
	}
}

// An issuer whose clock stays ahead is asked at the pace of failures, and once more when it was set right.
func TestKeepIsNoStormWhileTheIssuersClockIsAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wake := make(chan struct{}, 1)
		ahead := time.Hour
		k := &credential{t: t, life: 72 * time.Hour, notBefore: func() time.Time { return time.Now().Add(ahead) }}
		k.keep(KeepOptions{Wake: wake})
		k.sleep(50 * time.Minute)
		if n := len(k.renewed); n < 15 || n > 60 {
			t.Errorf("%d renewals in 50 minutes", n)
		}
		before := len(k.renewed)
		wake <- struct{}{}
		if k.sleep(0); len(k.renewed) != before+1 {
			t.Error("nobody can ask for more than these")
		}
		ahead = -time.Minute
		k.sleep(4 * time.Minute)
		if n := len(k.renewed); n != before+2 {
			t.Errorf("%d renewals since the clock was set right", n-before-1)
		}
	})
}

// A fleet whose clocks were all set at once (a time server, a host that was paused) does not come in one minute.
func TestKeepSpreadsWhatAJumpBrings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const many = 200
		var offset atomic.Int64
		var mu sync.Mutex
		var early []time.Duration
		var jumped time.Time
		done := make(chan error)
		ctx, cancel := context.WithCancel(t.Context())
		for range many {
			c := &credential{t: t, life: 6 * time.Hour}
			o := KeepOptions{
				Wall: func() time.Time { return time.Now().Add(time.Duration(offset.Load())).Round(0) },
				Observe: func(a Attempt) {
					mu.Lock()
					defer mu.Unlock()
					if a.Cause == CauseClock {
						early = append(early, a.Began.Sub(jumped))
					}
				},
			}
			go func() { done <- Keep(ctx, c, o) }()
		}
		time.Sleep(2 * time.Hour)
		mu.Lock()
		jumped = time.Now()
		mu.Unlock()
		offset.Store(int64(time.Hour))
		time.Sleep(time.Hour + time.Minute) // 4 h are left: a quarter of that
		cancel()
		for range many {
			<-done
		}
		// Those that are due before their early renewal have it then; none comes later than a quarter of what was left.
		var soon int
		for _, d := range early {
			if d < 10*time.Minute {
				soon++
			}
		}
		if len(early) < many*3/4 || soon > many/3 {
			t.Errorf("%d of %d renewed early, %d of them in ten minutes", len(early), many, soon)
		}
	})
}

// The monotonic clock stands still while the machine sleeps; certificates do not.
func TestKeepAfterTheMachineSlept(t *testing.T) {
	for name, c := range map[string]struct {
		slept   time.Duration
		expired int
	}{"a nap": {2 * time.Hour, 0}, "a night": {8 * time.Hour, 1}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var slept atomic.Int64
				k := &credential{t: t, life: 6 * time.Hour}
				k.keep(KeepOptions{
					Asleep: func() time.Duration { return time.Duration(slept.Load()) },
					Wall:   func() time.Time { return time.Now().Add(time.Duration(slept.Load())).Round(0) },
				})
				k.sleep(time.Minute)
				k.answer = func(context.Context) error { return errDown }
				k.end = k.end.Add(-c.slept)
				slept.Store(int64(c.slept))
				k.sleep(61 * time.Minute) // a quarter of what is left after a nap, and the time to see it
				if len(k.began) < 2 {
					t.Error("no early renewal")
				}
				if k.expired != c.expired {
					t.Errorf("told %d times of the end", k.expired)
				}
				k.answer = nil
				k.sleep(5 * time.Minute)
				if !k.live {
					t.Error("did not come back")
				}
				if k.sleep(6*time.Hour - 70*time.Minute); k.expired != c.expired {
					t.Error("the new term was cut short")
				}
			})
		})
	}
}

func TestKeepIsNoStormWhenTheScheduleSaysAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &credential{t: t, life: time.Hour, schedule: func(t Term) time.Time { return t.Received }}
		c.keep(KeepOptions{})
		c.sleep(time.Minute)
		if n := len(c.began); n > 61 {
			t.Errorf("%d renewals in a minute", n)
		}
	})
}

func TestKeepWithLivesOfNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &credential{t: t}
		c.keep(KeepOptions{})
		c.sleep(time.Minute)
		if n := len(c.began); n < 2 || n > 100 || c.expired != n {
			t.Errorf("%d attempts, %d ends in a minute", n, c.expired)
		}
	})
}

func TestDelay(t *testing.T) {
	r := Retry{}.withDefaults()
	for name, c := range map[string]struct {
		s         setback
		low, high time.Duration
	}{
		"first":                 {setback{life: 6 * time.Hour, left: 3 * time.Hour}, 500 * time.Millisecond, 1500 * time.Millisecond},
		"many":                  {setback{failures: 60, life: 6 * time.Hour, left: 3 * time.Hour}, time.Minute, 3 * time.Minute},
		"near the end":          {setback{failures: 60, life: 6 * time.Hour, left: 40 * time.Second}, 5 * time.Second, 15 * time.Second},
		"short life":            {setback{failures: 60, life: 20 * time.Second, left: 15 * time.Second}, 500 * time.Millisecond, 1500 * time.Millisecond},
		"nothing held":          {setback{failures: 60}, 15 * time.Second, 45 * time.Second},
		"final":                 {setback{failures: 60, final: true}, 150 * time.Second, 450 * time.Second},
		"final, short life":     {setback{failures: 60, final: true, life: 20 * time.Second}, 2500 * time.Millisecond, 7500 * time.Millisecond},
		"retry after":           {setback{retryAfter: time.Hour, life: time.Minute}, time.Hour, 75 * time.Minute},
		"retry after, but less": {setback{failures: 60, retryAfter: time.Second}, 15 * time.Second, 45 * time.Second},
	} {
		for range 100 {
			if d := r.delay(c.s); d < c.low || d > c.high {
				t.Errorf("%s: %v, want %v to %v", name, d, c.low, c.high)
				break
			}
		}
	}
}
