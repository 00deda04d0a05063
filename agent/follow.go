package agent

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/meshca/meshca/api/issuance/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// follower keeps a Sync stream to the CA open and does what it says. Each message is the whole state, so nothing is
// lost when a stream breaks.
type follower struct {
	hello  func() *meshcav1.SyncHello
	client *client.Client
	self   *self
	clock  *clock
	log    *slog.Logger
	// apply does what a state orders; first is set for the first one of a stream.
	apply func(state *meshcav1.SyncResponse, first bool)
	// taken waits until every open stream below has the newest bundle, and returns its sequence; with who makes it wait,
	// when that takes longer than patience.
	taken func(ctx context.Context, after uint64, patience time.Duration) (sequence uint64, waitsFor []string, err error)

	mu        sync.Mutex
	connected bool
	last      error
	lastAt    time.Time
	acked     uint64
}

// run follows until ctx ends.
func (f *follower) run(ctx context.Context) {
	pause := &backoff.ExponentialBackOff{
		InitialInterval: 200 * time.Millisecond, Multiplier: 2, MaxInterval: 10 * time.Second, RandomizationFactor: 0.5,
	}
	pause.Reset()
	for ctx.Err() == nil {
		err := f.self.await(ctx)
		if err == nil {
			err = f.client.Sync(ctx, f.hello(), func(ctx context.Context, s *client.Stream) error {
				return f.follow(ctx, s, pause.Reset)
			})
		}
		if ctx.Err() != nil {
			return
		}
		if f.note(err); err == nil {
			continue // the connection was replaced
		}
		f.self.distrust(err)
		wait := pause.NextBackOff()
		if e, ok := refusal.From(err); ok {
			wait = max(wait, min(e.RetryAfter, time.Minute))
		}
		sleep(ctx, wait)
	}
}

func (f *follower) follow(ctx context.Context, s *client.Stream, received func()) error {
	ctx, cancel := context.WithCancel(ctx)
	var acks sync.WaitGroup
	defer acks.Wait()
	defer cancel()
	for first := true; ; first = false {
		state, err := s.Receive()
		if err != nil {
			return err
		}
		f.clock.measure(state.GetServerTime(), 0)
		f.apply(state, first)
		if first {
			received()
			f.mu.Lock()
			f.connected, f.last = true, nil
			f.mu.Unlock()
			acks.Go(func() { f.acknowledge(ctx, s) })
		}
	}
}

// patience is how long streams may take over a bundle before the CA is told who they are, and how often it is told.
const patience = 5 * time.Second

// acknowledge tells the CA of each bundle that everyone below has, and who makes it wait for the next.
func (f *follower) acknowledge(ctx context.Context, s *client.Stream) {
	for told := uint64(0); ; {
		sequence, waitsFor, err := f.taken(ctx, told, patience)
		if err != nil {
			return
		}
		if err := s.Acknowledge(sequence, waitsFor...); err != nil {
			f.log.Debug("a bundle was not acknowledged; the next stream does it", "error", err)
			return
		}
		told = sequence
		f.mu.Lock()
		f.acked = sequence
		f.mu.Unlock()
	}
}

// note keeps how a stream ended.
func (f *follower) note(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.connected = false
	if err == nil || errors.Is(err, context.Canceled) {
		return
	}
	if refusal.Of(f.last) != refusal.Of(err) {
		f.log.Warn("the stream from the CA ended", "error", err)
	}
	f.last, f.lastAt = err, time.Now()
}

// standing is what status shows.
func (f *follower) standing() (connected bool, last error, at time.Time, acked uint64) { //nolint:revive,staticcheck // the error is the subject here, not the outcome
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.connected, f.last, f.lastAt, f.acked
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// Bounds of what the CA is told about streams that lack a bundle.
const (
	maxLacking      = 8
	maxLackingBytes = 256
)

// lacking names the streams and readers that have not taken a bundle, and what they said.
func (a *Agent) lacking(sequence uint64) []string {
	var names []string
	for _, s := range a.sds.Streams() {
		if s.Waiting || s.Sequence >= sequence {
			continue
		}
		why := "has not answered"
		if s.LastNack != "" {
			why = "rejects it: " + s.LastNack
		}
		names = append(names, refusal.Clip(s.Peer+": "+why, maxLackingBytes))
	}
	names = append(names, a.readers.waitsFor(sequence)...)
	for _, away := range a.proxies.lacking() {
		names = append(names, refusal.Clip(away, maxLackingBytes))
	}
	slices.Sort(names)
	return names[:min(len(names), maxLacking)]
}
