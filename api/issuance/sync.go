package issuance

import (
	"context"
	"encoding/hex"
	"errors"
	"io"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/rotation"
)

// syncMessages bounds what an agent sends on a stream, a second: it has one acknowledgement for each bundle.
const syncMessages = 5

// clockStep is how far the wall clock is set before agents are told what it says: they judge by it what they hold.
const clockStep = 10 * time.Second

// Sync sends the whole state at once and whenever it changes, or the clock is set, until the agent's SVID ends, the agent is refused, or the
// CA stops.
func (s *Server) Sync(stream grpc.BidiStreamingServer[meshcav1.SyncRequest, meshcav1.SyncResponse]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	caller, err := callerOf(ctx)
	if err != nil {
		return err
	}
	in, broken := receive(ctx, stream)
	hello, err := s.awaitHello(in, broken)
	if err != nil {
		return s.accounts.tell(caller, "", err)
	}
	arrived(ctx)
	if err := s.stillAgent(ctx, caller, hello.GetCluster()); err != nil {
		return err
	}
	if err := s.witness(ctx, caller, hello); err != nil {
		return s.accounts.tell(caller, hello.GetCluster(), err)
	}
	acks := s.Registration.Agents.Connected(caller.ID, caller.Serial, refusal.Clip(hello.GetVersion(), maxVersion))
	defer acks.Close()

	ended := time.NewTimer(time.Until(caller.NotAfter))
	defer ended.Stop()
	look := time.NewTicker(s.times.recheck)
	defer look.Stop()
	messages := rate.NewLimiter(syncMessages, 4*syncMessages)
	clock := rotation.NewJumps(time.Now(), s.times.wall())
	for {
		state, stales, err := s.state(caller)
		if err != nil {
			return s.accounts.tell(caller, hello.GetCluster(), err)
		}
		// gofail: var stateMade struct{}
		if err := stream.Send(state); err != nil {
			return err
		}
		// gofail: var stateSent struct{}
		var settled <-chan time.Time
		for stale := false; !stale; {
			select {
			case <-stales.bundle:
				stale = true
			case <-stales.mark: // a moment before what it names is there to be told
				stales.mark, settled = nil, time.After(s.times.settle)
			case <-settled: // a step of a rollout, that agents are told of by its mark alone
				stale = true
			case <-stales.endings:
				stale = true
			case <-stales.orders:
				stale, err = true, s.stillAgent(ctx, caller, hello.GetCluster())
			case m := <-in:
				err = s.take(caller, acks, m, messages)
			case <-look.C:
				stale = clock.Jumped(time.Now(), s.times.wall(), clockStep)
				err = s.stillAgent(ctx, caller, hello.GetCluster())
			case err := <-broken:
				return s.brokenOff(caller, hello.GetCluster(), err)
			case <-ended.C:
				err = refusal.New(refusal.AgentExpired, "the SVID %s of %s ended at %s", caller.Serial, caller.ID, caller.NotAfter.UTC().Format(time.RFC3339))
			case <-s.stopping:
				err = refusal.New(refusal.Stopping, "the CA is shutting down").After(time.Second)
			}
			if err != nil {
				return err
			}
		}
	}
}

// brokenOff sorts the reasons for which a stream cannot be read any more.
func (s *Server) brokenOff(caller *party, cluster string, err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	if _, refused := refusal.From(err); refused {
		return s.accounts.tell(caller, cluster, err)
	}
	return err
}

// take handles what an agent sends behind its hello.
func (s *Server) take(caller *party, acks *registration.AgentStream, m *meshcav1.SyncRequest, messages *rate.Limiter) error {
	if !messages.Allow() {
		err := refusal.New(refusal.PeerLimit, "more than %d messages a second on a Sync stream", syncMessages).After(time.Second)
		return s.accounts.tell(caller, "", err)
	}
	if ack := m.GetAck(); ack != nil {
		s.acknowledge(acks, ack.GetBundleSequence(), ack.GetWaitsFor())
	}
	return nil
}

// receive reads the stream until ctx ends or it breaks, and says which.
func receive(ctx context.Context, stream grpc.BidiStreamingServer[meshcav1.SyncRequest, meshcav1.SyncResponse]) (<-chan *meshcav1.SyncRequest, <-chan error) {
	in := make(chan *meshcav1.SyncRequest)
	broken := make(chan error, 1)
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				broken <- unread(err)
				return
			}
			select {
			case in <- m:
			case <-ctx.Done():
				broken <- ctx.Err()
				return
			}
		}
	}()
	return in, broken
}

// stillAgent looks at the agent behind a stream. Whether its pod lives may be unknown while the API server is away: that
// ends nothing, for denials and bundles must reach agents just then. Everything else about it is the CA's own knowledge.
func (s *Server) stillAgent(ctx context.Context, caller *party, cluster string) error {
	look, cancel := context.WithTimeout(ctx, s.times.answer)
	defer cancel()
	_, err := s.Registration.Admit(look, caller.Caller, cluster)
	switch {
	case err == nil || refusal.Of(err).Passing() && ctx.Err() == nil:
		return nil
	case ctx.Err() != nil:
		return err
	}
	return s.accounts.tell(caller, cluster, err)
}

func (s *Server) awaitHello(in <-chan *meshcav1.SyncRequest, broken <-chan error) (*meshcav1.SyncHello, error) {
	late := time.NewTimer(s.times.hello)
	defer late.Stop()
	select {
	case m := <-in:
		if m.GetHello() == nil {
			return nil, refusal.New(refusal.RequestMalformed, "the first message of a Sync stream must be hello").On("hello")
		}
		return m.GetHello(), nil
	case err := <-broken:
		return nil, err
	case <-late.C:
		return nil, refusal.New(refusal.RequestMalformed, "no hello came within %s", s.times.hello).On("hello")
	case <-s.stopping:
		return nil, refusal.New(refusal.Stopping, "the CA is shutting down").After(time.Second)
	}
}

// stales close when a part of the state is stale.
type stales struct{ bundle, orders, endings, mark <-chan struct{} }

// state is the whole of what agents follow.
func (s *Server) state(caller *party) (*meshcav1.SyncResponse, stales, error) {
	var x stales
	var bundle *spiffebundle.Bundle
	var standing *registration.Standing
	var mark []byte
	if err := s.Hold(); err != nil {
		return nil, x, err
	}
	mark, x.mark = s.Registration.Continuity.Sealed() // first: an agent never witnesses what it was not told
	bundle, x.bundle = s.Bundle()
	standing, x.orders = s.Registration.Orders.Get()
	encoded, err := bundle.Marshal()
	if err != nil {
		return nil, x, err
	}
	state := &meshcav1.SyncResponse{Bundle: encoded, DeniedIds: standing.DeniedIDs(), ServerTime: timestamppb.Now(), Mark: mark}
	if !standing.Reviewed.IsZero() {
		state.PolicyReviewedAt = timestamppb.New(standing.Reviewed)
	}
	for _, r := range standing.RenewBy(caller.ID) {
		state.Renew = append(state.Renew, &meshcav1.RenewOrder{
			SpiffeId: r.ID, IssuedBefore: timestamppb.New(r.IssuedBefore), Spread: durationpb.New(r.Spread), Elapsed: durationpb.New(r.Elapsed(time.Now())),
		})
	}
	var endings []registration.Ending
	endings, x.endings = s.Registration.Endings.Of(caller.ID)
	for _, e := range endings {
		state.Ended = append(state.Ended, encodeEnding(e))
	}
	return state, x, nil
}

func encodeEnding(e registration.Ending) *meshcav1.Ending {
	m := &meshcav1.Ending{Reason: string(e.Why.Reason), Message: e.Why.Detail}
	for _, serial := range e.Serials {
		if raw, err := hex.DecodeString(serial); err == nil { // it is our own writing
			m.Serials = append(m.Serials, raw)
		}
	}
	return m
}

// acknowledge takes no acknowledgement of what was never sent.
func (s *Server) acknowledge(acks *registration.AgentStream, sequence uint64, waitsFor []string) {
	bundle, _ := s.Bundle()
	if current, ok := bundle.SequenceNumber(); ok && sequence <= current {
		waitsFor = waitsFor[:min(len(waitsFor), maxWaitsFor)]
		for i, w := range waitsFor {
			waitsFor[i] = refusal.Clip(w, maxWaitsForBytes)
		}
		acks.Acknowledge(sequence, waitsFor)
		// gofail: var bundleAcknowledged struct{}
	}
}

// Bounds of what is kept of an agent's words about who lacks a bundle.
const (
	maxWaitsFor      = 8
	maxWaitsForBytes = 256
)

// witness hears what the agent has followed. One that proves that the store is an old copy is told no state, and nobody is
// from then on: the denials of an old copy would lift those that agents know. A sequence without a proof is said aloud, and
// no more: a stolen agent could name any.
func (s *Server) witness(ctx context.Context, caller *party, hello *meshcav1.SyncHello) error {
	proven, err := s.Registration.Continuity.Witness(ctx, caller.ID, hello.GetMark())
	if err != nil {
		return err
	}
	bundle, _ := s.Bundle()
	if current, ok := bundle.SequenceNumber(); ok && !proven && hello.GetHighestBundleSequence() > current {
		s.Log.Error("an agent claims a newer trust bundle than this CA has, and does not prove it: it will not follow this CA's. "+
			"If this CA's store was made anew or restored, look at that agent's bundle, then `certctl ca accept-rollback --above`",
			"agent", caller.ID.String(), "agent_sequence", hello.GetHighestBundleSequence(), "our_sequence", current)
	}
	return nil
}
