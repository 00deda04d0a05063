package csi

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/net/netutil"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	registrationv1 "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/api/refusal"
)

const (
	maxRequestBytes = 1 << 20 // a pod's spec, of which a request holds a part, has 1.5 MiB at most
	maxHeaderBytes  = 16 << 10
	maxConnections  = 1024 // a kubelet opens one for each call
	maxStreams      = 64
	// reopen is how long a socket that cannot be opened is left alone; look is how often it is looked whether it is
	// still there.
	reopen = 2 * time.Second
	look   = 5 * time.Second
	// drain bounds how long calls may take to end at the stop.
	drain = 3 * time.Second
)

// serveKubelet answers at the CSI socket until ctx ends; opened is closed when it is open for the first time.
func (d *Driver) serveKubelet(ctx context.Context, opened chan<- struct{}) {
	server := newServer(d.log)
	csi.RegisterIdentityServer(server, d)
	csi.RegisterNodeServer(server, d)
	d.serve(ctx, d.config.Socket, server, func() { close(opened) })
}

// serveRegistration answers at the registration socket until ctx ends. Then the socket goes, and with it, until the next
// run, the kubelet's registration: pods that start meanwhile wait.
func (d *Driver) serveRegistration(ctx context.Context) {
	server := newServer(d.log)
	registrationv1.RegisterRegistrationServer(server, &registrar{config: d.config, log: d.log, kept: &d.registration})
	d.serve(ctx, d.config.registrationSocket(), server, func() {})
}

func newServer(log *slog.Logger) *grpc.Server {
	return grpc.NewServer(
		grpc.UnaryInterceptor(guard{log}.unary),
		grpc.ConnectionTimeout(5*time.Second), grpc.MaxRecvMsgSize(maxRequestBytes), grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(maxStreams), grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 10 * time.Minute}),
	)
}

// serve keeps the socket open until ctx ends, also when somebody takes it away.
func (d *Driver) serve(ctx context.Context, path string, server *grpc.Server, opened func()) {
	defer stop(server)
	for first := true; ctx.Err() == nil; {
		l, err := agent.Listen(path)
		d.registration.open(path, err)
		if err != nil {
			d.log.Error("a socket of the CSI driver is not open; it is tried again", "error", err)
			sleep(ctx, reopen)
			continue
		}
		if first {
			opened()
			first = false
		}
		d.accept(ctx, l, path, server)
	}
}

// accept serves the socket until ctx ends, or the socket is gone.
func (d *Driver) accept(ctx context.Context, l net.Listener, path string, server *grpc.Server) {
	made, _ := os.Lstat(path)
	refused := rate.NewLimiter(rate.Every(10*time.Second), 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(netutil.LimitListener(vetted{l, d.log, refused}, maxConnections))
	}()
	gone := time.NewTicker(look)
	defer gone.Stop()
	for {
		select {
		case <-gone.C:
			if there, err := os.Lstat(path); err == nil && os.SameFile(made, there) {
				continue
			}
			d.log.Warn("a socket of the CSI driver was removed or replaced; it is opened anew", "socket", path)
		case <-done:
		case <-ctx.Done():
		}
		_ = l.Close()
		<-done
		return
	}
}

// stop lets calls end by themselves, for a while.
func stop(server *grpc.Server) {
	late := time.AfterFunc(drain, server.Stop)
	defer late.Stop()
	server.GracefulStop()
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// vetted lets those through alone that are root, as kubelets are, or the agent's own user. The socket's mode says the
// same; what comes through here can mount things, so it is asked twice.
type vetted struct {
	net.Listener
	log   *slog.Logger
	noted *rate.Limiter
}

// Accept returns the next connection of somebody who may call. Nothing is read of others.
func (v vetted) Accept() (net.Conn, error) {
	for {
		conn, err := v.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(conn)
		if err == nil && (uid == 0 || uid == os.Geteuid()) {
			return conn, nil
		}
		_ = conn.Close()
		if v.noted.Allow() {
			v.log.Warn("somebody who is neither root nor the agent's user called the CSI driver, and was refused", "uid", uid, "error", err)
		}
	}
}

// guard makes refusals of what calls fail with, and of panics: one call may fail by a fault of ours, the agent goes on.
// Requests hold tokens, so nothing of them is logged.
type guard struct{ log *slog.Logger }

func (g guard) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			g.log.Error("a call panicked; it was refused, the agent goes on", "method", info.FullMethod, "panic", refusal.Panicked(p), "stack", string(debug.Stack()))
			resp, err = nil, refusal.Status(refusal.New(refusal.Internal, "an internal fault: the agent's log has it"))
		}
	}()
	resp, err = handler(ctx, req)
	if err == nil {
		return resp, nil
	}
	if status.Code(err) == codes.Unimplemented {
		return nil, err // what the CSI spec asks for where a capability is not there
	}
	if _, ok := refusal.From(err); !ok && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		g.log.Error("a call failed", "method", info.FullMethod, "error", err)
	}
	return nil, refusal.Status(err)
}
