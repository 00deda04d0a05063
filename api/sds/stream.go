package sds

import (
	"context"
	"errors"
	"io"
	"time"

	"golang.org/x/time/rate"

	"github.com/meshca/meshca/api/refusal"
)

// stream is one open stream. Its fields are its goroutine's own, but for what the registry guards.
type stream struct {
	server *Server
	wire   wire
	source Source
	sub    *subscription
	// shown and asked (the first request came) are guarded by the registry.
	shown Stream
	asked bool

	// last is the nonce of the last answer, and lastVersion what it said.
	last        uint64
	lastVersion string
	taken       taken
	// owing: the secrets or the subscription changed, or the last answer did not hold everything.
	owing bool
	// sent gives the outcome of the send that is under way; sending tells that one is. One at most: what changes
	// meanwhile is looked at afterwards, so that a slow peer holds one answer and no queue.
	sent    chan error
	sending bool
	// deadline is of the first request, later of the send that is under way.
	deadline *time.Timer
}

// serve attests the peer and keeps its stream until either ends it.
func (s *Server) serve(ctx context.Context, p Protocol, w wire) error {
	source, err := s.config.Source(ctx)
	if err != nil {
		return refusal.Status(err)
	}
	st := &stream{
		server: s, wire: w, source: source,
		sub:   newSubscription(p, s.config.Limits, s.config.SystemBundle),
		shown: Stream{Peer: s.config.Peer(ctx), Protocol: p, Opened: time.Now()},
		sent:  make(chan error, 1),
	}
	if err := s.streams.enter(st, s.config.Limits); err != nil {
		return refusal.Status(err)
	}
	defer s.streams.leave(st)
	s.config.Observe.opened(st.shown)
	err = st.run(ctx)
	s.config.Observe.closed(st.shown, err)
	return refusal.Status(err)
}

// run is the stream's loop. A second goroutine reads requests; a third lives while an answer is being sent, so that a
// peer that does not read can still be told off. Both end with the stream.
func (st *stream) run(ctx context.Context) error {
	limits := st.server.config.Limits
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	requests, ended := make(chan request), make(chan error, 1)
	go receive(ctx, st.wire, limits.RequestsPerSecond, requests, ended)

	st.deadline = time.NewTimer(limits.FirstRequest)
	defer st.deadline.Stop()
	secrets, stale := st.source.Secrets()
	for {
		if secrets != nil && secrets.end != nil {
			return secrets.end
		}
		if err := st.answer(secrets); err != nil {
			return err
		}
		if ended == nil && !st.sending {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case r := <-requests:
			if err := st.take(r); err != nil {
				return err
			}
		case err := <-ended:
			if !errors.Is(err, io.EOF) {
				return err
			}
			// The peer closed its side alone: it still gets what it asked for, and then the stream ends.
			ended = nil
		case <-stale:
			secrets, stale = st.source.Secrets()
			st.owing = true
		case err := <-st.sent:
			st.sending = false
			st.deadline.Stop()
			if err != nil {
				return err
			}
		case <-st.deadline.C:
			return st.late()
		}
	}
}

// receive reads requests for as long as the stream lasts.
func receive(ctx context.Context, w wire, perSecond int, requests chan<- request, ended chan<- error) {
	pace := rate.NewLimiter(rate.Limit(perSecond), perSecond)
	for {
		r, err := w.receive()
		if err == nil {
			err = pace.Wait(ctx)
		}
		if err != nil {
			ended <- err
			return
		}
		select {
		case requests <- r:
		case <-ctx.Done():
			return
		}
	}
}

// answer starts to send what is owed, unless something is being sent already.
func (st *stream) answer(s *Secrets) error {
	if !st.asked || !st.owing || st.sending {
		return nil
	}
	a, unknown, more, err := st.sub.next(s, st.last+1)
	if err != nil {
		return refusal.New(refusal.Internal, "a secret could not be encoded: %w", err)
	}
	st.owing = more
	st.taken.offer(s, &a, more)
	if !a.empty() {
		st.last, st.lastVersion = a.nonce, a.version()
		st.sending = true
		st.deadline.Reset(st.server.config.Limits.Send)
		go func() { st.sent <- st.wire.send(a) }()
	}
	st.show()
	if len(unknown) > 0 {
		st.server.config.Observe.unknown(st.shown, unknown)
	}
	return nil
}

// late is the refusal of a peer that ran out of time.
func (st *stream) late() error {
	limits := st.server.config.Limits
	if st.sending {
		return refusal.New(refusal.PeerLimit, "the peer left an answer unread for %s (limit: Send)", limits.Send)
	}
	return refusal.New(refusal.PeerLimit, "the stream asked for nothing within %s (limit: FirstRequest)", limits.FirstRequest)
}
