package agent

import (
	"context"
	"log/slog"
	"runtime/debug"

	"google.golang.org/grpc"

	"github.com/meshca/meshca/api/refusal"
)

// guard makes refusals of what calls to the agent's own servers fail with, and of panics: one call may fail by a fault
// of ours, the agent, and with it every other workload of the node, goes on.
type guard struct{ log *slog.Logger }

func (g guard) options() []grpc.ServerOption {
	return []grpc.ServerOption{grpc.ChainUnaryInterceptor(g.unary), grpc.ChainStreamInterceptor(g.stream)}
}

func (g guard) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			resp, err = nil, g.panicked(info.FullMethod, p)
		}
	}()
	resp, err = handler(ctx, req)
	return resp, refusal.Status(err)
}

func (g guard) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = g.panicked(info.FullMethod, p)
		}
	}()
	return refusal.Status(handler(srv, stream))
}

func (g guard) panicked(method string, p any) error {
	g.log.Error("a call panicked; it was refused, the agent goes on", "method", method, "panic", refusal.Panicked(p), "stack", string(debug.Stack()))
	return refusal.Status(refusal.New(refusal.Internal, "an internal fault: the agent's log has it"))
}
