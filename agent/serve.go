package agent

import (
	"context"
	"errors"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/sds"
)

const (
	// reopen is how long a workload's socket that cannot be opened is left alone; what is wrong with it is often put
	// right by whoever makes the pod.
	reopen = 5 * time.Second
	// watch is how often it is looked whether the socket is still there.
	watch = 10 * time.Second
	// drain bounds how long streams and calls may take to end at the stop.
	drain = 3 * time.Second
	// parting is how long connections of a workload that goes stay open for the streams' last word.
	parting = 200 * time.Millisecond
)

// newSDS makes the one SDS server behind all sockets. Which socket a stream came through tells whose it is.
func (a *Agent) newSDS() (*sds.Server, error) {
	return sds.New(sds.Config{
		Source: func(ctx context.Context) (sds.Source, error) {
			w, err := a.workloadOf(ctx)
			if err != nil {
				return nil, err
			}
			return sds.SourceFunc(w.served), nil
		},
		Peer: func(ctx context.Context) string {
			if w, err := a.workloadOf(ctx); err == nil {
				return w.Socket
			}
			return ""
		},
		Account: func(ctx context.Context) sds.Account {
			w, err := a.workloadOf(ctx)
			if err != nil {
				return sds.Account{}
			}
			account := a.config.account(w.Workload)
			return sds.Account{Name: account.name, Streams: account.streams, Limit: account.limit}
		},
		PlainValidation: a.config.PlainValidation,
		SystemBundle:    a.config.SystemBundle,
		Limits:          a.config.SDS,
		Observe: sds.Observe{
			Entrusted: func(s sds.Stream) { a.proxies.entrusted(s.Peer) },
			Acked:     func(sds.Stream) { a.metrics.acks.Inc() },
			Nacked:    func(s sds.Stream, n sds.Nack) { a.nacked(s, n) },
			Unknown:   func(s sds.Stream, names []string) { a.unknown(s, names) },
			Refused:   a.streamRefused,
			Closed:    a.streamClosed,
		},
	})
}

// workloadOf finds the workload whose socket a call came through.
func (a *Agent) workloadOf(ctx context.Context) (*workload, error) {
	p, ok := peer.FromContext(ctx)
	if !ok || p.LocalAddr == nil {
		return nil, refusal.New(refusal.Internal, "the call came through no socket")
	}
	addr, ok := p.LocalAddr.(boundAddr)
	if !ok {
		return nil, refusal.New(refusal.Internal, "no workload has the socket %s", p.LocalAddr)
	}
	return addr.w, nil
}

func (a *Agent) nacked(s sds.Stream, n sds.Nack) {
	a.metrics.nacks.Inc()
	w := a.roster.at(s.Peer)
	if w == nil {
		return
	}
	if omitted, ok := w.note.allow(); ok {
		w.log.Warn("a proxy refused what it was sent", "node", s.Node, "names", n.Names, "detail", n.Detail, "omitted", omitted)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state.nacks++
}

func (a *Agent) unknown(s sds.Stream, names []string) {
	a.metrics.unknown.Add(float64(len(names)))
	w := a.roster.at(s.Peer)
	if w == nil {
		return
	}
	if omitted, ok := w.note.allow(); ok {
		w.log.Warn("a proxy asks for secrets that are not served to it", "node", s.Node, "names", names[:min(len(names), 8)], "omitted", omitted)
	}
}

func (a *Agent) streamRefused(socket string, err error) {
	a.metrics.refused.Inc()
	w := a.roster.at(socket)
	if w == nil {
		return
	}
	if omitted, ok := w.note.allow(); ok {
		w.log.Warn("an SDS stream or fetch was refused", "error", err, "omitted", omitted)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state.limits++
	w.state.limit, w.state.limitAt = err, time.Now()
}

func (a *Agent) streamClosed(s sds.Stream, cut bool, err error) {
	if s.Entrusted {
		a.proxies.left(s.Peer, cut && !refusal.Of(err).EndsLife()) // who is gone does not come back
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		a.log.Debug("an SDS stream ended", "socket", s.Peer, "node", s.Node, "error", err)
	}
}

// serve keeps the workload's socket open until ctx ends. A socket that cannot be opened is its own workload's trouble
// alone: it is tried again, also when somebody took the file away.
func (w *workload) serve(ctx context.Context, server *grpc.Server, p door) {
	look := time.NewTicker(watch)
	defer look.Stop()
	for ctx.Err() == nil {
		s, err := listen(w.Socket, w.Mode, w.UID, w.GID)
		w.listened(err)
		if err == nil {
			err = w.accept(ctx, server, s, p, look.C)
			if ctx.Err() != nil {
				return
			}
			w.listened(err)
		}
		sleep(ctx, reopen)
	}
}

// accept serves the socket until it is gone, which it looks for at each look; grpc closes it at the stop.
func (w *workload) accept(ctx context.Context, server *grpc.Server, s *socket, p door, look <-chan time.Time) error {
	conns := newBound(s, w, p)
	done := make(chan error, 1)
	go func() { done <- server.Serve(conns) }()
	for {
		select {
		case err := <-done:
			_ = conns.Close()
			if err == nil {
				err = grpc.ErrServerStopped
			}
			return err
		case <-look:
			if !s.intact() {
				_ = conns.Close()
				<-done //nolint:errcheck // it ends because the socket was closed
				return refusal.New(refusal.SocketPath, "the socket was removed or replaced")
			}
		case <-ctx.Done():
			_ = conns.Close()
			err := <-done
			if w.finished() {
				conns.cut(parting)
			} // else the agent stops, and lets calls end by themselves
			return err
		}
	}
}

// listened notes whether the socket is open.
func (w *workload) listened(err error) {
	w.mu.Lock()
	before := w.state.listening
	w.state.listening, w.state.tried = err, true
	if err == nil {
		w.state.opened = time.Now()
	}
	w.mu.Unlock()
	w.news.Set(struct{}{})
	switch {
	case err == nil:
		w.log.Info("serving SDS")
	case before == nil || before.Error() != err.Error():
		w.log.Error("the socket is not open; it is tried again", "error", err)
	}
}

// newSDSTransport makes the gRPC server of the sockets.
func (a *Agent) newSDSTransport() *grpc.Server {
	server := grpc.NewServer(append(a.sds.ServerOptions(), guard{a.log}.options()...)...)
	secretv3.RegisterSecretDiscoveryServiceServer(server, a.sds)
	return server
}

// stopGracefully lets calls end by themselves, for a while.
func stopGracefully(server *grpc.Server) {
	late := time.AfterFunc(drain, server.Stop)
	defer late.Stop()
	server.GracefulStop()
}
