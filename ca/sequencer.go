package ca

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

// SequencerConfig tells how a Sequencer groups. Only Store is needed.
type SequencerConfig struct {
	Store LedgerStore
	// Gather is how long a group waits for more entries under load at most, and half of it at least, so that few commits share
	// what a core can do with many issuances; 1 ms by default. An entry that comes alone does not wait.
	Gather time.Duration
	// MaxGroup bounds a group, 512 entries by default.
	MaxGroup int
	// Queue bounds the entries that wait for a group, 4096 by default; more are refused with OVERLOADED.
	Queue int
	// Timeout bounds one commit, 10 s by default.
	Timeout time.Duration
	// Observe, if set, is told of each commit: how many entries, how long it took, and how it ended. It is called
	// from the one writer and must be quick.
	Observe func(entries int, took time.Duration, err error)
}

// Sequencer is the Ledger before a store: many wait, one writes. What comes while a commit runs goes into the next one
// together, so the cost of a durable write is shared by all who wait. It needs no care after a failure: the next group
// tries again.
type Sequencer struct {
	c     SequencerConfig
	queue chan *pending

	began atomic.Int64 // when the commit under way began, Unix nanoseconds; 0: none is

	mu      sync.RWMutex // guards closed against sends to queue
	closed  bool
	stopped chan struct{}
}

// pending is an entry and the one who waits for it. done holds one answer, so the writer never waits for a waiter that
// left.
type pending struct {
	entry LedgerEntry
	done  chan error
}

// NewSequencer starts the writer; Close stops it.
func NewSequencer(c SequencerConfig) (*Sequencer, error) {
	if c.Store == nil {
		return nil, errors.New("ca: a sequencer needs a store")
	}
	if c.Gather == 0 {
		c.Gather = time.Millisecond
	}
	if c.MaxGroup <= 0 {
		c.MaxGroup = 512
	}
	if c.Queue <= 0 {
		c.Queue = 4096
	}
	if c.Timeout <= 0 {
		c.Timeout = 10 * time.Second
	}
	s := &Sequencer{c: c, queue: make(chan *pending, c.Queue), stopped: make(chan struct{})}
	go s.write()
	return s, nil
}

// stalled is how long a commit may be under way before the ledger counts as hanging.
const stalled = 5 * time.Second

// Ready says that a commit hangs: the store neither answers nor fails, as with a disk that is gone. Nil when not.
func (s *Sequencer) Ready() error {
	began := s.began.Load()
	if began == 0 {
		return nil
	}
	if took := time.Since(time.Unix(0, began)); took > stalled {
		return refusal.New(refusal.LedgerUnavailable, "a commit has been under way for %s", took.Round(time.Second))
	}
	return nil
}

// Append returns when the entry is durable. It gives up when ctx ends; the entry may then still be recorded. The
// entry's slices must not change until it returns, and after it gave up they must not change at all.
func (s *Sequencer) Append(ctx context.Context, e LedgerEntry) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	p := &pending{entry: e, done: make(chan error, 1)}
	if err := s.enqueue(p); err != nil {
		return err
	}
	select {
	case err := <-p.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Sequencer) enqueue(p *pending) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return refusal.New(refusal.Stopping, "the ledger is closed")
	}
	select {
	case s.queue <- p:
		return nil
	default:
		return refusal.New(refusal.Overloaded, "%d entries wait for the ledger", s.c.Queue).After(time.Second)
	}
}

// Close commits what waits and stops the writer. Entries that come later are refused with STOPPING. A store that hangs
// is not waited for beyond the time of a commit.
func (s *Sequencer) Close() {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.queue)
	}
	s.mu.Unlock()
	late := time.NewTimer(s.c.Timeout)
	defer late.Stop()
	select {
	case <-s.stopped:
	case <-late.C:
	}
}

// write is the one writer.
func (s *Sequencer) write() {
	defer close(s.stopped)
	var (
		waiters []*pending
		group   []LedgerEntry
		loaded  bool // the last group had company: more is coming
	)
	for first := range s.queue {
		waiters = append(waiters[:0], first)
		waiters = s.gather(waiters, loaded)
		loaded = len(waiters) > 1
		group = group[:0]
		for _, p := range waiters {
			group = append(group, p.entry)
		}
		err := s.commit(group)
		for _, p := range waiters {
			p.done <- err
		}
		clear(waiters)
		clear(group)
	}
}

// gather takes what waits already, and under load what comes within the gathering time.
func (s *Sequencer) gather(waiters []*pending, loaded bool) []*pending {
	waiters = s.take(waiters)
	if !loaded && len(waiters) == 1 || len(waiters) == s.c.MaxGroup {
		return waiters
	}
	time.Sleep(s.c.Gather / 2) // one wake-up for the group, not one for each entry
	// As long as entries come, others have work for this processor that ends in one. Where none come, waiting would waste it.
	end := time.Now().Add(s.c.Gather / 2)
	for had := -1; len(s.queue) > had && time.Now().Before(end); {
		had = len(s.queue)
		runtime.Gosched()
	}
	return s.take(waiters)
}

// take empties the queue into the group without waiting.
func (s *Sequencer) take(waiters []*pending) []*pending {
	for len(waiters) < s.c.MaxGroup {
		select {
		case p, open := <-s.queue:
			if !open {
				return waiters
			}
			waiters = append(waiters, p)
		default:
			return waiters
		}
	}
	return waiters
}

// commit writes one group. It has a time of its own, not a waiter's: one who leaves does not fail the others.
func (s *Sequencer) commit(group []LedgerEntry) error {
	ctx, cancel := context.WithTimeout(context.Background(), s.c.Timeout)
	defer cancel()
	start := time.Now()
	s.began.Store(start.UnixNano())
	defer s.began.Store(0)
	err := s.c.Store.AppendLedger(ctx, group)
	if s.c.Observe != nil {
		s.c.Observe(len(group), time.Since(start), err)
	}
	if err == nil {
		return nil
	}
	// The store's own words stay in the log: they may name paths, which are not the caller's business.
	return fmt.Errorf("%w: %w", refusal.New(refusal.LedgerUnavailable, "the ledger could not be written").After(2*time.Second), err)
}

var _ Ledger = (*Sequencer)(nil)
