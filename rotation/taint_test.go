package rotation

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

var thirdRoot = Party{ID: "third", Ref: "issuer-3"}

// says is a Rollout in a few words.
func says(r Rollout) string {
	text := fmt.Sprintf("%s>%s %s %d", r.Old.ID, r.New.ID, r.Step, r.NewShare)
	if r.Aborted {
		text += " back"
	}
	if r.Within > 0 {
		text += " within " + r.Within.String()
	}
	for _, b := range r.Behind {
		text += fmt.Sprintf(" %s leaves %d", b.ID, b.By.Unix())
	}
	return text
}

// What a taint does in each step to each of the two roots, and to both of them, one after the other.
func TestATaintInEachStep(t *testing.T) {
	begun, now := time.Unix(1000, 0), time.Unix(1100, 0)
	e := Emergency{By: "op", Within: 200 * time.Second, First: oldRoot, Successor: thirdRoot}
	for _, c := range []struct {
		step     Step
		share    int
		aborted  bool
		old, new string
		// both is what comes of tainting the old one, and the new one a minute later.
		both string
	}{
		{StepChosen, 0, false, "old>new chosen 0 within 3m20s", "old>new leaving 0 back within 3m20s", "old>third chosen 0 within 3m20s new leaves 1160"},
		{StepPublished, 0, false, "old>new published 0 within 3m20s", "old>new leaving 0 back within 3m20s", "old>third chosen 0 within 3m20s new leaves 1360"},
		{StepConfirmed, 0, false, "old>new confirmed 0 within 3m20s", "old>new leaving 0 back within 3m20s", "old>third chosen 0 within 3m20s new leaves 1360"},
		{StepCanary, 5, false, "old>new signing 100 within 3m20s", "old>new confirmed 5 back within 3m20s", "new>third chosen 0 within 3m20s old leaves 1300"},
		{StepSigning, 100, false, "old>new signing 100 within 3m20s", "old>new confirmed 100 back within 3m20s", "new>third chosen 0 within 3m20s old leaves 1300"},
		{StepRetired, 100, false, "old>new signing 100 within 3m20s", "old>new confirmed 100 back within 3m20s", "new>third chosen 0 within 3m20s old leaves 1300"},
		{StepLeaving, 100, false, "old>new leaving 100", "new>third chosen 0 within 3m20s old leaves 1100", "new>third chosen 0 within 3m20s old leaves 1160"},
		{StepConfirmed, 5, true, "old>new confirmed 5 within 3m20s", "old>new confirmed 5 back within 3m20s", "old>third chosen 0 within 3m20s new leaves 1360"},
		{StepConfirmed, 100, true, "old>new confirmed 100 within 3m20s", "old>new confirmed 100 back within 3m20s", "new>third chosen 0 within 3m20s old leaves 1300"},
		{StepSigning, 0, true, "old>new chosen 0 within 3m20s", "old>new signing 0 back within 3m20s", "old>third chosen 0 within 3m20s new leaves 1360"},
		{StepRetired, 0, true, "old>new chosen 0 within 3m20s", "old>new signing 0 back within 3m20s", "old>third chosen 0 within 3m20s new leaves 1360"},
		{StepLeaving, 0, true, "old>third chosen 0 within 3m20s new leaves 1100", "old>new leaving 0 back", ""},
	} {
		name := fmt.Sprintf("%s %d aborted %v", c.step, c.share, c.aborted)
		r := Rollout{Old: oldRoot, New: newRoot, Step: c.step, NewShare: c.share, Begun: begun, Entered: begun, Aborted: c.aborted, Canary: 5,
			Gone: []string{"older"}, LastEnd: begun.Add(time.Hour)}
		tainted := func(r Rollout, what Party, at time.Time) Rollout {
			t.Helper()
			next, err := r.Taint(Party{ID: what.ID, Ref: what.Ref, Key: "key of " + what.ID}, e, at)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			taint, known := next.Tainted(what.ID)
			byKey, _ := next.TaintedKey("key of " + what.ID)
			if !known || taint != byKey || taint.By != "op" || !slices.Equal(next.Gone, r.Gone) {
				t.Errorf("%s: %+v", name, next)
			}
			return next
		}
		if got := says(tainted(r, oldRoot, now)); got != c.old {
			t.Errorf("%s, the old one tainted: %s, want %s", name, got, c.old)
		}
		if got := says(tainted(r, newRoot, now)); got != c.new {
			t.Errorf("%s, the new one tainted: %s, want %s", name, got, c.new)
		}
		if c.both == "" {
			continue
		}
		both := tainted(tainted(r, oldRoot, now), newRoot, now.Add(time.Minute))
		if got := says(both); got != c.both {
			t.Errorf("%s, both tainted: %s, want %s", name, got, c.both)
		}
		if _, known := both.Tainted("old"); !known {
			t.Errorf("%s: the first taint is forgotten", name)
		}
	}
}

func TestATaintWithoutASuccessor(t *testing.T) {
	now := time.Unix(1000, 0)
	e := Emergency{Within: time.Minute, First: oldRoot}
	if _, err := (Rollout{}).Taint(oldRoot, e, now); !errors.Is(err, ErrNeedsSuccessor) {
		t.Errorf("nobody could sign: %v", err)
	}
	for name, successor := range map[string]Party{"itself": oldRoot, "a tainted one": {ID: "bad"}} {
		e.Successor = successor
		if r, err := (Rollout{Taints: []Taint{{ID: "bad"}}}).Taint(oldRoot, e, now); err == nil {
			t.Errorf("%s follows: %+v", name, r)
		}
	}
	if _, err := (Rollout{}).Taint(thirdRoot, Emergency{First: oldRoot}, now); err == nil {
		t.Error("no bound was taken")
	}
}

// One that signs for nobody leaves at once, whatever else is under way. What is behind already leaves within the bound.
func TestATaintOfOneThatSignsForNobody(t *testing.T) {
	now := time.Unix(1000, 0)
	e := Emergency{Within: time.Minute, First: oldRoot}
	for _, r := range []Rollout{{}, {Old: newRoot, New: oldRoot, Step: StepOut, NewShare: 100}, {Old: oldRoot, New: newRoot, Step: StepCanary, NewShare: 5}} {
		next, err := r.Taint(thirdRoot, e, now)
		if err != nil || next.Step != r.Step || next.NewShare != r.NewShare || len(next.Behind) != 1 || next.Behind[0] != (Behind{Party: thirdRoot, By: now}) {
			t.Errorf("%+v, %v", next, err)
		}
	}
	for by, want := range map[time.Duration]time.Duration{time.Second: time.Second, time.Hour: time.Minute} {
		next, err := Rollout{Behind: []Behind{{Party: thirdRoot, By: now.Add(by)}}}.Taint(thirdRoot, e, now)
		if err != nil || len(next.Behind) != 1 || !next.Behind[0].By.Equal(now.Add(want)) {
			t.Errorf("%+v, %v", next, err)
		}
	}
}

// A bound may be made tighter, and is never put off.
func TestABoundIsNeverPutOff(t *testing.T) {
	begun := time.Unix(1000, 0)
	e := Emergency{Within: 10 * time.Minute, First: oldRoot, Successor: newRoot}
	r, err := Rollout{}.Taint(oldRoot, e, begun)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		step          Step
		share         int
		after, within time.Duration
		tighter       bool
	}{
		{StepPublished, 0, time.Minute, 10 * time.Minute, false},
		{StepPublished, 0, 4 * time.Minute, 3 * time.Minute, false},
		{StepPublished, 0, time.Minute, 7 * time.Minute, true},
		{StepRetired, 100, 4 * time.Minute, 3 * time.Minute, false},
		{StepRetired, 100, time.Minute, 2 * time.Minute, true},
		{StepSigning, 100, time.Minute, 9 * time.Minute, false},
		{StepSigning, 100, time.Minute, 7 * time.Minute, true},
	} {
		r := r.enter(c.step, c.share, begun)
		r.LastEnd = begun.Add(time.Hour)
		now := begun.Add(c.after)
		next, err := r.Taint(oldRoot, Emergency{Within: c.within, First: oldRoot}, now)
		if (err == nil) != c.tighter {
			t.Errorf("%s after %s: a bound of %s: %v", c.step, c.after, c.within, err)
		}
		if err == nil && (next.Within != c.within || next.confirmedBy().After(r.confirmedBy()) && c.share == 0 || len(next.Taints) != 1) {
			t.Errorf("%s: %+v", c.step, next)
		}
	}
}

// A journal of before taints were listed knows one all the same, also when its rollout is not the last one any more.
func TestATaintOfAnOlderJournal(t *testing.T) {
	begun := time.Unix(1000, 0)
	r := Rollout{Old: oldRoot, New: newRoot, Step: StepOut, NewShare: 100, Begun: begun, By: "op", Within: time.Minute}
	if got, tainted := r.Tainted("old"); !tainted || !got.At.Equal(begun) || got.By != "op" {
		t.Errorf("%+v", got)
	}
	if _, err := Begin(r, newRoot, oldRoot, BeginOptions{}, begun); refusal.Of(err) != refusal.RootTainted {
		t.Errorf("going back to it: %v", err)
	}
	next, err := Begin(r, newRoot, thirdRoot, BeginOptions{}, begun)
	if _, tainted := next.Tainted("old"); err != nil || !tainted || next.Within != 0 {
		t.Errorf("%+v, %v", next, err)
	}
	r.Step, r.NewShare = StepPublished, 0
	if _, err := r.Abort("op", begun); refusal.Of(err) != refusal.RootTainted {
		t.Errorf("an abort that goes back to it: %v", err)
	}
}

func TestWhatIsRememberedIsBounded(t *testing.T) {
	now := time.Unix(1000, 0)
	r := Rollout{}
	for i := range maxGone + 2 {
		r = r.Forget(fmt.Sprint("root", i))
	}
	if r = r.Forget("root5"); len(r.Gone) != maxGone || r.Gone[0] != "root2" || r.Gone[maxGone-1] != "root5" || slices.Index(r.Gone, "root5") != maxGone-1 {
		t.Errorf("%d are remembered, from %s to %s", len(r.Gone), r.Gone[0], r.Gone[len(r.Gone)-1])
	}
	e := Emergency{Within: time.Minute, First: oldRoot}
	var err error
	for i := 0; err == nil; i++ {
		if len(r.Taints) > maxTaints {
			t.Fatalf("%d taints", len(r.Taints))
		}
		r, err = r.Taint(Party{ID: fmt.Sprint(i)}, e, now)
	}
}
