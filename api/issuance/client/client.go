package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/keepalive"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

const (
	// MaxBatch is the number of requests that one call may hold.
	MaxBatch = 500
	// MaxBatchBytes is how large their tokens and CSRs may be together, in bytes: it leaves room for the framing within
	// grpc's default limit of 4 MiB, which the CA keeps to.
	MaxBatchBytes = 3 << 20
	// maxAnswer bounds what is received: 500 chains of the largest kind, and a bundle.
	maxAnswer = 16 << 20
	// FlowWindow is what the CA may send before it is read, for a call and for the connection, in bytes: the answer to a
	// call of 500 is about 700 KiB. That it is fixed spares both ends the ping and its answer with which grpc measures the
	// line at each response: a packet of its own each way.
	FlowWindow = 1 << 20
)

// Config is what a Client is made of.
type Config struct {
	// Address is the CA's host:port. Required.
	Address string
	// TrustDomain is the CA's. Required.
	TrustDomain spiffeid.TrustDomain
	// Bundle is asked at each handshake. Required.
	Bundle x509bundle.Source
	// Identity is asked at each handshake for the client certificate; it may return nil while there is none.
	Identity func() *tls.Certificate
	// Rejected is told when what answers at Address does not prove to be the CA: the moment to read the bundle file
	// again. It runs within the handshake, so the next one sees what it changed.
	Rejected func(error)
	// Dial opens the connection below TLS; nil: TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// UserAgent goes to the CA's log.
	UserAgent string
}

// Client is a connection to the CA that follows the caller's identity. Its methods are safe for concurrent use.
type Client struct {
	config Config
	creds  *handshakes
	// intermediates are those of earlier answers, which the CA then need not send again.
	intermediates intermediates

	mu     sync.Mutex
	link   *link // what new calls use
	stale  chan struct{}
	closed bool
	// hastened is when a backoff was last ended early.
	hastened time.Time
}

// link is one gRPC connection; retired, it closes with the last call that uses it.
type link struct {
	conn    *grpc.ClientConn
	calls   int
	retired bool
}

// New makes a client; it connects when it is first used.
func New(c Config) (*Client, error) {
	if c.Bundle == nil || c.TrustDomain.IsZero() {
		return nil, errors.New("a CA client needs a trust domain and its bundle")
	}
	if _, _, err := net.SplitHostPort(c.Address); err != nil {
		return nil, fmt.Errorf("the CA's address %q is not host:port: %w", c.Address, err)
	}
	if c.Dial == nil {
		tcp := &net.Dialer{KeepAlive: -1} // gRPC has its own
		c.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			return tcp.DialContext(ctx, "tcp", address)
		}
	}
	creds, err := newHandshakes(c)
	if err != nil {
		return nil, err
	}
	client := &Client{config: c, creds: creds, stale: make(chan struct{})}
	if client.link, err = client.connect(); err != nil {
		return nil, err
	}
	return client, nil
}

func (c *Client) connect() (*link, error) {
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(c.creds.Clone()),
		grpc.WithUserAgent(c.config.UserAgent),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithMaxHeaderListSize(64 << 10),
		grpc.WithStaticStreamWindowSize(FlowWindow),
		grpc.WithStaticConnWindowSize(FlowWindow),
		// An agent comes back quickly when the CA does: the jitter keeps a fleet apart, and each agent is one connection.
		// A second at most: an SVID of seconds must not end while a CA that is back waits to be tried.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		// Slower than the shortest ping interval that the CA allows (10 s).
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true}),
		grpc.WithIdleTimeout(0),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
		grpc.WithContextDialer(c.creds.dial(c.config.Dial)),
	}
	// passthrough: the dialer resolves, at every attempt, so that a name that moved is found.
	target := "passthrough:///" + c.config.Address
	conn, err := grpc.NewClient(target, options...)
	if err != nil {
		return nil, fmt.Errorf("a connection to the CA at %s cannot be set up: %w", c.config.Address, err)
	}
	return &link{conn: conn}, nil
}

// Redial makes calls from now on use a new connection, with the identity and the bundle of now. Calls in flight end on
// the old one, which then closes; a Sync stream ends, to be opened again. The old connection stays when there can be no
// new one.
func (c *Client) Redial() error {
	fresh, err := c.connect()
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return fresh.conn.Close()
	}
	c.replace(fresh)
	return nil
}

// replace puts a link in the place of the current one; c.mu is held.
func (c *Client) replace(with *link) {
	old := c.link
	c.link = with
	close(c.stale)
	c.stale = make(chan struct{})
	if old != nil {
		old.retired = true
		old.closeIfUnused()
	}
}

func (l *link) closeIfUnused() {
	if l.retired && l.calls == 0 {
		_ = l.conn.Close()
	}
}

// Close ends the connection, and calls in flight with it.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closed = true
	return c.link.conn.Close()
}

// use returns the service on the connection of now, a channel that closes when that is no longer the one to use, and a
// function that must be called when the call is over.
func (c *Client) use() (service meshcav1.IssuanceServiceClient, stale <-chan struct{}, done func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.link
	l.calls++
	c.hasten(l)
	return meshcav1.NewIssuanceServiceClient(l.conn), c.stale, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		l.calls--
		l.closeIfUnused()
	}
}

// hastenEvery bounds how often calls end the backoff of a connection: a thousand renewals that fail make no storm.
const hastenEvery = time.Second

// hasten has a connection that failed try again now rather than at the end of its backoff: there is a reason to call. The
// call itself may still fail, the next one finds the CA. c.mu is held.
func (c *Client) hasten(l *link) {
	if l.conn.GetState() != connectivity.TransientFailure || time.Since(c.hastened) < hastenEvery {
		return
	}
	c.hastened = time.Now()
	l.conn.ResetConnectBackoff()
}
