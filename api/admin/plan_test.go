package admin

import (
	"strings"
	"testing"
	"time"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// What a taint is said to do is what is left to do from where the rollout stands.
func TestThePlanOfATaint(t *testing.T) {
	old, next, third := rotation.Party{ID: "old"}, rotation.Party{ID: "new"}, rotation.Party{ID: "third"}
	now := time.Now()
	e := rotation.Emergency{By: "op", Within: 8 * time.Minute, First: old, Successor: third}
	rolling := func(step rotation.Step, share int) rotation.Rollout {
		return rotation.Rollout{Old: old, New: next, Step: step, NewShare: share, Canary: 5, Begun: now, Entered: now}
	}
	for name, c := range map[string]struct {
		r      rotation.Rollout
		what   rotation.Party
		want   []string
		wanted int
	}{
		"the one that signs": {rotation.Rollout{}, old, []string{"published: the new root", "after 4m0s those", "signing: it signs for all; the old", "over 3m0s", "out: 4m0s after that began the old", "no way back"}, 6},
		"hastened":           {rolling(rotation.StepCanary, 5), old, []string{"signing: the new root signs for all; the old", "over 3m0s", "out: 4m0s", "no way back"}, 4},
		"turned round":       {rolling(rotation.StepCanary, 5), next, []string{"confirmed: the old root signs as soon", "signing: it signs for all; the new", "over 3m0s", "the new root leaves", "no way back"}, 5},
		"never used":         {rolling(rotation.StepPublished, 0), next, []string{"out: the new root signs for nobody, and is being taken out", "no way back"}, 2},
		"on its way out":     {rolling(rotation.StepLeaving, 100), old, []string{"out: the old root is being taken out"}, 1},
		"somebody else":      {rolling(rotation.StepCanary, 5), third, []string{"out: it signs for nobody here", "never trusted again"}, 2},
	} {
		r, err := c.r.Taint(c.what, e, now)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got := plan(r, c.what.ID, now)
		if len(got) != c.wanted {
			t.Errorf("%s: %q", name, got)
		}
		for i, want := range c.want {
			if i >= len(got) || !strings.Contains(got[i], want) {
				t.Errorf("%s: line %d of %q lacks %q", name, i, got, want)
			}
		}
	}
	// Another certificate of the key that signs: that one is done without, too.
	twin := rotation.Party{ID: "twin", Key: "k"}
	e.First.Key = "k"
	r, err := rotation.Rollout{}.Taint(twin, e, now)
	if err != nil {
		t.Fatal(err)
	}
	if got := plan(r, "twin", now); len(got) != 7 || !strings.Contains(got[0], "published: the new root") || !strings.HasPrefix(got[6], "out: root twin leaves") {
		t.Errorf("%q", got)
	}
	e.First.Key = ""
	// One that has yet to leave, by the clock that the rollout goes by.
	leaves := rotation.Rollout{Old: old, New: next, Step: rotation.StepPublished, Behind: []rotation.Behind{{Party: third, By: now.Add(time.Hour)}}}
	if atOnce(leaves, "third", now) || !atOnce(leaves, "third", now.Add(time.Hour)) {
		t.Error("one that leaves in an hour leaves at once, or is there after it")
	}
	// Both of them, one after the other: a third one follows, and the first one leaves by its own bound.
	r, err = rolling(rotation.StepPublished, 0).Taint(old, e, now)
	if err != nil {
		t.Fatal(err)
	}
	if r, err = r.Taint(next, e, now); err != nil {
		t.Fatal(err)
	}
	if got := plan(r, "new", now); len(got) != 7 || got[6] != "out: root new leaves the trust bundle by "+now.Add(e.Within).UTC().Format(time.RFC3339)+", whatever still lives under it" {
		t.Errorf("%q", got)
	}
}

func TestATaintThatIsNone(t *testing.T) {
	f := start(t, "rules: []")
	for name, r := range map[string]*meshcav1.RotateRootRequest{
		"without a bound": {TaintedRoot: "ab"},
		"a long ID":       {TaintedRoot: strings.Repeat("a", 1000)},
	} {
		if _, err := f.Authorities.RotateRoot(t.Context(), r); refusal.Of(err) != refusal.RequestMalformed {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(f.operator.told) > 0 {
		t.Errorf("it was told %q", f.operator.told)
	}
}
