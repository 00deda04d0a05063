package storetest

import (
	"errors"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshca/meshca/rotation"
)

// testRollout holds the journal of roots to its contract: one record, replaced by whoever saw the last version.
func testRollout(t *testing.T, open Opener) {
	place := t.TempDir()
	s := open(t, place)
	if r, version, err := s.Rollout(t.Context()); err != nil || version != 0 || r.Step != "" {
		t.Fatalf("a new store has the rollout %+v, version %d, %v", r, version, err)
	}
	at := time.Date(2026, 2, 3, 4, 5, 6, 7, time.UTC)
	want := rotation.Rollout{
		Old: rotation.Party{ID: "a", Ref: "1"}, New: rotation.Party{ID: "b", Ref: "2"}, Step: rotation.StepCanary, Entered: at, Begun: at, By: "uid 0",
		Canary: 5, NewShare: 5, Set: 7, Despite: []string{"x"}, Within: time.Minute, Aborted: true, AbortedBy: "uid 1", AbortedAt: at, LastEnd: at,
		Since: at, Taints: []rotation.Taint{{ID: "c", Key: "k", At: at, By: "uid 2"}}, Gone: []string{"d"},
		Behind: []rotation.Behind{{Party: rotation.Party{ID: "e", Ref: "3"}, By: at, Kept: true}}, Lives: map[string]time.Time{"f": at},
		Owed: []rotation.Owed{{ID: "g", Signer: "4", At: at, Within: time.Minute}},
		Passed: []rotation.Passage{{Step: rotation.StepChosen, Entered: at}, {Step: rotation.StepPublished, Entered: at,
			Had: &rotation.Had{Aborted: true, AbortedBy: "uid 1", NewShare: 5, Set: 7, Within: time.Minute, GivenUp: true, LastEnd: at, Spared: true}}},
	}
	must(t, s.SwapRollout(t.Context(), 0, want))
	for _, version := range []uint64{0, 2} {
		if err := s.SwapRollout(t.Context(), version, rotation.Rollout{Step: rotation.StepOut}); !errors.Is(err, rotation.ErrConflict) {
			t.Errorf("a swap of version %d: %v", version, err)
		}
	}
	must(t, s.Close())
	s = open(t, place)
	got, version, err := s.Rollout(t.Context())
	if err != nil || version != 1 || !reflect.DeepEqual(got, want) {
		t.Fatalf("got %+v, version %d, %v; want %+v", got, version, err, want)
	}
	var won atomic.Int32
	var racers sync.WaitGroup
	for range 8 {
		racers.Go(func() {
			switch err := s.SwapRollout(t.Context(), 1, want); {
			case err == nil:
				won.Add(1)
			case !errors.Is(err, rotation.ErrConflict):
				t.Error(err)
			}
		})
	}
	racers.Wait()
	if won.Load() != 1 {
		t.Errorf("%d of 8 won one version", won.Load())
	}
	must(t, s.Close())
}
