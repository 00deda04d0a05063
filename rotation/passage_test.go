package rotation

import (
	"encoding/json"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// passed is what a step had when it was passed the last time.
func passed(t *testing.T, r Rollout, step Step) Had {
	t.Helper()
	for i := len(r.Passed) - 1; i >= 0; i-- {
		if x := r.Passed[i]; x.Step == step {
			if x.Had == nil {
				t.Fatalf("what it had in %s is not known: %+v", step, r.Passed)
			}
			return *x.Had
		}
	}
	t.Fatalf("%s was not passed: %+v", step, r.Passed)
	return Had{}
}

// What the Rollout had in a step stays with that, whatever is ordered behind it.
func TestWhatPassedIsRemembered(t *testing.T) {
	emergency := Emergency{By: "uid 9", Within: 10 * time.Minute, First: oldRoot, Successor: thirdRoot}
	for name, c := range map[string]struct {
		begin BeginOptions
		waits []string
		// orders are given one after the other, each where nothing moves by itself any more.
		orders []func(r Rollout) (Rollout, error)
		want   map[Step]Had
	}{
		"a canary, and its root tainted": {
			begin:  BeginOptions{Canary: 5},
			orders: []func(Rollout) (Rollout, error){func(r Rollout) (Rollout, error) { return r.Taint(oldRoot, emergency, time.Now()) }},
			want:   map[Step]Had{StepConfirmed: {Set: 2}, StepCanary: {Set: 2, NewShare: 5}, StepSigning: {Set: 2, NewShare: 100, Within: 10 * time.Minute}},
		},
		"some given up, a canary, and on": {
			begin: BeginOptions{Canary: 5},
			waits: []string{"agent-1"},
			orders: []func(Rollout) (Rollout, error){
				func(r Rollout) (Rollout, error) { return r.GiveUp("agent-1") },
				func(r Rollout) (Rollout, error) { return r.Continue(time.Now()) },
			},
			want: map[Step]Had{StepConfirmed: {Set: 2, GivenUp: true}, StepCanary: {Set: 2, NewShare: 5, GivenUp: true}, StepSigning: {Set: 2, NewShare: 100, GivenUp: true}},
		},
		"retired, and tainted": {
			orders: []func(Rollout) (Rollout, error){func(r Rollout) (Rollout, error) { return r.Taint(oldRoot, emergency, time.Now()) }},
			want:   map[Step]Had{StepRetired: {Set: 2, NewShare: 100, LastEnd: time.Unix(946684800, 0).Add(6 * time.Hour)}},
		},
		"aborted, and the old one tainted": {
			begin: BeginOptions{Trusted: true},
			orders: []func(Rollout) (Rollout, error){
				func(r Rollout) (Rollout, error) { return r.Abort("uid 7", time.Now()) },
				func(r Rollout) (Rollout, error) { return r.Taint(oldRoot, emergency, time.Now()) },
			},
			want: map[Step]Had{StepRetired: {Set: 2, Aborted: true, AbortedBy: "uid 7", Spared: true, LastEnd: time.Unix(946684800, 0).Add(6 * time.Hour)}},
		},
		"aborted, and the new one tainted": {
			begin: BeginOptions{Trusted: true},
			orders: []func(Rollout) (Rollout, error){
				func(r Rollout) (Rollout, error) { return r.Abort("uid 7", time.Now()) },
				func(r Rollout) (Rollout, error) { return r.Taint(newRoot, emergency, time.Now()) },
			},
			want: map[Step]Had{StepRetired: {Set: 2, Aborted: true, AbortedBy: "uid 7", Spared: true, LastEnd: time.Unix(946684800, 0).Add(6 * time.Hour)}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := &plain{unconfirmed: c.waits, lastEnd: 6 * time.Hour}
				x := NewRoller(RollerOptions{Journal: p, Authorities: p})
				change := func(f func(Rollout) (Rollout, error)) {
					t.Helper()
					if _, err := x.Change(t.Context(), f); err != nil {
						t.Fatal(err)
					}
				}
				change(func(r Rollout) (Rollout, error) { return Begin(r, oldRoot, newRoot, c.begin, time.Now()) })
				for _, order := range c.orders {
					for x.Move(t.Context()) {
					}
					change(order)
				}
				x.Move(t.Context())
				for step, want := range c.want {
					got := passed(t, p.record, step)
					if got.LastEnd.Equal(want.LastEnd) {
						got.LastEnd = want.LastEnd
					}
					if got != want {
						t.Errorf("%s: it had %+v, want %+v", step, got, want)
					}
				}
			})
		})
	}
}

// A journal of before that was kept says of its steps that they passed.
func TestPassagesOfAnOlderJournal(t *testing.T) {
	const older = `{"old": {"id": "old"}, "new": {"id": "new"}, "step": "canary", "newShare": 5, "canary": 5, "set": 2,
		"passed": [{"step": "chosen", "entered": "2026-01-02T03:04:05Z"}, {"step": "published", "entered": "2026-01-02T03:04:06Z"}]}`
	p := &plain{version: 1}
	if err := json.Unmarshal([]byte(older), &p.record); err != nil {
		t.Fatal(err)
	}
	x := NewRoller(RollerOptions{Journal: p, Authorities: p})
	r, err := x.Change(t.Context(), func(r Rollout) (Rollout, error) { return r.Continue(time.Now()) })
	if err != nil || len(r.Passed) != 3 || r.Passed[1].Step != StepPublished || r.Passed[0].Had != nil || r.Passed[1].Had != nil || passed(t, r, StepCanary).NewShare != 5 {
		t.Errorf("got %+v, %v", r.Passed, err)
	}
}

// Who observes is told of each step that is entered, also of the one that it was in: an abort that waits for a signer and is
// turned forward, and one that goes back from there.
func TestTheSameStepAgainIsObserved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &plain{lastEnd: time.Hour}
		var told []string
		x := NewRoller(RollerOptions{Journal: p, Authorities: p, Observe: func(r Rollout) {
			text := string(r.Step)
			if r.Aborted {
				text += " back"
			}
			told = append(told, text)
		}})
		for _, order := range []func(r Rollout) (Rollout, error){
			func(r Rollout) (Rollout, error) {
				return Begin(r, oldRoot, newRoot, BeginOptions{Canary: 5}, time.Now())
			},
			func(r Rollout) (Rollout, error) { return r.Abort("uid 7", time.Now()) },
			func(r Rollout) (Rollout, error) { return r.Continue(time.Now()) },
			func(r Rollout) (Rollout, error) { return r.Abort("uid 7", time.Now()) },
		} {
			if _, err := x.Change(t.Context(), order); err != nil {
				t.Fatal(err)
			}
			for len(told) < 4 && x.Move(t.Context()) {
			}
		}
		want := []string{"chosen", "published", "confirmed", "canary", "confirmed back", "confirmed", "confirmed back"}
		if !slices.Equal(told, want) {
			t.Errorf("it was told of %q, want %q", told, want)
		}
	})
}
