package rotation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// ErrConflict is returned by a Journal whose record has another version than was expected: someone else was quicker.
var ErrConflict = errors.New("the journal has changed")

// Journal keeps the one Rollout durably. Both are safe for concurrent use, also by several processes.
type Journal interface {
	// Rollout returns the record and its version; the zero Rollout and 0 when there is none.
	Rollout(ctx context.Context) (Rollout, uint64, error)
	// SwapRollout replaces the record if it has this version, else it returns ErrConflict.
	SwapRollout(ctx context.Context, version uint64, next Rollout) error
}

// Authorities is what a Rollout moves. Each call may be repeated after a crash, and then does what is left of it.
type Authorities interface {
	// Publish puts an authority into the trusted set, and returns the sequence of a set that has it.
	Publish(ctx context.Context, p Party) (set uint64, err error)
	// Unconfirmed names those that have not confirmed a set of this sequence or a later one, published at since.
	Unconfirmed(ctx context.Context, set uint64, since time.Time) ([]string, error)
	// Prepare returns when the party could sign; it signs for nobody yet.
	Prepare(ctx context.Context, p Party) error
	// Assign has the parties sign for their shares, as the Rollout in this step says. It returns when nothing that was
	// begun before is in hand any more, with the end of the last certificate under the one that goes; zero: there is
	// none. In an emergency it also orders the renewal of all that was issued before.
	Assign(ctx context.Context, r Rollout) (lastEnd time.Time, err error)
	// Withdraw takes an authority out of the trusted set.
	Withdraw(ctx context.Context, p Party) error
}

// RollerOptions are what a Roller needs: all but Observe, Every, Now, Running and Lives.
type RollerOptions struct {
	Journal     Journal
	Authorities Authorities
	// Every is how often a Rollout that waits is looked at when nothing wakes it; 2 s by default.
	Every time.Duration
	// Observe is told of each step that was entered.
	Observe func(Rollout)
	// Now says what is over; time.Now by default. It must not jump forward: see Clock.
	Now func() time.Time
	// Running is how long something runs that no setting of a clock changes; the time since NewRoller by default. A clock
	// that is set back does not put off an emergency's bounds: they are kept by this, too, from when they were seen first.
	Running func() time.Duration
	// Lives is how long after an authority has stopped to sign something below it may be in use: one retires for no longer
	// by Running, from when that was seen first, whatever LastEnd says: a clock that was years ahead puts it years ahead.
	// Zero: there is no such bound.
	Lives time.Duration
}

// Roller moves the Rollout of a Journal. What it does follows from the journal alone, so that a process that dies
// anywhere is followed by one that goes on: each step is done, then entered in the journal by compare-and-swap; only the
// shares of signing are in the journal first, for nothing may be signed that it does not allow.
type Roller struct {
	o    RollerOptions
	now  func() time.Time
	wake chan struct{}
	// bounds are the emergencies'.
	bounds bounds
	// standing is the Rollout as last seen, and what it waits for.
	standing Current[Standing]
}

// Standing is a Rollout and what keeps it where it is.
type Standing struct {
	Rollout Rollout
	// Waits names what has to come: agents by their names, a signer, a moment.
	Waits []string
	// Until is when the wait is over at the latest; zero: there is no end to it but the operator's word.
	Until time.Time
	// Err is why the step failed when it was last tried; it is tried again.
	Err error
}

// NewRoller returns a Roller; Run moves it.
func NewRoller(o RollerOptions) *Roller {
	if o.Every <= 0 {
		o.Every = 2 * time.Second
	}
	if o.Observe == nil {
		o.Observe = func(Rollout) {}
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Running == nil {
		began := time.Now()
		o.Running = func() time.Duration { return time.Since(began) }
	}
	return &Roller{o: o, now: o.Now, wake: make(chan struct{}, 1), bounds: bounds{running: o.Running}}
}

// Standing returns how things are, and a channel that closes when they change.
func (x *Roller) Standing() (Standing, <-chan struct{}) { return x.standing.Get() }

// Wake makes a Rollout that waits look again.
func (x *Roller) Wake() {
	select {
	case x.wake <- struct{}{}:
	default:
	}
}

// Resume returns the Rollout of the journal, whose shares the caller puts into force before this process signs anything.
func (x *Roller) Resume(ctx context.Context) (Rollout, error) {
	r, err := x.Record(ctx)
	if err != nil {
		return Rollout{}, err
	}
	x.standing.Set(Standing{Rollout: r})
	return r, nil
}

// Record returns the Rollout as it stands in the journal now.
func (x *Roller) Record(ctx context.Context) (Rollout, error) {
	r, _, err := x.o.Journal.Rollout(ctx)
	if err != nil {
		return Rollout{}, fmt.Errorf("reading the rollout: %w", err)
	}
	return r, nil
}

// Change applies a command to the Rollout. It is tried again when another change came between.
func (x *Roller) Change(ctx context.Context, command func(Rollout) (Rollout, error)) (Rollout, error) {
	for range 16 {
		now, version, err := x.o.Journal.Rollout(ctx)
		if err != nil {
			return Rollout{}, fmt.Errorf("reading the rollout: %w", err)
		}
		next, err := command(now)
		if err != nil {
			return now, err
		}
		next = next.remember(now)
		// gofail: var rolloutOrdered struct{}
		err = x.o.Journal.SwapRollout(ctx, version, next)
		// gofail: var rolloutOrderEntered struct{}
		if errors.Is(err, ErrConflict) {
			continue
		}
		if err != nil {
			return now, fmt.Errorf("writing the rollout: %w", err)
		}
		if next.entered(now) {
			x.o.Observe(next)
		}
		x.standing.Set(Standing{Rollout: next})
		x.Wake()
		return next, nil
	}
	return Rollout{}, fmt.Errorf("writing the rollout: %w, again and again", ErrConflict)
}

// Run moves the Rollout until ctx ends.
func (x *Roller) Run(ctx context.Context) {
	look := time.NewTicker(x.o.Every)
	defer look.Stop()
	for {
		for ctx.Err() == nil && x.Move(ctx) {
		}
		select {
		case <-ctx.Done():
			return
		case <-x.wake:
		case <-look.C:
		}
	}
}

// Move tries one step, and reports whether one was made.
func (x *Roller) Move(ctx context.Context) (moved bool) {
	now, version, err := x.o.Journal.Rollout(ctx)
	if err != nil {
		x.standing.Set(Standing{Rollout: x.standing.Value().Rollout, Err: fmt.Errorf("reading the rollout: %w", err)})
		return false
	}
	next, s := x.step(ctx, now)
	next = next.remember(now)
	if s.Rollout = now; !next.entered(now) && len(next.Behind) == len(now.Behind) {
		x.stand(s)
		return false
	}
	// gofail: var rolloutStepDone struct{}
	switch err := x.o.Journal.SwapRollout(ctx, version, next); {
	case errors.Is(err, ErrConflict):
		return true // a command came between: look again
	case err != nil:
		s.Err = fmt.Errorf("writing the rollout: %w", err)
		x.stand(s)
		return false
	}
	// gofail: var rolloutStepEntered struct{}
	if next.entered(now) {
		x.o.Observe(next)
	}
	x.stand(Standing{Rollout: next})
	return true
}

// stand publishes s if it says something new.
func (x *Roller) stand(s Standing) {
	was := x.standing.Value()
	same := was.Rollout.Step == s.Rollout.Step && was.Rollout.Entered.Equal(s.Rollout.Entered) && slices.Equal(was.Waits, s.Waits) &&
		len(was.Rollout.Behind) == len(s.Rollout.Behind) &&
		was.Until.Equal(s.Until) && fmt.Sprint(was.Err) == fmt.Sprint(s.Err)
	if !same {
		x.standing.Set(s)
	}
}

// step does what r's step asks for, and returns the next one, or r and what it waits for.
func (x *Roller) step(ctx context.Context, r Rollout) (Rollout, Standing) {
	failed := func(err error) (Rollout, Standing) { return r, Standing{Err: err} }
	a := x.o.Authorities
	if r.Step == StepChosen { // who signed by a Rollout that this one took the place of, signs no more
		if _, err := a.Assign(ctx, r); err != nil {
			return failed(err)
		}
	}
	if next, changed, err := x.shed(ctx, r); changed || err != nil {
		return next, Standing{Err: err}
	}
	switch r.Step {
	case StepChosen:
		set, err := a.Publish(ctx, r.New)
		if err != nil {
			return failed(err)
		}
		next := r.enter(StepPublished, 0, x.now())
		next.Set = set
		return next, Standing{}
	case StepPublished:
		return x.confirm(ctx, r)
	case StepConfirmed:
		if err := a.Prepare(ctx, r.Stays()); err != nil {
			return failed(err)
		}
		return r.staying(x.now()), Standing{}
	case StepCanary:
		if _, tainted := r.tainted(r.Goes()); tainted {
			return r.enter(StepSigning, r.all(), x.now()), Standing{}
		}
		if _, err := a.Assign(ctx, r); err != nil {
			return failed(err)
		}
		return r, Standing{Waits: []string{"an operator to continue or to abort"}}
	case StepSigning:
		lastEnd, err := a.Assign(ctx, r)
		if err != nil {
			return failed(err)
		}
		next := r.enter(StepRetired, r.NewShare, x.now())
		next.LastEnd = lastEnd
		return next, Standing{}
	case StepRetired:
		if until := x.outBy(r); x.now().Before(until) && !r.returned(r.Goes()) {
			return r, Standing{Waits: []string{"the last certificate under it to end"}, Until: until}
		}
		if _, err := a.Assign(ctx, r); err != nil { // as it is: whoever holds the Rollout does so here, behind this there is no way back
			return failed(err)
		}
		if r.Spares() { // it waited, too: while something lives under it, a taint has that renewed
			return r.enter(StepOut, r.NewShare, x.now()), Standing{}
		}
		return r.enter(StepLeaving, r.NewShare, x.now()), Standing{}
	case StepLeaving:
		if _, err := a.Assign(ctx, r); err != nil { // one that was prepared, and tainted before it signed, is not kept ready any more
			return failed(err)
		}
		if err := a.Withdraw(ctx, r.Goes()); err != nil {
			return failed(err)
		}
		return r.enter(StepOut, r.NewShare, x.now()).Forget(r.Goes().ID), Standing{}
	}
	return r, Standing{}
}

// shed does without those that leave whatever the step is, and says why the Rollout stands still where that cannot be.
func (x *Roller) shed(ctx context.Context, r Rollout) (next Rollout, changed bool, err error) {
	for _, b := range r.Behind {
		if now := x.now(); now.Before(x.bounds.of(b.By, now)) && !r.returned(b.Party) {
			continue
		}
		if err := x.o.Authorities.Withdraw(ctx, b.Party); err != nil {
			return r, false, err
		}
		return r.without(b), true, nil
	}
	for _, p := range r.expelled() { // before anybody hears of a set that has it
		if err := x.o.Authorities.Withdraw(ctx, p); err != nil {
			return r, false, err
		}
	}
	if next, turned := r.turned(x.now()); turned {
		return next, true, nil
	}
	if t, tainted := r.tainted(r.Stays()); tainted && r.Active() {
		return r, false, t.refused(r.Stays().ID, "the rollout to it stands still: taint it again, and name another one to go to")
	}
	return r, false, nil
}

// confirm waits for those who count. Where the one that signs must not, nobody who lacks the other one could ever confirm: no
// certificate is issued, not for who would have to be asked either, and waiting only lets end what lives.
func (x *Roller) confirm(ctx context.Context, r Rollout) (Rollout, Standing) {
	waits, err := x.o.Authorities.Unconfirmed(ctx, r.Set, r.Entered)
	if err != nil {
		return r, Standing{Err: err}
	}
	if r.Barred(r.Signer().ID) != nil {
		waits = nil
	}
	waits = slices.DeleteFunc(waits, func(name string) bool { return slices.Contains(r.Despite, name) })
	until := r.confirmedBy()
	if !until.IsZero() {
		until = x.bounds.of(until, x.now())
	}
	if len(waits) > 0 && (until.IsZero() || x.now().Before(until)) {
		return r, Standing{Waits: waits, Until: until}
	}
	return r.enter(StepConfirmed, 0, x.now()), Standing{}
}
