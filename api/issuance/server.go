package issuance

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
)

const (
	door = "grpc"
	// MaxBatch is the number of CSRs in a call.
	MaxBatch = 500
	// maxMessage is grpc-go's own default for what a client receives, so that either end takes what the other sends. 500
	// answers with a chain of two are about 700 KiB; clients split what they send by size too.
	maxMessage = 4 << 20
	// answerWithin bounds every call, whatever deadline its caller set: a store or an API server that hangs must not.
	answerWithin = 30 * time.Second
	// maxVersion bounds what an agent calls itself, in bytes.
	maxVersion = 64
)

// Config is what a Server is made of; every field but Limits is needed.
type Config struct {
	Registration *registration.Authority
	// Bundle is the trust bundle and a channel that closes when it is stale.
	Bundle      func() (*spiffebundle.Bundle, <-chan struct{})
	Credentials *Credentials
	Limits      Limits
	Log         *slog.Logger
}

// Server is the gRPC server of the issuance door.
type Server struct {
	meshcav1.UnimplementedIssuanceServiceServer
	Config
	grpc     *grpc.Server
	health   *health.Server
	accounts *accounts
	inFlight slots
	workers  *workers
	stopping chan struct{}
}

var _ meshcav1.IssuanceServiceServer = (*Server)(nil)

// New returns a Server that does not listen yet. Serve must follow: it ends what New began.
func New(c Config) *Server {
	s := &Server{Config: c, health: health.NewServer(), workers: startWorkers(), stopping: make(chan struct{})}
	s.accounts = newAccounts(c.Limits, func(caller registration.Caller, err error) {
		c.Registration.Journal.Refused(registration.EventCall, door, caller, "", err)
	})
	s.inFlight = make(slots, s.accounts.limits.RequestsInFlight)
	s.grpc = grpc.NewServer(
		grpc.Creds(c.Credentials),
		grpc.NumStreamWorkers(workerCount),
		grpc.InTapHandle(s.accounts.admit),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(16<<10),
		grpc.MaxConcurrentStreams(uint32(s.accounts.limits.OpenCalls)),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: 30 * time.Second, Timeout: 10 * time.Second,
			MaxConnectionIdle: 15 * time.Minute, MaxConnectionAge: time.Hour, MaxConnectionAgeGrace: 30 * time.Second,
		}),
		grpc.ChainUnaryInterceptor(s.guardUnary),
		grpc.ChainStreamInterceptor(s.guardStream),
	)
	meshcav1.RegisterIssuanceServiceServer(s.grpc, s)
	healthv1.RegisterHealthServer(s.grpc, healthDoor{s.health})
	s.SetServing(false)
	return s
}

// SetServing tells gRPC health checks whether the CA can sign now.
func (s *Server) SetServing(ok bool) {
	state := healthv1.HealthCheckResponse_NOT_SERVING
	if ok {
		state = healthv1.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", state)
	s.health.SetServingStatus(meshcav1.IssuanceService_ServiceDesc.ServiceName, state)
}

// Serve answers at the listener until ctx ends; then it lets calls in hand finish, for ten seconds at most.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() {
		s.health.Shutdown()
		close(s.stopping) // Sync streams end by themselves
		late := time.AfterFunc(10*time.Second, s.grpc.Stop)
		defer late.Stop()
		s.grpc.GracefulStop()
	})
	defer stop()
	defer s.workers.stop()
	defer s.grpc.Stop() // returns when the last call has
	if err := s.grpc.Serve(limitConnections(l, s.accounts.limits.Connections, s.accounts.limits.ConnectionsPerAddress)); err != nil {
		return fmt.Errorf("gRPC at %s: %w", l.Addr(), err)
	}
	return nil
}

// AttestAgent answers an agent's own token with its SVID.
func (s *Server) AttestAgent(ctx context.Context, r *meshcav1.AttestAgentRequest) (*meshcav1.AttestAgentResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	caller, release, err := s.enter(ctx, 1, r)
	if err != nil {
		return nil, err
	}
	defer release()
	svid, err := s.Registration.AttestAgent(ctx, registration.Request{
		Door: door, Caller: caller, Cluster: r.GetCluster(), Token: attestor.NewToken(r.GetToken()), CSR: r.GetCsr(),
	}, refusal.Clip(r.GetVersion(), maxVersion))
	if err != nil {
		return nil, err
	}
	bundle, _ := s.Bundle()
	encoded, err := bundle.Marshal()
	if err != nil {
		return nil, fmt.Errorf("the bundle: %w", err)
	}
	now := time.Now()
	return &meshcav1.AttestAgentResponse{Svid: encode(svid, now), Bundle: encoded, ServerTime: timestamppb.New(now)}, nil
}

// IssueX509SVIDs answers each item on its own; only what concerns them all refuses the call.
func (s *Server) IssueX509SVIDs(ctx context.Context, r *meshcav1.IssueX509SVIDsRequest) (*meshcav1.IssueX509SVIDsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	items := r.GetRequests()
	if err := s.acceptable(ctx, r.GetCluster(), len(items)); err != nil {
		return nil, err
	}
	caller, release, err := s.enter(ctx, len(items), r)
	if err != nil {
		return nil, err
	}
	defer release()

	results := make([]*meshcav1.X509SVIDResult, len(items))
	if len(items) == 1 { // on the worker that grpc gave the call: nothing to share out
		results[0] = s.issueOne(ctx, caller, r.GetCluster(), items[0])
		return &meshcav1.IssueX509SVIDsResponse{Results: results, ServerTime: timestamppb.Now()}, nil
	}
	begun := s.workers.do(ctx, len(items), func(i int) {
		results[i] = s.issueOne(ctx, caller, r.GetCluster(), items[i])
	})
	for i := begun; i < len(items); i++ {
		results[i] = refused(ctx.Err())
	}
	return &meshcav1.IssueX509SVIDsResponse{Results: results, ServerTime: timestamppb.Now()}, nil
}

// acceptable refuses a batch that is empty or too large, with a line of its own: no item of it is looked at.
func (s *Server) acceptable(ctx context.Context, cluster string, n int) error {
	var err *refusal.Error
	switch {
	case n == 0:
		err = refusal.New(refusal.RequestMalformed, "the call holds no request").On("requests")
	case n > MaxBatch:
		err = refusal.New(refusal.BatchTooLarge, "the call holds %d requests, at most %d are taken", n, MaxBatch)
	default:
		return nil
	}
	s.refuse(ctx, cluster, err)
	return err
}

// refuse records a refusal that the registration authority did not give.
func (s *Server) refuse(ctx context.Context, cluster string, refused error) {
	caller, err := callerOf(ctx)
	if err == nil {
		s.Registration.Journal.Refused(registration.EventCall, door, caller, cluster, refused)
	}
}

// issueOne turns a panic into a refusal of this item: it runs outside the interceptors' reach.
func (s *Server) issueOne(ctx context.Context, caller registration.Caller, cluster string, item *meshcav1.X509SVIDRequest) (result *meshcav1.X509SVIDResult) {
	defer func() {
		if p := recover(); p != nil {
			result = refused(s.panicked("IssueX509SVIDs", p))
		}
	}()
	if t := item.GetTtl(); t != nil && t.CheckValid() != nil {
		err := refusal.New(refusal.RequestMalformed, "ttl is no duration").On("ttl")
		s.refuse(ctx, cluster, err)
		return refused(err)
	}
	svid, err := s.Registration.Issue(ctx, registration.Request{
		Door: door, Caller: caller, Cluster: cluster, Token: attestor.NewToken(item.GetToken()), CSR: item.GetCsr(), TTL: item.GetTtl().AsDuration(),
	})
	if err != nil {
		return refused(err)
	}
	return &meshcav1.X509SVIDResult{Result: &meshcav1.X509SVIDResult_Svid{Svid: encode(svid, time.Now())}}
}

// enter charges the caller for the message and takes places for its n requests.
func (s *Server) enter(ctx context.Context, n int, message proto.Message) (registration.Caller, func(), error) {
	caller, err := callerOf(ctx)
	if err != nil {
		return caller, nil, err
	}
	leave, err := s.accounts.spend(caller, n, proto.Size(message))
	if err != nil {
		return caller, nil, s.accounts.tell(caller, err)
	}
	release, err := s.inFlight.take(n)
	if err != nil {
		leave()
		return caller, nil, s.accounts.tell(caller, err)
	}
	return caller, func() { release(); leave() }, nil
}

func encode(svid ca.SVID, now time.Time) *meshcav1.X509SVID {
	chain := make([][]byte, len(svid.Chain))
	for i, c := range svid.Chain {
		chain[i] = c.Raw
	}
	return &meshcav1.X509SVID{
		SpiffeId: svid.ID.String(), Chain: chain,
		Life: durationpb.New(svid.Life), Remaining: durationpb.New(svid.NotAfter.Sub(now)),
	}
}

func refused(err error) *meshcav1.X509SVIDResult {
	e, ok := refusal.From(err)
	switch {
	case ok:
	case refusal.Of(err) == refusal.CallEnded:
		e = refusal.New(refusal.CallEnded, "the call ended before the request was answered").After(time.Second)
	default: // its text is not the peer's business
		e, _ = refusal.From(refusal.Status(err))
	}
	r := &meshcav1.Refusal{Code: uint32(e.Reason.Code()), Reason: string(e.Reason), Message: e.Detail}
	if e.RetryAfter > 0 {
		r.RetryAfter = durationpb.New(e.RetryAfter)
	}
	return &meshcav1.X509SVIDResult{Result: &meshcav1.X509SVIDResult_Refusal{Refusal: r}}
}

func (s *Server) guardUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			resp, err = nil, refusal.Status(s.panicked(info.FullMethod, p))
		}
	}()
	resp, err = handler(ctx, req)
	return resp, refusal.Status(err)
}

func (s *Server) guardStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = refusal.Status(s.panicked(info.FullMethod, p))
		}
	}()
	return refusal.Status(handler(srv, stream))
}

func (s *Server) panicked(method string, p any) error {
	s.Log.Error("a request panicked; it was refused, the server goes on", "method", method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	return refusal.New(refusal.Internal, "an internal fault: the CA's log has it").After(5 * time.Second)
}

// healthDoor answers Check alone: a Watch would hold one of the few places of callers without an SVID for ever.
type healthDoor struct{ healthv1.HealthServer }

// Watch refuses.
func (healthDoor) Watch(*healthv1.HealthCheckRequest, grpc.ServerStreamingServer[healthv1.HealthCheckResponse]) error {
	return status.Error(codes.Unimplemented, "this server answers Check, not Watch")
}
