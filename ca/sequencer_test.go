package ca

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

func newTestSequencer(t *testing.T, c SequencerConfig) *Sequencer {
	t.Helper()
	s, err := NewSequencer(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func entry(i int) LedgerEntry { return LedgerEntry{ID: fmt.Sprintf("spiffe://example.org/%d", i)} }

func TestAloneDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{}
		s := newTestSequencer(t, SequencerConfig{Store: store})
		defer s.Close()
		start := time.Now()
		for i := range 3 {
			if err := s.Append(t.Context(), entry(i)); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("one after the other waited %s", took)
		}
		if c := store.commits(); len(c) != 3 {
			t.Errorf("commits %v", c)
		}
	})
}

// TestGatheringUnderLoad: after a group with company, one who comes alone waits half a millisecond for the next to come, however
// long a commit takes. Where nobody comes then, it waits no longer.
func TestGatheringUnderLoad(t *testing.T) {
	const gather = time.Millisecond
	for _, commit := range []time.Duration{time.Second, 100 * time.Microsecond} {
		synctest.Test(t, func(t *testing.T) {
			store := &memory{delay: commit}
			s := newTestSequencer(t, SequencerConfig{Store: store})
			var wg sync.WaitGroup
			at := func(d time.Duration) {
				wg.Go(func() {
					time.Sleep(d)
					if err := s.Append(t.Context(), entry(0)); err != nil {
						t.Error(err)
					}
				})
			}
			at(0)
			at(commit / 10)
			at(commit / 5) // these two wait for the first commit
			at(5 * time.Second)
			at(5*time.Second + gather*4/10)
			at(5*time.Second + gather*9/10) // the commit of these two has begun
			wg.Wait()
			s.Close()
			if got := store.commits(); !slices.Equal(got, []int{1, 2, 2, 1}) {
				t.Errorf("commits that take %s: groups of %v", commit, got)
			}
		})
	}
}

func TestUnderLoadManyShareOneCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{delay: 500 * time.Microsecond}
		s := newTestSequencer(t, SequencerConfig{Store: store})
		const n, rounds = 32, 20
		var wg sync.WaitGroup
		start := time.Now()
		for i := range n {
			wg.Go(func() {
				for r := range rounds {
					if err := s.Append(t.Context(), entry(n*r+i)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		s.Close()
		if got := len(store.all()); got != n*rounds {
			t.Errorf("%d entries, want %d", got, n*rounds)
		}
		// Each round is at most two groups (the first entry may go alone).
		if c := len(store.commits()); c > 2*rounds {
			t.Errorf("%d commits for %d rounds", c, rounds)
		}
		// A round takes a commit, and ten times as long to gather for it.
		if took := time.Since(start); took > (rounds+1)*11*500*time.Microsecond {
			t.Errorf("took %s", took)
		}
	})
}

func TestGroupsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{delay: time.Second}
		s := newTestSequencer(t, SequencerConfig{Store: store, MaxGroup: 10})
		var wg sync.WaitGroup
		for i := range 95 {
			wg.Go(func() {
				if err := s.Append(t.Context(), entry(i)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		s.Close()
		for _, c := range store.commits() {
			if c > 10 {
				t.Errorf("a group of %d", c)
			}
		}
	})
}

func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{delay: time.Minute}
		s := newTestSequencer(t, SequencerConfig{Store: store, Queue: 4, Timeout: time.Hour})
		var wg sync.WaitGroup
		wg.Go(func() { _ = s.Append(t.Context(), entry(0)) })
		synctest.Wait() // it is being written
		for i := range 4 {
			wg.Go(func() { _ = s.Append(t.Context(), entry(i)) })
		}
		synctest.Wait()
		err := s.Append(t.Context(), entry(9))
		wantReason(t, err, refusal.Overloaded)
		if r, _ := refusal.From(err); r.RetryAfter <= 0 {
			t.Error("it does not say when to come again")
		}
		wg.Wait()
		if got := len(store.all()); got != 5 {
			t.Errorf("%d entries", got)
		}
		s.Close()
	})
}

func TestFailuresInPairs(t *testing.T) {
	full := errors.New("write /var/lib/meshca/meshca.db: no space left on device")
	for name, c := range map[string]struct {
		before, after error
		entries       int
	}{"before the effect": {before: full}, "after the effect": {after: full, entries: 1}} {
		t.Run(name, func(t *testing.T) {
			store := &memory{before: c.before, after: c.after}
			var seen []error
			s := newTestSequencer(t, SequencerConfig{Store: store, Observe: func(_ int, _ time.Duration, err error) { seen = append(seen, err) }})
			err := s.Append(t.Context(), entry(1))
			wantReason(t, err, refusal.LedgerUnavailable)
			if !errors.Is(err, full) {
				t.Errorf("the cause is lost: %v", err)
			}
			if r, _ := refusal.From(err); r.Detail != "the ledger could not be written" {
				t.Errorf("the store's words travel: %q", r.Detail)
			}
			if got := len(store.all()); got != c.entries {
				t.Errorf("%d entries", got)
			}
			// It recovers by itself.
			store.set(nil, nil)
			if err := s.Append(t.Context(), entry(2)); err != nil {
				t.Error(err)
			}
			s.Close()
			if len(seen) != 2 || !errors.Is(seen[0], full) || seen[1] != nil {
				t.Errorf("observed %v", seen)
			}
		})
	}
}

func TestOneFailureFailsItsGroupAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{delay: time.Millisecond}
		s := newTestSequencer(t, SequencerConfig{Store: store})
		defer s.Close()
		results := make(chan error, 10)
		store.set(errors.New("full"), nil)
		go func() { results <- s.Append(t.Context(), entry(0)) }()
		synctest.Wait()
		for i := range 5 {
			go func() { results <- s.Append(t.Context(), entry(i)) }()
		}
		time.Sleep(500 * time.Microsecond)
		store.set(nil, nil) // the first group has been refused by now, or is about to be
		failed := 0
		for range 6 {
			if <-results != nil {
				failed++
			}
		}
		if failed != 1 {
			t.Errorf("%d of 6 failed", failed)
		}
	})
}

func TestWaiterMayLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{delay: time.Minute}
		s := newTestSequencer(t, SequencerConfig{Store: store, Timeout: time.Hour})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := s.Append(ctx, entry(1)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if err := s.Append(t.Context(), entry(2)); err != nil {
			t.Error(err)
		}
		if got := len(store.all()); got != 2 {
			t.Errorf("%d entries", got)
		}
		s.Close()
	})
}

func TestCloseDrains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{delay: time.Second}
		s := newTestSequencer(t, SequencerConfig{Store: store})
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				if err := s.Append(t.Context(), entry(i)); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		s.Close()
		wg.Wait()
		if got := len(store.all()); got != 20 {
			t.Errorf("%d entries", got)
		}
		wantReason(t, s.Append(t.Context(), entry(21)), refusal.Stopping)
		s.Close() // twice does no harm
	})
}

// stuckStore is a store that neither answers nor fails until it is let go.
type stuckStore struct{ free chan struct{} }

func (h stuckStore) AppendLedger(context.Context, []LedgerEntry) error { <-h.free; return nil }

func TestAStoreThatHangsIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := stuckStore{make(chan struct{})}
		s := newTestSequencer(t, SequencerConfig{Store: store})
		if err := s.Ready(); err != nil {
			t.Errorf("at rest: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 7*time.Second)
		defer cancel()
		if err := s.Append(ctx, entry(1)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if err := s.Ready(); refusal.Of(err) != refusal.LedgerUnavailable {
			t.Errorf("after seven seconds: %v", err)
		}
		began := time.Now()
		s.Close()
		if took := time.Since(began); took != 10*time.Second {
			t.Errorf("closing took %s", took)
		}
		close(store.free)
		synctest.Wait()
		if err := s.Ready(); err != nil {
			t.Errorf("when it answers again: %v", err)
		}
	})
}
