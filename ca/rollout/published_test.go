package rollout_test

import (
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// A new root does not sign before it has been where readers look for it, for as long as they may use an older bundle. A
// place that cannot be written holds it, with its fault to be seen, until an operator gives it up.
func TestWhatIsPublishedIsWaitedFor(t *testing.T) {
	h := newHouse(t)
	place := rollout.Publication{Reader: rollout.Reader{Name: "prod/configmap/x", Refresh: time.Hour}, Fault: "forbidden"}
	h.places.put(place)
	defer h.run()()
	old := h.auth.Assignment().Root.ID
	if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{By: "uid 0"}); err != nil {
		t.Fatal(err)
	}
	waits := func() bool {
		s, _ := h.roller.Standing()
		return s.Rollout.Step == rotation.StepPublished && slices.Equal(s.Waits, []string{"reader prod/configmap/x"})
	}
	h.eventually("the wait for the place", waits)
	seen := func() rollout.ReaderView {
		v, err := h.operator.View(t.Context())
		h.must(err)
		if len(v.Readers) != 1 {
			t.Fatalf("the view has the readers %+v", v.Readers)
		}
		return v.Readers[0]
	}
	if r := seen(); r.Name != place.Name || !r.Until.IsZero() || r.Fault != "forbidden" {
		t.Errorf("got %+v", r)
	}
	// It was written, half an hour ago: the other half is left.
	place.Since, place.Fault = time.Now().Add(-30*time.Minute), ""
	h.places.put(place)
	if r := seen(); !r.Until.Equal(place.Since.Add(time.Hour)) || r.Fault != "" {
		t.Errorf("got %+v", r)
	}
	time.Sleep(100 * time.Millisecond) // five looks of the roller
	if !waits() || h.auth.Assignment().Root.ID != old {
		t.Fatalf("it did not wait: %s", h.step())
	}
	r, _, err := h.store.Rollout(t.Context())
	h.must(err)
	h.places.mu.Lock()
	if h.places.set != r.Set {
		t.Errorf("it asked for bundle %d, the root is in %d", h.places.set, r.Set)
	}
	h.places.mu.Unlock()
	// Its time is over.
	place.Since = time.Now().Add(-time.Hour)
	h.places.put(place)
	h.eventually("the new root to sign", func() bool { return h.auth.Assignment().Root.ID != old })
}

func TestAPlaceIsGivenUp(t *testing.T) {
	h := newHouse(t)
	h.places.put(rollout.Publication{Reader: rollout.Reader{Name: "prod/configmap/x", Refresh: time.Hour}, Fault: "forbidden"})
	defer h.run()()
	if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{By: "uid 0"}); err != nil {
		t.Fatal(err)
	}
	h.at(rotation.StepPublished)
	if _, err := h.operator.Continue(t.Context(), []string{"reader prod/configmap/x"}); err != nil {
		t.Fatal(err)
	}
	h.at(rotation.StepOut)
}
