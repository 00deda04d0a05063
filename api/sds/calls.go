package sds

import (
	"context"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	"github.com/meshca/meshca/api/inbound"
	"github.com/meshca/meshca/api/refusal"
)

// window is what a call may have sent and not yet been read, in bytes; the least that HTTP/2 has. That it is fixed keeps grpc
// from widening it for peers that answer fast.
const window = 64 << 10

// maxUnread is how many pieces may have come on a stream that have not been read yet. Each takes some 80 bytes beside what
// is in it. A proxy's acknowledgement, of some 75 bytes at least, comes in one: of those that are read at once 246 count,
// as their reading is noticed a quarter of a window later.
const maxUnread = 384

// largeTime is what a large request takes to arrive.
const largeTime = 100 * time.Millisecond

// ServerOptions are the options of a gRPC server whose connections are held to the limits: calls, message and header sizes, the
// time that a message may take to arrive, and a life sign every minute, so that the streams of a peer that vanished end. They are
// for connections without TLS, as unix sockets have them: other grpc.Creds would take the watch over messages away.
func (s *Server) ServerOptions() []grpc.ServerOption {
	l := s.config.Limits
	return []grpc.ServerOption{
		grpc.Creds(inClear{insecure.NewCredentials(), s}),
		grpc.InTapHandle(s.admit),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, r any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			arrived(ctx)
			return handler(ctx, r)
		}),
		grpc.ChainStreamInterceptor(func(srv any, g grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			arrived(g.Context()) // a stream waits for its first request by itself
			return handler(srv, g)
		}),
		grpc.MaxConcurrentStreams(l.StreamsPerConnection),
		grpc.MaxRecvMsgSize(max(l.RequestBytes, l.LargeRequestBytes)),
		grpc.MaxHeaderListSize(16 << 10),
		grpc.ForceServerCodecV2(codec{}),
		grpc.StaticStreamWindowSize(window),
		grpc.StaticConnWindowSize(window),
		grpc.ReadBufferSize(8 << 10),
		experimental.BufferPool(mem.NopBufferPool{}), // the usual one has four sizes: a piece of 1100 bytes would take 4 KiB
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}

// inClear are the credentials of connections without TLS, on which messages are watched as they arrive.
type inClear struct {
	credentials.TransportCredentials
	server *Server
}

// ServerHandshake is called by grpc for each connection.
func (c inClear) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	ctx := peer.NewContext(context.Background(), &peer.Peer{Addr: raw.RemoteAddr(), LocalAddr: raw.LocalAddr(), AuthInfo: info})
	ends := &endsOf{Conn: conn}
	l := &line{server: c.server, conn: ends, who: c.server.config.Peer(ctx), account: c.server.account(ctx)}
	return inbound.Watch(ends, l.rules()), lineInfo{info, l}, nil
}

// Clone keeps the watch, which the embedded Clone would lose.
func (c inClear) Clone() credentials.TransportCredentials {
	return inClear{c.TransportCredentials.Clone(), c.server}
}

// calls counts the open calls of each peer. The zero calls is empty.
type calls struct {
	mu   sync.Mutex
	open map[string]int
}

func (c *calls) enter(a Account) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := c.open[a.Name]; n >= a.Streams {
		return refusal.New(refusal.PeerLimit, "the peer has %d SDS streams and fetches open (limit: %s)", n, a.Limit)
	}
	if c.open == nil {
		c.open = map[string]int{}
	}
	c.open[a.Name]++
	return nil
}

func (c *calls) leave(a Account) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[a.Name]--; c.open[a.Name] <= 0 {
		delete(c.open, a.Name)
	}
}

// admit is grpc's tap: it runs when a call's headers have come, and before anything is read or kept for it. What is half sent
// counts, so, and a call whose message does not arrive in time ends. grpc ends ctx with the call.
func (s *Server) admit(ctx context.Context, _ *tap.Info) (context.Context, error) {
	account := s.account(ctx)
	if err := s.calls.enter(account); err != nil {
		s.config.Observe.refused(s.config.Peer(ctx), err)
		return nil, refusal.Status(err)
	}
	context.AfterFunc(ctx, func() { s.calls.leave(account) })
	ctx, cancel := context.WithCancel(ctx)
	late := time.AfterFunc(s.config.Limits.FirstRequest, cancel)
	context.AfterFunc(ctx, func() { late.Stop() })
	return context.WithValue(ctx, lateKey{}, late), nil
}

// lateKey is where a call's context has the timer that ends it.
type lateKey struct{}

// arrived is told when a call has its message.
func arrived(ctx context.Context) {
	if late, ok := ctx.Value(lateKey{}).(*time.Timer); ok {
		late.Stop()
	}
}
