package rotation

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

var (
	oldRoot = Party{ID: "old", Ref: "issuer-1"}
	newRoot = Party{ID: "new", Ref: "issuer-2"}
)

func TestBegin(t *testing.T) {
	now := time.Unix(1000, 0)
	r, err := Begin(Rollout{}, oldRoot, newRoot, BeginOptions{By: "uid 0", Canary: 5}, now)
	if err != nil || r.Step != StepChosen || !r.Active() || !r.Signs("old") || r.Signs("new") {
		t.Fatalf("%+v, %v", r, err)
	}
	for name, c := range map[string]struct {
		before    Rollout
		old, next Party
		o         BeginOptions
		want      error
	}{
		"another is under way": {before: r, old: oldRoot, next: newRoot, want: ErrRolling},
		"the same":             {old: oldRoot, next: oldRoot},
		"no successor":         {old: oldRoot},
		"a share of all":       {old: oldRoot, next: newRoot, o: BeginOptions{Canary: 100}},
		"a share below zero":   {old: oldRoot, next: newRoot, o: BeginOptions{Canary: -1}},
		"a tainted one":        {before: Rollout{New: oldRoot, Step: StepOut, NewShare: 100, Taints: []Taint{{ID: "new"}}}, old: oldRoot, next: newRoot},
		"who signs no more":    {before: Rollout{Old: newRoot, New: thirdRoot, Step: StepOut, NewShare: 100}, old: newRoot, next: oldRoot, want: ErrMeanwhile},
		"one that is leaving":  {before: Rollout{New: oldRoot, Step: StepOut, NewShare: 100, Behind: []Behind{{Party: newRoot}}}, old: oldRoot, next: newRoot},
	} {
		r, err := Begin(c.before, c.old, c.next, c.o, now)
		if err == nil || c.want != nil && !errors.Is(err, c.want) || c.want == nil && errors.Is(err, ErrMeanwhile) {
			t.Errorf("%s: %v, %+v", name, err, r)
		}
	}
	over := r.enter(StepOut, 100, now)
	if _, err := Begin(over, newRoot, Party{ID: "third"}, BeginOptions{}, now); err != nil {
		t.Errorf("behind one that is over: %v", err)
	}
}

// What has passed stands in the Rollout, and is no other Rollout's.
func TestPassages(t *testing.T) {
	begun := time.Unix(1000, 0)
	r, err := Begin(Rollout{}, oldRoot, newRoot, BeginOptions{}, begun)
	if err != nil {
		t.Fatal(err)
	}
	published := r.enter(StepPublished, 0, begun.Add(time.Second))
	confirmed := published.enter(StepConfirmed, 0, begun.Add(2*time.Second))
	aborted, err := published.Abort("uid 0", begun.Add(3*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	want := []Passage{{Step: StepChosen, Entered: begun}, {Step: StepPublished, Entered: begun.Add(time.Second)}}
	for _, got := range []Rollout{confirmed, aborted} {
		if !slices.Equal(got.Passed, want) {
			t.Errorf("%s: %v, want %v", got.Step, got.Passed, want)
		}
	}
	if r.Passed != nil || len(published.Passed) != 1 {
		t.Errorf("%v, %v", r.Passed, published.Passed)
	}
	next, err := Begin(confirmed.enter(StepOut, 100, begun), newRoot, oldRoot, BeginOptions{}, begun)
	if err != nil || next.Passed != nil {
		t.Errorf("a new one begins with %v, %v", next.Passed, err)
	}
}

func TestCommandsInEachStep(t *testing.T) {
	now := time.Unix(1000, 0)
	for _, c := range []struct {
		step                    Step
		share                   int
		goOn, giveUp, abort     bool
		abortedTo               Step
		oldSignsBehind, newDoes bool
	}{
		{step: StepChosen, giveUp: true, abort: true, abortedTo: StepSigning, oldSignsBehind: true},
		{step: StepPublished, giveUp: true, abort: true, abortedTo: StepSigning, oldSignsBehind: true},
		{step: StepConfirmed, abort: true, abortedTo: StepSigning, oldSignsBehind: true},
		{step: StepCanary, share: 5, goOn: true, abort: true, abortedTo: StepConfirmed, oldSignsBehind: true, newDoes: true},
		{step: StepSigning, share: 100, abort: true, abortedTo: StepConfirmed, newDoes: true},
		{step: StepRetired, share: 100, abort: true, abortedTo: StepConfirmed, newDoes: true},
		{step: StepLeaving, share: 100},
		{step: StepOut, share: 100},
	} {
		r := Rollout{Old: oldRoot, New: newRoot, Step: c.step, NewShare: c.share}
		if _, err := r.Continue(now); (err == nil) != c.goOn {
			t.Errorf("%s: continue: %v", c.step, err)
		}
		if _, err := r.GiveUp("a"); (err == nil) != c.giveUp {
			t.Errorf("%s: give up: %v", c.step, err)
		}
		aborted, err := r.Abort("op", now)
		if (err == nil) != c.abort {
			t.Errorf("%s: abort: %v", c.step, err)
		}
		if err != nil {
			continue
		}
		if aborted.Step != c.abortedTo || aborted.Stays() != oldRoot || aborted.Goes() != newRoot || aborted.Within != 0 ||
			aborted.Signs("old") != c.oldSignsBehind || aborted.Signs("new") != c.newDoes {
			t.Errorf("%s: aborted: %+v", c.step, aborted)
		}
		// What a second order is told to give instead is taken.
		for what, r := range map[string]Rollout{"aborted": aborted, "over": aborted.enter(StepRetired, 0, now), "for good": tainted(t, aborted, newRoot, now)} {
			_, err := r.Abort("op", now)
			_, forth := r.Continue(now)
			if !errors.Is(err, ErrStep) || strings.Contains(err.Error(), "certctl ca continue") != (forth == nil) {
				t.Errorf("%s: %s, and aborted again: %v; continued: %v", c.step, what, err, forth)
			}
		}
		// While New signs still there is a way forward again; then New signs for all.
		switch on, err := aborted.Continue(now); {
		case c.share == 0 && !errors.Is(err, ErrStep):
			t.Errorf("%s: aborted, and continued: %v", c.step, err)
		case c.share > 0 && (err != nil || on.Step != StepConfirmed || on.Aborted || on.Stays() != newRoot || on.staying(now).NewShare != 100):
			t.Errorf("%s: aborted, and continued: %v, %+v", c.step, err, on)
		}
	}
	r := Rollout{Step: StepPublished, Despite: []string{"a"}}
	if r, _ = r.GiveUp("b", "a"); !slices.Equal(r.Despite, []string{"a", "b"}) {
		t.Errorf("given up: %q", r.Despite)
	}
}

// What a command takes in stays, or is refused: it does not go by what was begun before. It counts as gone no more.
func TestTrust(t *testing.T) {
	now := time.Unix(1000, 0)
	rolling := func(step Step, aborted bool) Rollout {
		return Rollout{Old: oldRoot, New: newRoot, Step: step, Aborted: aborted, Behind: []Behind{{Party: thirdRoot, By: now}}, Gone: []string{"gone"}}
	}
	for _, step := range []Step{StepChosen, StepPublished, StepConfirmed, StepCanary, StepSigning, StepRetired, StepLeaving, StepOut} {
		for _, aborted := range []bool{false, true} {
			r := rolling(step, aborted)
			for id, want := range map[string]bool{
				"old":   aborted || step == StepOut,
				"new":   !aborted || step != StepLeaving,
				"third": false,
				"gone":  true,
			} {
				next, err := r.Trust(id)
				switch {
				case (err == nil) != want:
					t.Errorf("%s, aborted %v: %s: %v", step, aborted, id, err)
				case err == nil && (next.Leaves(id) || next.Active() && next.Trusted != (id == "new")):
					t.Errorf("%s, aborted %v: %s is trusted, and it is %+v", step, aborted, id, next)
				}
			}
		}
	}
	r, err := rolling(StepPublished, false).Trust("gone")
	if err != nil {
		t.Fatal(err)
	}
	gone := Party{ID: "gone"}
	if r, err = r.Taint(gone, Emergency{Within: time.Minute}, now); err != nil || r.Returned(gone) != nil {
		t.Errorf("tainted, it counts as one that a backup has brought back: %v, %v", err, r.Returned(gone))
	}
}

// tainted is the Rollout with a taint of a party.
func tainted(t *testing.T, r Rollout, what Party, now time.Time) Rollout {
	t.Helper()
	next, err := r.Taint(what, Emergency{Within: time.Minute, Successor: thirdRoot}, now)
	if err != nil {
		t.Fatal(err)
	}
	return next
}

// A share is the same identities in every process, about as many as it says, and grows by adding to them.
func TestInShare(t *testing.T) {
	for _, percent := range []int{0, 5, 50, 100} {
		n := 0
		for i := range 10_000 {
			id := "spiffe://mesh.test/ns/a/sa/" + strconv.Itoa(i)
			if InShare(id, percent) {
				n++
				if !InShare(id, min(percent+1, 100)) {
					t.Fatalf("%s is in %d %% and not in more", id, percent)
				}
			}
		}
		if got := float64(n) / 100; got < float64(percent)-1 || got > float64(percent)+1 {
			t.Errorf("%d %%: %.2f %% of the identities", percent, got)
		}
	}
}

// plain is a world in which everything works at once.
type plain struct {
	mu          sync.Mutex // guards what follows
	record      Rollout
	version     uint64
	unconfirmed []string
	failing     error
	lastEnd     time.Duration
	did         []string
}

// with looks at it or changes it.
func (p *plain) with(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

func (p *plain) Rollout(context.Context) (Rollout, uint64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.record, p.version, nil
}

func (p *plain) step() (s Step) {
	p.with(func() { s = p.record.Step })
	return s
}

func (p *plain) SwapRollout(_ context.Context, version uint64, next Rollout) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if version != p.version {
		return ErrConflict
	}
	p.record, p.version = next, version+1
	return nil
}

func (p *plain) Publish(context.Context, Party) (uint64, error) { return 2, p.do("publish") }

func (p *plain) Unconfirmed(context.Context, uint64, time.Time) ([]string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.unconfirmed), nil
}

func (p *plain) Prepare(_ context.Context, who Party) error { return p.do("prepare " + who.Ref) }

func (p *plain) Assign(_ context.Context, r Rollout) (time.Time, error) {
	return time.Now().Add(p.lastEnd), p.do("assign " + strconv.Itoa(r.NewShare))
}

func (p *plain) Withdraw(_ context.Context, who Party) error { return p.do("withdraw " + who.ID) }

func (p *plain) do(what string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failing == nil {
		p.did = append(p.did, what)
	}
	return p.failing
}

func TestARolloutInItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		p := &plain{unconfirmed: []string{"agent-1", "agent-2"}, lastEnd: 6 * time.Hour}
		var steps []Step
		x := NewRoller(RollerOptions{Journal: p, Authorities: p, Observe: func(r Rollout) { p.with(func() { steps = append(steps, r.Step) }) }})
		ended := make(chan struct{})
		go func() { defer close(ended); x.Run(ctx) }()
		defer func() { cancel(); <-ended }()
		change := func(f func(Rollout) (Rollout, error)) {
			t.Helper()
			if _, err := x.Change(ctx, f); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		at := func(step Step, waits ...string) {
			t.Helper()
			if s, _ := x.Standing(); s.Rollout.Step != step || !slices.Equal(s.Waits, waits) || s.Err != nil {
				t.Fatalf("it stands at %+v, want %s waiting for %q", s, step, waits)
			}
		}
		change(func(r Rollout) (Rollout, error) {
			return Begin(r, oldRoot, newRoot, BeginOptions{Canary: 5}, time.Now())
		})
		at(StepPublished, "agent-1", "agent-2")
		p.with(func() { p.unconfirmed = []string{"agent-2"} })
		time.Sleep(3 * time.Second)
		at(StepPublished, "agent-2")
		change(func(r Rollout) (Rollout, error) { return r.GiveUp("agent-2") })
		at(StepCanary, "an operator to continue or to abort")
		time.Sleep(time.Hour)
		change(func(r Rollout) (Rollout, error) { return r.Continue(time.Now()) })
		at(StepRetired, "the last certificate under it to end")
		time.Sleep(6*time.Hour - time.Second)
		at(StepRetired, "the last certificate under it to end")
		time.Sleep(4 * time.Second)
		at(StepOut)
		p.mu.Lock()
		defer p.mu.Unlock()
		if want := []Step{StepChosen, StepPublished, StepConfirmed, StepCanary, StepSigning, StepRetired, StepLeaving, StepOut}; !slices.Equal(steps, want) {
			t.Errorf("steps %v", steps)
		}
		if did := slices.Compact(p.did); !slices.Equal(did, []string{"assign 0", "publish", "prepare issuer-2", "assign 5", "assign 100", "withdraw old"}) {
			t.Errorf("it did %q", did)
		}
	})
}

// An emergency waits for confirmations half of its bound, and for renewals the other half, whatever else lives.
func TestAnEmergencyIsOverWithinItsBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &plain{unconfirmed: []string{"agent-1"}, lastEnd: 6 * time.Hour}
		x := NewRoller(RollerOptions{Journal: p, Authorities: p})
		ctx, cancel := context.WithCancel(t.Context())
		go x.Run(ctx)
		defer cancel()
		begun := time.Now()
		if _, err := x.Change(ctx, func(r Rollout) (Rollout, error) {
			return r.Taint(oldRoot, Emergency{Within: 10 * time.Minute, First: oldRoot, Successor: newRoot}, time.Now())
		}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if s, _ := x.Standing(); s.Rollout.Step != StepPublished || !s.Until.Equal(begun.Add(5*time.Minute)) {
			t.Errorf("it stands at %+v", s)
		}
		for p.step() != StepOut {
			if time.Since(begun) > 10*time.Minute+10*time.Second {
				t.Fatalf("it is not over: %s", p.step())
			}
			time.Sleep(time.Second)
		}
		if took := time.Since(begun); took < 10*time.Minute {
			t.Errorf("it was over after %s: who renews last had no time", took)
		}
	})
}

// Who holds a Rollout where it is holds also one that takes nothing out at its end.
func TestARolloutThatIsHeldDoesNotEnd(t *testing.T) {
	held := errors.New("held")
	for name, trusted := range map[string]bool{"the one that goes leaves": false, "it stays": true} {
		t.Run(name, func(t *testing.T) {
			p := &plain{failing: held, record: Rollout{Old: oldRoot, New: newRoot, Step: StepRetired, Aborted: true, Trusted: trusted}}
			x := NewRoller(RollerOptions{Journal: p, Authorities: p})
			if x.Move(t.Context()) || p.step() != StepRetired {
				t.Fatalf("it moved to %s", p.step())
			}
			if s, _ := x.Standing(); !errors.Is(s.Err, held) {
				t.Errorf("it stands at %+v", s)
			}
			p.with(func() { p.failing = nil })
			for x.Move(t.Context()) {
			}
			if p.step() != StepOut {
				t.Errorf("it stands at %s", p.step())
			}
		})
	}
}

func TestWhatFailsIsTriedAgainAndShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failing := errors.New("no connection")
		p := &plain{failing: failing}
		x := NewRoller(RollerOptions{Journal: p, Authorities: p})
		ctx, cancel := context.WithCancel(t.Context())
		go x.Run(ctx)
		defer cancel()
		if _, err := x.Change(ctx, func(r Rollout) (Rollout, error) {
			return Begin(r, oldRoot, newRoot, BeginOptions{}, time.Now())
		}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if s, _ := x.Standing(); s.Rollout.Step != StepChosen || !errors.Is(s.Err, failing) {
			t.Errorf("it stands at %+v", s)
		}
		p.with(func() { p.failing = nil })
		time.Sleep(time.Minute)
		if p.step() != StepOut {
			t.Errorf("it stands at %s", p.step())
		}
	})
}

// A party may be known by another reference at any step; one that has left is none.
func TestRepoint(t *testing.T) {
	a, b := Party{ID: "a", Ref: "1"}, Party{ID: "b", Ref: "2"}
	for name, c := range map[string]struct {
		r    Rollout
		p    Party
		want bool
	}{
		"the new one":            {Rollout{Old: a, New: b, Step: StepPublished}, Party{ID: "b", Ref: "3"}, true},
		"the old one":            {Rollout{Old: a, New: b, Step: StepRetired, NewShare: 100}, Party{ID: "a", Ref: "3"}, true},
		"the same reference":     {Rollout{Old: a, New: b, Step: StepPublished}, b, false},
		"another one":            {Rollout{Old: a, New: b, Step: StepPublished}, Party{ID: "c", Ref: "3"}, false},
		"the one that signs":     {Rollout{Old: a, New: b, Step: StepOut, NewShare: 100}, Party{ID: "b", Ref: "3"}, true},
		"the one that has left":  {Rollout{Old: a, New: b, Step: StepOut, NewShare: 100}, Party{ID: "a", Ref: "3"}, false},
		"what an abort left":     {Rollout{Old: a, New: b, Step: StepOut, Aborted: true}, Party{ID: "a", Ref: "3"}, true},
		"what an abort took out": {Rollout{Old: a, New: b, Step: StepOut, Aborted: true}, Party{ID: "b", Ref: "3"}, false},
		"before the first start": {Rollout{}, Party{ID: "a", Ref: "3"}, false},
	} {
		next, moved := c.r.Repoint(c.p)
		if moved != c.want {
			t.Errorf("%s: %v", name, moved)
		}
		back := next
		for _, x := range []*Party{&back.Old, &back.New} {
			if moved && *x == c.p {
				x.Ref = map[string]string{"a": "1", "b": "2"}[x.ID]
			}
		}
		if back.Old != c.r.Old || back.New != c.r.New || next.Step != c.r.Step || moved && next.Old != c.p && next.New != c.p {
			t.Errorf("%s: it became %+v", name, next)
		}
	}
}
