package client

import (
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// AttestAgent gets the agent's own SVID for its own token. Errors are refusals: the CA's, CA_UNREACHABLE or CA_UNTRUSTED.
func (c *Client) AttestAgent(ctx context.Context, r *meshcav1.AttestAgentRequest) (*meshcav1.AttestAgentResponse, error) {
	service, _, done := c.use()
	defer done()
	answer, err := service.AttestAgent(ctx, r)
	if err != nil {
		return nil, c.explain(err)
	}
	if answer.GetSvid() == nil {
		return nil, refusal.New(refusal.Internal, "the CA answered without an SVID")
	}
	return answer, nil
}

// Issue gets 1 to MaxBatch SVIDs; the answer has as many results as there were requests, in their order, and each SVID
// its whole chain.
func (c *Client) Issue(ctx context.Context, r *meshcav1.IssueX509SVIDsRequest) (*meshcav1.IssueX509SVIDsResponse, error) {
	service, _, done := c.use()
	defer done()
	r.HeldIntermediates = c.intermediates.digests()
	answer, err := service.IssueX509SVIDs(ctx, r)
	if err != nil {
		return nil, c.explain(err)
	}
	if got, want := len(answer.GetResults()), len(r.GetRequests()); got != want {
		return nil, refusal.New(refusal.Internal, "the CA answered %d of %d requests", got, want)
	}
	if err := c.intermediates.complete(answer); err != nil {
		return nil, err
	}
	return answer, nil
}

// RefusalOf is the refusal of one item of a batch; nil where the item holds an SVID.
func RefusalOf(r *meshcav1.X509SVIDResult) error {
	if r.GetSvid() != nil {
		return nil
	}
	no := r.GetRefusal()
	if no.GetReason() == "" {
		return refusal.New(refusal.Internal, "the CA answered with neither an SVID nor a reason")
	}
	return &refusal.Error{Reason: refusal.Reason(no.GetReason()), Detail: no.GetMessage(), RetryAfter: no.GetRetryAfter().AsDuration()}
}

// Stream is an open Sync stream.
type Stream struct {
	stream grpc.BidiStreamingClient[meshcav1.SyncRequest, meshcav1.SyncResponse]
	client *Client
}

// Sync opens a Sync stream, waiting for the CA while it cannot be reached, and lets follow use it. It returns when
// follow does, when the stream breaks, or with nil when Redial made another connection the one to use.
func (c *Client) Sync(ctx context.Context, hello *meshcav1.SyncHello, follow func(context.Context, *Stream) error) error {
	service, stale, done := c.use()
	defer done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	redialled := make(chan struct{})
	go func() {
		defer close(redialled)
		select {
		case <-stale:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := c.sync(ctx, service, hello, follow)
	cancel()
	<-redialled
	select {
	case <-stale:
		return nil
	default:
		return err
	}
}

func (c *Client) sync(ctx context.Context, service meshcav1.IssuanceServiceClient, hello *meshcav1.SyncHello, follow func(context.Context, *Stream) error) error {
	stream, err := service.Sync(ctx, grpc.WaitForReady(true))
	if err != nil {
		return c.explain(err)
	}
	s := &Stream{stream, c}
	err = stream.Send(&meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Hello{Hello: hello}})
	if errors.Is(err, io.EOF) {
		_, err = stream.Recv() // the status that ended it
	}
	if err != nil {
		return c.explain(err)
	}
	return follow(ctx, s)
}

// Receive returns the next state.
func (s *Stream) Receive() (*meshcav1.SyncResponse, error) {
	state, err := s.stream.Recv()
	if errors.Is(err, io.EOF) {
		return nil, refusal.New(refusal.CAUnreachable, "the CA ended the stream")
	}
	if err != nil {
		return nil, s.client.explain(err)
	}
	return state, nil
}

// Acknowledge tells the CA that every open stream below has the bundle of this sequence, and who lacks a newer one. It must
// not be called concurrently with itself. Why it failed, Receive tells.
func (s *Stream) Acknowledge(sequence uint64, waitsFor ...string) error {
	ack := &meshcav1.BundleAck{BundleSequence: sequence, WaitsFor: waitsFor}
	err := s.stream.Send(&meshcav1.SyncRequest{Message: &meshcav1.SyncRequest_Ack{Ack: ack}})
	if err != nil {
		return fmt.Errorf("bundle %d was not acknowledged: %w", sequence, err)
	}
	return nil
}

// Probe makes a connection of its own, to find out whether the CA can be reached and proves to be the CA.
func (c *Client) Probe(ctx context.Context) error {
	raw, err := c.creds.dial(c.config.Dial)(ctx, c.config.Address)
	if err != nil {
		return refusal.New(refusal.CAUnreachable, "%w", err)
	}
	defer raw.Close()
	conn, _, err := c.creds.Clone().ClientHandshake(ctx, c.config.Address, raw)
	var u *untrusted
	switch {
	case errors.As(err, &u):
		return refusal.New(refusal.CAUntrusted, "what answers at %s: %w", c.config.Address, u.err)
	case err != nil:
		return refusal.New(refusal.CAUnreachable, "the TLS handshake with %s: %w", c.config.Address, err)
	}
	return conn.Close()
}

// explain makes a refusal of what a call failed with.
func (c *Client) explain(err error) error {
	if e, ok := refusal.From(err); ok {
		return e
	}
	st, ok := status.FromError(err)
	if !ok {
		return refusal.New(refusal.CAUnreachable, "the CA at %s: %w", c.config.Address, err)
	}
	switch st.Code() {
	case codes.Unavailable:
		if u := c.creds.last.Load(); u != nil {
			return refusal.New(refusal.CAUntrusted, "what answers at %s: %w", c.config.Address, u.err)
		}
		return refusal.New(refusal.CAUnreachable, "the CA at %s: %s", c.config.Address, st.Message())
	case codes.DeadlineExceeded:
		return refusal.New(refusal.CAUnreachable, "the CA at %s did not answer in time", c.config.Address)
	case codes.Canceled:
		return fmt.Errorf("the call to the CA was given up: %w", context.Canceled)
	default:
		return fmt.Errorf("the CA at %s answered %s: %s", c.config.Address, st.Code(), st.Message())
	}
}
