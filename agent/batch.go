package agent

import (
	"context"
	"time"

	"github.com/meshca/meshca/api/issuance/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

const (
	// gather is how long a renewal waits for others to share its call.
	gather = 5 * time.Millisecond
	// callsInFlight bounds the calls to the CA; while all are under way, renewals gather.
	callsInFlight = 4
	// callTimeout bounds one call; it is less than an attempt's, so that who waits hears why.
	callTimeout = 25 * time.Second
)

// batcher makes one call of the renewals that fall together.
type batcher struct {
	cluster string
	client  *client.Client
	observe func(size int, took time.Duration, answer *meshcav1.IssueX509SVIDsResponse, err error)
	in      chan *pending
	slots   chan struct{}
}

// pending is one renewal that waits for its answer.
type pending struct {
	request *meshcav1.X509SVIDRequest
	result  *meshcav1.X509SVIDResult
	err     error
	done    chan struct{}
}

func newBatcher(cluster string, c *client.Client, observe func(int, time.Duration, *meshcav1.IssueX509SVIDsResponse, error)) *batcher {
	return &batcher{cluster: cluster, client: c, observe: observe, in: make(chan *pending), slots: make(chan struct{}, callsInFlight)}
}

// issue returns the answer to one request, or why there is none: a verdict, if it was answered. The batch goes on without
// who gives up.
func (b *batcher) issue(ctx context.Context, r *meshcav1.X509SVIDRequest) (*meshcav1.X509SVID, error) {
	p := &pending{request: r, done: make(chan struct{})}
	select {
	case b.in <- p:
	case <-ctx.Done():
		return nil, refusal.New(refusal.CAUnreachable, "the calls before this one are not answered: %w", ctx.Err())
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, refusal.New(refusal.CAUnreachable, "the CA did not answer in time: %w", ctx.Err())
	}
	if p.err != nil {
		return nil, p.err
	}
	switch err := client.RefusalOf(p.result); {
	case err == nil:
		return p.result.GetSvid(), nil
	case meetsCaller(refusal.Of(err)):
		return nil, err
	default:
		return nil, verdict{err}
	}
}

// run gathers and sends until ctx ends, and then waits for the calls that it cut off.
func (b *batcher) run(ctx context.Context) {
	var next *pending // did not fit into the last batch
	for {
		batch := b.gather(ctx, next)
		if batch.items == nil {
			break
		}
		next = batch.rest
		// run holds a slot; the call gives it back.
		go func() {
			defer func() { <-b.slots }()
			b.send(ctx, batch.items)
		}()
	}
	for range cap(b.slots) {
		b.slots <- struct{}{}
	}
}

type batch struct {
	items []*pending
	rest  *pending
}

// gather returns the next batch, with a slot taken for it; none once ctx has ended.
func (b *batcher) gather(ctx context.Context, first *pending) batch {
	if first == nil {
		select {
		case first = <-b.in:
		case <-ctx.Done():
			return batch{}
		}
	}
	items, size := []*pending{first}, sizeOf(first)
	timer := time.NewTimer(gather)
	defer timer.Stop()
	slots := (chan struct{})(nil) // nil until the time is over
	for {
		in := b.in
		if len(items) == client.MaxBatch {
			in, slots = nil, b.slots
		}
		select {
		case p := <-in:
			if size += sizeOf(p); size > client.MaxBatchBytes {
				return b.full(ctx, items, p)
			}
			items = append(items, p)
		case <-timer.C:
			slots = b.slots
		case slots <- struct{}{}:
			return batch{items: items}
		case <-ctx.Done():
			return batch{}
		}
	}
}

// full takes a slot for a batch that the next item does not fit into.
func (b *batcher) full(ctx context.Context, items []*pending, rest *pending) batch {
	select {
	case b.slots <- struct{}{}:
		return batch{items, rest}
	case <-ctx.Done():
		return batch{}
	}
}

func sizeOf(p *pending) int { return len(p.request.GetCsr()) + len(p.request.GetToken()) + 64 }

func (b *batcher) send(ctx context.Context, items []*pending) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	call := &meshcav1.IssueX509SVIDsRequest{Cluster: b.cluster, Requests: make([]*meshcav1.X509SVIDRequest, len(items))}
	for i, p := range items {
		call.Requests[i] = p.request
	}
	began := time.Now()
	answer, err := b.client.Issue(ctx, call)
	b.observe(len(items), time.Since(began), answer, err)
	for i, p := range items {
		if err != nil {
			p.err = err
		} else {
			p.result = answer.GetResults()[i]
		}
		close(p.done)
	}
}
