package sds

import (
	"context"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/meshca/meshca/api/refusal"
)

// FetchSecrets answers one request. While there is nothing yet it waits, as long as a stream may wait to ask. Names
// that are not served are left out; if that leaves nothing the answer is SECRET_UNKNOWN.
func (s *Server) FetchSecrets(ctx context.Context, r *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	a, err := s.fetch(ctx, requestOf(r), proto.Size(r) > s.config.Limits.RequestBytes)
	m := responseOf(&a)
	if l := lineOf(ctx); err == nil && l != nil && !l.owe(messageHeader+proto.Size(m)) {
		err = refusal.New(refusal.PeerLimit, "the peer leaves answers unread (limits: %s and %s)",
			s.config.Limits.called("AnswerBacklog"), s.config.Limits.called("SpareAnswerBacklog")).After(time.Second)
	}
	if err != nil {
		if limited(err) {
			s.config.Observe.refused(s.config.Peer(ctx), err)
		}
		return nil, refusal.Status(err)
	}
	return m, nil
}

// limited reports whether an error is a limit's.
func limited(err error) bool {
	reason := refusal.Of(err)
	return reason == refusal.PeerLimit || reason == refusal.Overloaded || status.Code(err) == codes.ResourceExhausted // a request that is too large
}

func (s *Server) fetch(ctx context.Context, r *request, large bool) (answer, error) {
	source, err := s.config.Source(ctx)
	if err != nil {
		return answer{}, err
	}
	st := &stream{
		server: s, source: source, sub: newSubscription(Fetch, &s.config.Limits, s.config.SystemBundle),
		shown: Stream{Peer: s.config.Peer(ctx), Protocol: Fetch, Opened: time.Now()},
	}
	if err := s.streams.enter(st, s.account(ctx), s.config.Limits); err != nil {
		return answer{}, err
	}
	defer s.streams.leave(st)
	if err := st.turn(ctx, large); err != nil {
		return answer{}, err
	}
	st.pay(len(r.names))
	if err := checkType(r.typeURL); err != nil {
		return answer{}, err
	}
	if s.config.PlainValidation || asksPlain(r.node) {
		st.sub.validation = validatePlain
	}
	if _, err := st.sub.restate(r.names); err != nil {
		return answer{}, err
	}
	if err := s.streams.charge(st, st.sub.cost(), &s.config.Limits); err != nil {
		return answer{}, err
	}
	secrets, err := st.await(ctx)
	if err != nil {
		return answer{}, err
	}
	a, unknown, more, err := st.sub.next(secrets, 0)
	st.pay(0)
	if err != nil {
		return answer{}, refusal.New(refusal.Internal, "a secret could not be encoded: %w", err)
	}
	if len(unknown) > 0 {
		s.config.Observe.unknown(st.shown, unknown)
	}
	switch {
	case more:
		return answer{}, refusal.New(refusal.PeerLimit, "the answer is larger than %d bytes (limit: %s); a stream gets it in parts",
			s.config.Limits.AnswerBytes, s.config.Limits.called("AnswerBytes"))
	case a.empty() && len(unknown) > 0:
		return answer{}, refusal.New(refusal.SecretUnknown, "none of the names is served, such as %q", clip(unknown[0], maxNode))
	}
	return a, nil
}

// turn waits until the peer's pace lets a fetch be answered. A large one is not kept: what it takes is not counted yet.
func (st *stream) turn(ctx context.Context, large bool) error {
	if large && st.load.pace.Allow() || !large && st.load.pace.Wait(ctx) == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return refusal.New(refusal.PeerLimit, "the peer asks too often for this call to have its turn in time (limit: %s)",
		st.server.config.Limits.called("RequestsPerSecond")).After(time.Second)
}

// await is the secrets once there are some; nil if what is asked for needs none.
func (st *stream) await(ctx context.Context) (*Secrets, error) {
	st.setDeadline(st.server.config.Limits.FirstRequest)
	defer st.clearDeadline()
	for {
		secrets, stale := st.source.Secrets()
		switch {
		case secrets != nil && secrets.end != nil:
			return nil, secrets.end
		case secrets != nil, !st.sub.wildcard && len(st.sub.due(nil).resources) == st.sub.asked:
			return secrets, nil
		}
		select {
		case <-stale:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-st.late():
			return nil, refusal.New(refusal.SVIDPending, "there is nothing to serve yet").After(time.Second)
		}
	}
}
