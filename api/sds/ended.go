package sds

import (
	"context"
	"errors"
	"net"
	"os"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/api/refusal"
)

// endsOf is a connection that knows who ended it. gRPC tells a stream only that its context has ended, be it that the peer
// closed the connection, gave no sign of life, or broke a rule.
type endsOf struct {
	net.Conn
	closed atomic.Bool // by us, while the peer had it open
	left   atomic.Bool // by the peer
}

// Read reads from the peer.
func (c *endsOf) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.note(err)
	return n, err
}

// Write writes to the peer.
func (c *endsOf) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.note(err)
	return n, err
}

func (c *endsOf) note(err error) {
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !c.closed.Load() {
		c.left.Store(true)
	}
}

// Close ends it.
func (c *endsOf) Close() error {
	if !c.left.Load() {
		c.closed.Store(true)
	}
	return c.Conn.Close()
}

// cut reports whether it was not the peer who ended the stream of ctx, which came to err.
func cut(ctx context.Context, err error) bool {
	if _, refused := refusal.From(err); refused || err == nil {
		return refused
	}
	switch code := status.Code(err); {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded),
		code == codes.Canceled, code == codes.DeadlineExceeded, code == codes.Unavailable:
		// The peer has reset it, its time is over, or the connection is closed.
		l := lineOf(ctx)
		return l != nil && l.conn.closed.Load()
	}
	return true // for what the peer sent, or a fault of ours
}
