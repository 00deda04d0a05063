package sds

import (
	"cmp"
	"context"
	"errors"
	"io"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"

	"github.com/meshca/meshca/api/refusal"
)

// stream is one open stream. Its fields are its goroutine's own, but for what the registry guards. Thousands are open
// at once and nearly all of them rest, so what a resting stream does not need it does not hold.
type stream struct {
	server *Server
	wire   wire
	source Source
	sub    subscription
	// shown and asked (the first request came) are guarded by the registry.
	shown Stream
	asked bool
	// load is the peer's, and charged what this stream's names add to it; the registry guards both.
	load    *load
	charged int

	// last is the nonce of the last answer.
	last  uint64
	taken taken
	// waiting: there are no secrets yet.
	waiting bool
	// met: there were some; parting is the one that they had first.
	met     bool
	parting *Parting
	// unread is how many bytes went out since the peer last showed that it had read everything.
	unread int
	// owing: the secrets or the subscription changed, or the last answer did not hold everything.
	owing bool
	// sent gives the outcome of a send that may last; nil while there is none. One at most: what changes meanwhile is
	// looked at afterwards, so that a slow peer holds one answer and no queue.
	sent chan error
	// deadline is of the first request, or of the send that is under way; nil while there is neither.
	deadline *time.Timer
}

// serve attests the peer and keeps its stream until either ends it. ctx must end when serve has returned, as gRPC's does.
func (s *Server) serve(ctx context.Context, p Protocol, w wire) error {
	source, err := s.config.Source(ctx)
	if err != nil {
		return refusal.Status(err)
	}
	st := &stream{
		server: s, wire: w, source: source,
		sub:   newSubscription(p, &s.config.Limits, s.config.SystemBundle),
		shown: Stream{Peer: s.config.Peer(ctx), Protocol: p, Opened: time.Now()},
	}
	if err := s.streams.enter(st, s.account(ctx), s.config.Limits); err != nil {
		s.config.Observe.refused(st.shown.Peer, err)
		return refusal.Status(err)
	}
	defer s.streams.leave(st)
	s.config.Observe.opened(st.shown)
	err = errPanicked // unless run returns
	defer func() { s.config.Observe.closed(st.shown, cut(ctx, err), err) }()
	if err = st.run(ctx); limited(err) {
		s.config.Observe.refused(st.shown.Peer, err)
	}
	return refusal.Status(err)
}

var errPanicked = errors.New("the stream panicked")

// ear is where the reading goroutine hands requests over. When it closes heard, err is how the peer ended its side, and nil where
// the stream's ctx has ended.
type ear struct {
	heard chan *request
	err   error
}

// run is the stream's loop. A second goroutine reads requests and ends with ctx, which ends with the stream; the loop
// hears from it, or from the send that is under way, when that happens.
func (st *stream) run(ctx context.Context) error {
	e := &ear{heard: make(chan *request)}
	go e.receive(ctx, st.wire, st.load.pace)

	st.setDeadline(st.server.config.Limits.FirstRequest)
	defer st.clearDeadline()
	secrets, stale := st.source.Secrets()
	for heard, closed := e.heard, false; ; {
		if st.owing { // what is sent is what the source vouches for now, not when it last changed
			secrets, stale = st.source.Secrets()
		}
		if err := st.over(secrets); err != nil {
			return err
		}
		st.waiting = secrets == nil
		if err := st.answer(ctx, secrets); err != nil {
			return err
		}
		if closed && st.sent == nil {
			return nil
		}
		select {
		case r, more := <-heard:
			switch {
			case more:
				if err := st.take(r); err != nil {
					return err
				}
			case errors.Is(e.err, io.EOF):
				// The peer closed its side alone: it still gets what it asked for, and then the stream ends.
				closed, heard = true, nil
			default:
				raise(e.err)
				return cmp.Or(e.err, ctx.Err())
			}
		case <-stale:
			st.owing = true
		case err := <-st.sent:
			raise(err)
			st.sent = nil
			st.clearDeadline()
			if err != nil {
				return err
			}
		case <-st.late():
			return st.tooLate()
		}
	}
}

// over is why the stream ends by what its source serves now; nil: it goes on.
func (st *stream) over(s *Secrets) error {
	switch {
	case s == nil:
	case s.end != nil:
		return s.end
	case !st.met:
		st.met, st.parting = true, s.parting
	case s.parting != st.parting && s.parting != nil:
		return s.parting.Why
	}
	return nil
}

// receive reads requests for as long as the stream lasts, each when it is the peer's turn.
func (e *ear) receive(ctx context.Context, w wire, pace *rate.Limiter) {
	defer close(e.heard)
	defer func() { e.err = cmp.Or(caught(recover()), e.err) }()
	for {
		if pace.Wait(ctx) != nil { // a request that was read is larger than one that was not
			return
		}
		r, err := w.receive()
		if err != nil {
			e.err = err
			return
		}
		select {
		case e.heard <- r:
		case <-ctx.Done():
			return
		}
	}
}

// answer sends what is owed, until nothing is or a send takes its time.
func (st *stream) answer(ctx context.Context, s *Secrets) error {
	for st.asked && st.owing && st.sent == nil {
		a, unknown, more, err := st.sub.next(s, st.last+1)
		st.pay(0)
		if err != nil {
			return refusal.New(refusal.Internal, "a secret could not be encoded: %w", err)
		}
		st.owing = more
		st.taken.offer(s, &a, more)
		st.entrust()
		if !a.empty() {
			if err := st.send(ctx, &a); err != nil {
				return err
			}
		}
		st.show()
		if len(unknown) > 0 {
			st.server.config.Observe.unknown(st.shown, unknown)
		}
	}
	return nil
}

// entrust notes that the peer is about to hold a validation context by this stream, or holds it already by an earlier one.
func (st *stream) entrust() {
	if !st.sub.contexts || st.shown.Entrusted {
		return
	}
	st.server.streams.show(st, func(st *stream) { st.shown.Entrusted, st.shown.Waiting = true, false })
	st.server.config.Observe.entrusted(st.shown)
}

// sendsAtOnce is how many unread bytes a peer may have for a send to be made in place. grpc-go takes 64 KiB for a
// stream before Send waits for the peer, so within half of it Send does not wait.
const sendsAtOnce = 32 << 10

// send sends an answer. A peer that may not be reading gets it from a goroutine of its own, so that the stream still
// hears it, and can tell it off.
func (st *stream) send(ctx context.Context, a *answer) error {
	st.last = a.nonce
	st.taken.sent(a)
	st.unread += a.size
	m, l := st.wire.encode(a), lineOf(ctx)
	size := messageHeader + proto.Size(m)
	room := l == nil || l.owe(size)
	if room && st.unread <= sendsAtOnce {
		return sendOn(st.wire, m, l, size)
	}
	sent := make(chan error, 1)
	st.sent = sent
	st.setDeadline(st.server.config.Limits.Send)
	go func(w wire) {
		defer func() {
			if err := caught(recover()); err != nil {
				sent <- err
			}
		}()
		var err error
		if !room {
			err = l.await(ctx, size)
		}
		if err == nil {
			err = sendOn(w, m, l, size)
		}
		sent <- err
	}(st.wire)
	return nil
}

// messageHeader comes before each message of gRPC, in bytes.
const messageHeader = 5

// sendOn sends what there is room for.
func sendOn(w wire, m proto.Message, l *line, size int) error {
	err := w.send(m)
	if err != nil && l != nil {
		l.unsent(size)
	}
	return err
}

func (st *stream) setDeadline(d time.Duration) {
	st.clearDeadline()
	st.deadline = time.NewTimer(d)
}

func (st *stream) clearDeadline() {
	if st.deadline != nil {
		st.deadline.Stop()
		st.deadline = nil
	}
}

// late fires when the deadline passes.
func (st *stream) late() <-chan time.Time {
	if st.deadline == nil {
		return nil
	}
	return st.deadline.C
}

// tooLate is the refusal of a peer that ran out of time.
func (st *stream) tooLate() error {
	limits := &st.server.config.Limits
	if st.sent != nil {
		return refusal.New(refusal.PeerLimit, "the peer left an answer unread for %s (limit: %s)", limits.Send, limits.called("Send"))
	}
	return refusal.New(refusal.PeerLimit, "the stream asked for nothing within %s (limit: %s)", limits.FirstRequest, limits.called("FirstRequest"))
}
