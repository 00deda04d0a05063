package main

import (
	"context"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/rotation"
)

// set is a CA on a machine whose wall clock can be set: it is the bubble's, and so what time.Now says; how long the machine
// runs is that, less what the clock was set forward by.
type set struct {
	*daemon
	t     *testing.T
	log   *logged
	ahead time.Duration
}

func onSetClock(t *testing.T, c *Config) *set {
	t.Helper()
	began := time.Now()
	s := &set{t: t, log: &logged{}}
	clock := rotation.NewClock(rotation.ClockOptions{Running: func() time.Duration { return time.Since(began) - s.ahead }})
	d, err := openBy(t.Context(), clock, c, slog.New(slog.NewJSONHandler(s.log, nil)), io.Discard, openUpstream)
	if err != nil {
		t.Fatal(err)
	}
	endWith(t, d)
	s.daemon = d
	return s
}

// forward sets the wall clock forward.
func (s *set) forward(by time.Duration) {
	s.clock.Now() // as somebody did a moment ago
	s.ahead += by
	time.Sleep(by)
}

// stands enters a Rollout in the journal, of the root that signs and another one.
func (s *set) stands(r rotation.Rollout) {
	s.t.Helper()
	_, version, err := s.store.Rollout(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	signs, other := rotation.Party{ID: s.authority.Assignment().Root.ID}, rotation.Party{ID: strings.Repeat("ab", 32)}
	r.Old, r.New = other, signs
	if r.NewShare == 0 {
		r.Old, r.New = signs, other
	}
	if err := s.store.SwapRollout(s.t.Context(), version, r); err != nil {
		s.t.Fatal(err)
	}
}

// remains wants that a Rollout stays where it is, and goes on when the clock says that what it waits for is over.
func (s *set) remains(step rotation.Step, after time.Duration) {
	s.t.Helper()
	at := func() rotation.Step {
		s.roller.Move(s.t.Context())
		return s.operator.Standing().Rollout.Step
	}
	if now := at(); now != step {
		s.t.Errorf("the clock was set forward by %s, and the rollout went from %s to %s", s.ahead, step, now)
	}
	time.Sleep(after)
	if now := at(); now == step {
		s.t.Errorf("%s later the rollout is still %s: %+v", after, now, s.operator.Standing())
	}
}

// A wall clock that is set forward ends nothing that a rollout waits for, and makes no wait longer: all who end something go
// by the clock that does not believe it.
func TestAClockThatIsSetForwardEndsNoWait(t *testing.T) {
	const jump = 7 * time.Hour
	published := func() rotation.Rollout {
		return rotation.Rollout{Step: rotation.StepPublished, Set: 9, Begun: time.Now(), Entered: time.Now()}
	}
	for name, c := range map[string]struct {
		// reader is how old a bundle file somebody may use, agent how long one that has acknowledged nothing holds something.
		reader, agent time.Duration
		run           func(*set)
	}{
		"the last certificate under a root": {run: func(s *set) {
			s.stands(rotation.Rollout{Step: rotation.StepRetired, NewShare: 100, LastEnd: time.Now().Add(6 * time.Hour)})
			s.forward(jump)
			s.remains(rotation.StepRetired, 6*time.Hour)
		}},
		"what a clock a year ahead has signed under it": {run: func(s *set) {
			s.stands(rotation.Rollout{Step: rotation.StepRetired, NewShare: 100, LastEnd: time.Now().AddDate(1, 0, 0)})
			s.roller.Move(s.t.Context()) // which sees the step, and keeps by how long the machine runs what may be in use under it
			s.forward(jump)
			s.remains(rotation.StepRetired, rollout.Lives)
		}},
		"an agent that counts": {agent: 6 * time.Hour, run: func(s *set) {
			s.bundleFile.written(9, nil)
			s.stands(published())
			s.forward(jump)
			s.remains(rotation.StepPublished, 6*time.Hour)
		}},
		"an emergency's bound": {agent: 100 * time.Hour, run: func(s *set) {
			s.bundleFile.written(9, nil)
			r := published()
			r.Within = 8 * time.Hour
			s.stands(r)
			s.roller.Move(s.t.Context()) // which sees the bound, and keeps it by how long the machine runs, too
			s.forward(jump)
			s.remains(rotation.StepPublished, 4*time.Hour)
		}},
		"a reader of the file as it was": {reader: time.Hour, run: func(s *set) {
			s.bundleFile.written(9, nil)
			s.stands(published())
			s.forward(jump)
			s.remains(rotation.StepPublished, time.Hour)
		}},
		"a reader of the file as it is then": {reader: time.Hour, run: func(s *set) {
			s.stands(published())
			s.forward(jump)
			s.bundleFile.written(9, nil)
			s.remains(rotation.StepPublished, time.Hour)
		}},
		"what operators order": {run: func(s *set) {
			s.forward(jump)
			r, err := s.operator.Rotate(s.t.Context(), rollout.RotateOptions{By: "test"})
			if now := s.clock.Now(); err != nil || !r.Begun.Equal(now) {
				s.t.Errorf("it began at %s (%v), and it is %s", r.Begun, err, now)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				config := configIn(t, dir, clusterIn(t, dir, "a", false))
				config.BundleFile = dir + "/bundle.json"
				config.Readers = []ReaderConfig{{Name: "mirror", Refresh: metav1.Duration{Duration: c.reader}}}
				if c.agent > 0 {
					holds(t, config, c.agent)
				}
				c.run(onSetClock(t, config))
			})
		})
	}
}

// A stolen intermediate is replaced, and then its root is tainted, on a machine whose wall clock was set forward today: what
// was issued in between is ordered to renew, before the root leaves. The first order lies, by that clock, after all that the
// second command began.
func TestAClockThatIsSetForwardSparesNobodyTheRenewal(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		config := configIn(t, dir, clusterIn(t, dir, "a", false))
		s := onSetClock(t, config)
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		defer running.Wait()
		defer stop()
		running.Go(func() { s.keepLines(ctx, func() {}) })
		time.Sleep(time.Second)
		s.forward(10 * time.Minute)
		if _, err := s.operator.RotateIntermediate(ctx, 2*time.Minute); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		if _, err := s.serving.Renew(ctx); err != nil { // under the root that is tainted then
			t.Fatal(err)
		}
		issued := time.Now()
		time.Sleep(time.Second)
		if _, err := s.operator.Rotate(ctx, rollout.RotateOptions{By: "test", Within: 10 * time.Minute}); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(time.Hour); s.operator.Standing().Rollout.Step != rotation.StepOut; time.Sleep(10 * time.Second) {
			if time.Now().After(end) {
				t.Fatalf("the root does not leave: %+v", s.operator.Standing())
			}
			for s.roller.Move(ctx) {
			}
		}
		standing, _ := s.orders.Get()
		n := len(standing.Renew) // the one before stands, too: it was to be followed sooner
		if n == 0 || standing.Renew[n-1].ID != "" || !standing.Renew[n-1].IssuedBefore.After(issued) {
			t.Errorf("the root is out, and what was issued under it at %s is not ordered to renew: %+v", issued, standing.Renew)
		}
	})
}

// holds enters an agent in the store of a CA that does not run, which has acknowledged nothing and holds something for a while.
func holds(t *testing.T, c *Config, lasts time.Duration) {
	t.Helper()
	store, err := bolt.Open(c.storePath())
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	const agent = "spiffe://mesh.test/meshca/agent/a/node1"
	err = store.UpdateAgent(t.Context(), agent, func(r *ca.AgentRecord) error {
		r.ID, r.Cluster, r.HoldsUntil = agent, "a", time.Now().Add(lasts)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A wall clock that is set forward costs nothing of the ledger before it has stood for a day, and that it was is told.
func TestAClockThatIsSetForwardPrunesNothing(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		c := configIn(t, dir, clusterIn(t, dir, "a", false))
		s := onSetClock(t, c)
		entry := ca.LedgerEntry{Serial: []byte{1}, ID: "spiffe://mesh.test/a", Profile: "workload", IssuedAt: time.Now(), NotAfter: time.Now().Add(time.Hour), Evidence: []byte("{}")}
		if err := s.ledger.Append(t.Context(), entry); err != nil {
			t.Fatal(err)
		}
		kept := func() uint64 {
			t.Helper()
			n, err := s.store.LedgerSize(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		s.forward(c.Ledger.KeepAfterExpiry.Duration + 2*time.Hour)
		go s.prune(t.Context())
		go s.mend(t.Context())
		time.Sleep(23 * time.Hour)
		if kept() != 1 {
			t.Error("the clock was set forward, and the ledger forgot what ended by it")
		}
		const says = "the clock was set forward: what it says has ended since is neither pruned from the ledger nor taken as ended by a rollout for a day, so that it can be set right"
		if by, told := s.log.find(says, "by"); !told {
			t.Errorf("nobody is told that the clock was set forward by %s %s", s.ahead, by)
		}
		time.Sleep(3 * time.Hour)
		if kept() != 0 {
			t.Error("the clock has stood for a day, and what ended by it is kept")
		}
	})
}
