package rotation

import (
	"context"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

// KeepOptions adjusts Keep. The zero value renews at once and uses the defaults.
type KeepOptions struct {
	// Have is the term of a credential that is already in use; nil: there is none, and it is fetched at once.
	Have *Term
	// Wake brings one value for each "renew now"; it is served at once, also in the middle of a backoff, but no sooner than
	// the last refusal's RetryAfter or Retry.First after a success. A channel of capacity one, filled without blocking,
	// loses nothing. The caller owns it.
	Wake <-chan struct{}
	// Retry bounds what happens after a failure.
	Retry Retry
	// Observe is told of each attempt, on Keep's goroutine, after it ended.
	Observe func(Attempt)
	// Wall is the wall clock that jumps are looked for in; nil: the system's.
	Wall func() time.Time
	// Asleep is how long the machine has slept since some moment in the past, which the monotonic clock leaves out; nil:
	// the system's.
	Asleep func() time.Duration
}

// Cause says why an attempt was made.
type Cause string

// The causes of an attempt.
const (
	CauseStart   Cause = "start"   // nothing was held
	CauseDue     Cause = "due"     // the schedule said so
	CauseRetry   Cause = "retry"   // the last attempt failed
	CauseWake    Cause = "wake"    // Wake said so
	CauseClock   Cause = "clock"   // the wall clock jumped, or the machine slept, or what is held is not valid yet
	CauseExpired Cause = "expired" // the term ended
)

// Attempt is one call of Renew, for logs, metrics and status.
type Attempt struct {
	Cause Cause
	Began time.Time
	Took  time.Duration
	// Err is nil when it succeeded, and then Term is the new one.
	Err  error
	Term Term
	// Next is when the next attempt is planned.
	Next time.Time
	// Failures counts the failed attempts since the last success, this one included.
	Failures int
}

// Keep keeps s fresh until ctx ends, and returns ctx's error.
//
// It renews when s.Due says so, and retries failures with jittered backoff, sooner as the end comes near, no sooner
// than a refusal's RetryAfter; refusals that time alone will not lift are tried again too, but slowly. When the term
// ends, s.Expired is told once; Renew and Expired are never called at the same time. A wall clock that jumps brings an
// early renewal and never an early end; the time that the machine slept counts as lived. What is not valid yet, because a
// clock was set back, is renewed at once, and again with the backoff of failures while what comes is not valid either.
func Keep(ctx context.Context, s Subject, o KeepOptions) error {
	k := newKeeper(s, o)
	for {
		cause, err := k.wait(ctx)
		if err != nil {
			return err
		}
		k.attempt(ctx, cause)
	}
}

// keeper is the state of one Keep; only its goroutine touches it.
type keeper struct {
	subject Subject
	o       KeepOptions
	clock   Jumps
	slept   time.Duration // o.Asleep as it was last seen

	term Term
	// live: term has not ended. known: there was a term, so its Life tells the scale of things.
	live, known bool
	next        time.Time // when the next attempt is planned
	cause       Cause     // and why
	notBefore   time.Time // no attempt before this, whoever asks
	failures    int
	// early: what is held is not valid yet, and an attempt is planned for that. vain counts those that brought no better one.
	early bool
	vain  int
}

func newKeeper(s Subject, o KeepOptions) *keeper {
	o.Retry = o.Retry.withDefaults()
	if o.Wall == nil {
		o.Wall = time.Now
	}
	if o.Asleep == nil {
		o.Asleep = asleep
	}
	now := time.Now()
	k := &keeper{subject: s, o: o, clock: NewJumps(now, o.Wall()), slept: o.Asleep(), next: now, cause: CauseStart}
	if h := o.Have; h != nil {
		// From here on the monotonic clock runs it down, wherever Received came from.
		k.term = Term{Life: h.Life, Left: h.Remaining(now), Received: now}
		k.live, k.known = true, true
		k.next, k.cause = s.Due(k.term), CauseDue
	}
	return k
}

// wait returns the cause of the next attempt once its time has come.
func (k *keeper) wait(ctx context.Context) (Cause, error) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		now := time.Now()
		k.awake()
		k.expire(now)
		if k.clock.Jumped(now, k.o.Wall(), k.tolerance()) {
			k.hasten(now.Add(jitter(k.leeway(now))), CauseClock)
		}
		k.premature(now)
		if !now.Before(k.next) {
			return k.cause, nil
		}
		timer.Reset(k.sleep(now))
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-timer.C:
		case _, open := <-k.o.Wake:
			if !open {
				k.o.Wake = nil
				continue
			}
			k.hasten(time.Now(), CauseWake)
		}
	}
}

// sleep is how long until something has to be looked at: the next attempt, the end, or the wall clock.
func (k *keeper) sleep(now time.Time) time.Duration {
	d := min(k.next.Sub(now), maxUnwatched)
	if k.live {
		d = min(d, k.term.Remaining(now), max(k.term.Life/16, time.Second))
	}
	return d
}

// leeway is the time over which a fleet whose clocks were all set at once spreads its early renewals. What is held is
// as good as before, so there is time; where nothing is held, the backoff is soon enough.
func (k *keeper) leeway(now time.Time) time.Duration {
	if !k.live {
		return k.tolerance()
	}
	return k.term.Remaining(now) / 4 // and so at most a quarter of the life
}

// tolerance is how far the wall clock may move against the monotonic one before that counts as a jump.
func (k *keeper) tolerance() time.Duration {
	if !k.known {
		return maxUnwatched
	}
	return min(max(k.term.Life/32, 2*time.Second), maxUnwatched)
}

// awake counts what the machine slept as lived: the end and the next attempt are that much nearer than the monotonic
// clock says.
func (k *keeper) awake() {
	total := k.o.Asleep()
	slept := total - k.slept
	if slept < time.Second {
		return // the clocks are read one after the other
	}
	k.slept = total
	k.term.Received = k.term.Received.Add(-slept)
	k.next, k.notBefore = k.next.Add(-slept), k.notBefore.Add(-slept)
}

// expire tells the subject, once, that its term has ended.
func (k *keeper) expire(now time.Time) {
	if !k.live || k.term.Remaining(now) > 0 {
		return
	}
	k.live = false
	k.subject.Expired()
	if k.failures == 0 {
		k.hasten(now, CauseExpired)
	}
}

// premature has what is not valid yet renewed, as soon as that is seen: nobody takes it.
func (k *keeper) premature(now time.Time) {
	before := k.early
	if k.early = k.live && k.o.Wall().Before(k.term.NotBefore); k.early && !before {
		k.hasten(now, CauseClock)
	}
}

// hasten moves the next attempt forward to at, as far as notBefore allows.
func (k *keeper) hasten(at time.Time, cause Cause) {
	if at.Before(k.notBefore) {
		at = k.notBefore
	}
	if at.Before(k.next) {
		k.next, k.cause = at, cause
	}
}

// attempt renews once. The attempt ends with the term at the latest, so that Expired is not late behind a peer that
// hangs; the next one then has the whole timeout.
func (k *keeper) attempt(ctx context.Context, cause Cause) {
	began := time.Now()
	timeout := k.o.Retry.Timeout
	if k.live {
		timeout = min(timeout, k.term.Remaining(began))
	}
	renewing, cancel := context.WithTimeout(ctx, timeout)
	term, err := k.subject.Renew(renewing)
	cancel()
	if err != nil && ctx.Err() != nil {
		return // Keep is being stopped; that is not the subject's failure.
	}
	now := time.Now()
	if err == nil {
		k.succeeded(term, now)
	} else {
		k.failed(err, now)
	}
	if k.o.Observe != nil {
		k.o.Observe(Attempt{
			Cause: cause, Began: began, Took: now.Sub(began), Err: err, Term: term, Next: k.next, Failures: k.failures,
		})
	}
}

func (k *keeper) succeeded(term Term, now time.Time) {
	k.term, k.live, k.known = term, true, true
	k.failures = 0
	k.next, k.cause = k.subject.Due(term), CauseDue
	// A schedule that says "at once", a waker that never rests or lives of nothing must not become a storm.
	k.notBefore = now.Add(k.o.Retry.first(term.Life))
	if k.next.Before(k.notBefore) {
		k.next = k.notBefore
	}
	if k.early = k.o.Wall().Before(term.NotBefore); !k.early {
		k.vain = 0
		return
	}
	// Its issuer's clock is ahead of ours, and may be for long.
	k.hasten(now.Add(k.o.Retry.delay(setback{failures: k.vain, life: term.Life, left: term.Remaining(now)})), CauseClock)
	k.vain++
}

func (k *keeper) failed(err error, now time.Time) {
	r := k.o.Retry
	s := setback{failures: k.failures}
	if k.known {
		s.life = k.term.Life
	}
	if k.live {
		s.left = k.term.Remaining(now)
	}
	if refused, ok := refusal.From(err); ok {
		s.final, s.retryAfter = !refused.Reason.Passing(), refused.RetryAfter
	}
	k.failures++
	k.notBefore = now.Add(s.retryAfter)
	k.next, k.cause = now.Add(r.delay(s)), CauseRetry
}
