package admin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

const (
	// maxMessage bounds a request: the largest holds roots, and some that are too large, to be told so.
	maxMessage     = maxRootsPEM + 64<<10
	maxConnections = 64
	maxStreams     = 16
)

// Serve answers at the listener, which Listen made, until ctx ends; then it lets calls in hand finish, for five seconds at
// most. It closes the listener.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	server := grpc.NewServer(
		grpc.Creds(PeerCredentials{}),
		grpc.ConnectionTimeout(5*time.Second),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(16<<10),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
			defer func() {
				if p := recover(); p != nil {
					resp, err = nil, s.panicked(info.FullMethod, p)
				}
			}()
			resp, err = h(ctx, req)
			return resp, answer(err)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
			defer func() {
				if p := recover(); p != nil {
					err = s.panicked(info.FullMethod, p)
				}
			}()
			return answer(h(srv, stream))
		}),
	)
	meshcav1.RegisterAdminServiceServer(server, s)
	meshcav1.RegisterAuthorityServiceServer(server, s)
	stop := context.AfterFunc(ctx, func() {
		late := time.AfterFunc(5*time.Second, server.Stop)
		defer late.Stop()
		server.GracefulStop()
	})
	defer stop()
	if err := server.Serve(l); err != nil {
		return fmt.Errorf("admin socket %s: %w", l.Addr(), err)
	}
	return nil
}

// answer keeps what refusals and contexts say. Anything else goes out with its text, unlike at the CA's other doors:
// who can open this socket runs the CA.
func answer(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := refusal.From(err); ok || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return refusal.Status(err)
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.FailedPrecondition, err.Error())
}

func (s *Server) panicked(method string, p any) error {
	s.c.Log.Error("a request at the admin socket panicked; the server goes on", "method", method, "panic", refusal.Panicked(p), "stack", string(debug.Stack()))
	return refusal.New(refusal.Internal, "an internal fault: the CA's log has it").GRPCStatus().Err()
}
