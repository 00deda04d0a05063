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
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshca/meshca/api/inbound"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca/registration"
)

const (
	door = "grpc"
	// MaxBatch is the number of CSRs in a call.
	MaxBatch = 500
	// maxMessage is grpc-go's own default for what a client receives, so that either end takes what the other sends. 500
	// answers with a chain of two are about 700 KiB; clients split what they send by size too.
	maxMessage = 4 << 20
	// flowWindow is what a peer may send before it is read, for a call and for a connection, in bytes. That it is fixed
	// bounds a connection's memory, and spares the ping and its answer with which grpc measures the line at each request.
	flowWindow = 1 << 20
	// maxVersion bounds what an agent calls itself, in bytes.
	maxVersion = 64
)

// Config is what a Server is made of; every field but Limits is needed.
type Config struct {
	Registration *registration.Authority
	// Bundle is the trust bundle and a channel that closes when it is stale.
	Bundle func() (*spiffebundle.Bundle, <-chan struct{})
	// Hold says why no agent may be told of the bundle now; nil: it may. It is asked before the bundle.
	Hold        func() error
	Credentials *Credentials
	Limits      Limits
	Log         *slog.Logger
}

// Server is the gRPC server of the issuance door.
type Server struct {
	meshcav1.UnimplementedIssuanceServiceServer
	Config
	grpc      *grpc.Server
	health    *health.Server
	accounts  *accounts
	admitting admitting
	inFlight  slots
	workers   *workers
	times     times
	stopping  chan struct{}
}

// times bound how long something may last.
type times struct {
	// answer bounds every call, whatever deadline its caller set: a store or an API server that hangs must not.
	answer time.Duration
	// hello bounds how long a Sync stream may stay silent after it opened: less than a message's patience, so that it is
	// refused by name and its connection stays.
	hello time.Duration
	// recheck is how often the agent behind an open stream is looked at again: its pod, its node, a denial.
	recheck time.Duration
	// settle is how long a state may be newer than what agents were told of it: a change is stored before it is told, and
	// both wake who follows.
	settle time.Duration
	// wall is the wall clock.
	wall func() time.Time
}

var _ meshcav1.IssuanceServiceServer = (*Server)(nil)

// New returns a Server that does not listen yet. Serve must follow: it ends what New began.
func New(c Config) *Server {
	s := &Server{
		Config: c, health: health.NewServer(), workers: startWorkers(), stopping: make(chan struct{}),
		times: times{answer: 30 * time.Second, hello: 8 * time.Second, recheck: 20 * time.Second, settle: 200 * time.Millisecond, wall: time.Now},
	}
	s.accounts = newAccounts(c.Limits, func(caller registration.Caller, cluster string, err error) {
		c.Registration.Journal.Refused(registration.EventCall, door, caller, cluster, err)
	})
	s.inFlight = make(slots, s.accounts.limits.RequestsInFlight)
	s.admitting = admitting{c.Credentials, c.Registration.Knows, s.accounts, inbound.NewRoom(s.accounts.limits.ConnectionsWithoutSVID, handshakeTime)}
	s.grpc = grpc.NewServer(
		grpc.Creds(s.admitting),
		grpc.NumStreamWorkers(workerCount),
		grpc.WaitForHandlers(true), // nothing may be signed when the ledger and the audit log have closed
		grpc.InTapHandle(s.accounts.admit),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(16<<10),
		grpc.StaticStreamWindowSize(flowWindow),
		grpc.StaticConnWindowSize(flowWindow),
		grpc.MaxConcurrentStreams(uint32(s.accounts.limits.OpenCalls)),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: 30 * time.Second, Timeout: 10 * time.Second,
			MaxConnectionIdle: time.Minute, MaxConnectionAge: time.Hour, MaxConnectionAgeGrace: 30 * time.Second,
		}),
		grpc.ChainUnaryInterceptor(s.guardUnary),
		grpc.ChainStreamInterceptor(s.guardStream),
	)
	s.grpc.RegisterService(s.description(), s)
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
	if err := s.grpc.Serve(inbound.Limit(l, s.accounts.limits.Connections, s.accounts.limits.ConnectionsPerAddress)); err != nil {
		return fmt.Errorf("gRPC at %s: %w", l.Addr(), err)
	}
	return nil
}

// AttestAgent answers an agent's own token with its SVID.
func (s *Server) AttestAgent(ctx context.Context, r *meshcav1.AttestAgentRequest) (*meshcav1.AttestAgentResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, s.times.answer)
	defer cancel()
	caller, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	release, err := s.enter(caller, r.GetCluster(), 1, r)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := s.Hold(); err != nil { // the answer has the bundle
		return nil, s.accounts.tell(caller, r.GetCluster(), err)
	}
	svid, err := s.Registration.AttestAgent(ctx, caller.Caller, r.GetCluster(), refusal.Clip(r.GetVersion(), maxVersion), registration.Request{
		Door: door, Token: attestor.NewToken(r.GetToken()), CSR: r.GetCsr(),
	})
	if err != nil {
		return nil, err
	}
	bundle, _ := s.Bundle()
	encoded, err := bundle.Marshal()
	if err != nil {
		return nil, fmt.Errorf("the bundle: %w", err)
	}
	now := time.Now()
	return &meshcav1.AttestAgentResponse{Svid: encode(svid, now, len(svid.Chain)), Bundle: encoded, ServerTime: timestamppb.New(now)}, nil
}

// IssueX509SVIDs answers each item on its own; only what concerns them all refuses the call.
func (s *Server) IssueX509SVIDs(ctx context.Context, r *meshcav1.IssueX509SVIDsRequest) (*meshcav1.IssueX509SVIDsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, s.times.answer)
	defer cancel()
	caller, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	items, cluster := r.GetRequests(), r.GetCluster()
	if err := acceptable(len(items)); err != nil {
		return nil, s.accounts.tell(caller, cluster, err)
	}
	release, err := s.enter(caller, cluster, len(items), r)
	if err != nil {
		return nil, err
	}
	defer release()
	by, err := s.admit(ctx, caller, cluster, len(items))
	if err != nil {
		return nil, s.accounts.tell(caller, cluster, err)
	}

	answer := newAnswer(len(items), r.GetHeldIntermediates())
	begun := 1
	if len(items) == 1 { // on the worker that grpc gave the call: nothing to share out
		answer.put(0, s.issueOne(ctx, by, items[0]))
	} else {
		begun = s.workers.do(ctx, len(items), func(i int) { answer.put(i, s.issueOne(ctx, by, items[i])) })
	}
	if left := len(items) - begun; left > 0 {
		err := refusal.New(refusal.CallEnded, "the call ended before %d of its %d requests were begun", left, len(items)).After(time.Second)
		_ = s.accounts.tell(caller, cluster, err)
		for i := begun; i < len(items); i++ {
			answer.put(i, issued{refused: err})
		}
	}
	return answer.message(), nil
}

// admit finds out who calls: an agent, or a workload by itself. The latter has one SVID to ask for: each further request
// would have a stranger's token looked at.
func (s *Server) admit(ctx context.Context, caller *party, cluster string, requests int) (*registration.Admitted, error) {
	if !caller.ID.IsZero() || caller.Untrusted != nil {
		return s.Registration.Admit(ctx, caller.Caller, cluster)
	}
	by, err := s.Registration.AdmitDirect(caller.Caller, cluster)
	if err == nil && requests > 1 {
		return nil, refusal.New(refusal.BatchTooLarge, "the call holds %d requests, and one without an agent's SVID may hold one", requests)
	}
	return by, err
}

// acceptable refuses a batch that is empty or too large.
func acceptable(n int) error {
	switch {
	case n == 0:
		return refusal.New(refusal.RequestMalformed, "the call holds no request").On("requests")
	case n > MaxBatch:
		return refusal.New(refusal.BatchTooLarge, "the call holds %d requests, at most %d are taken", n, MaxBatch)
	}
	return nil
}

// issueOne turns a panic into a refusal of this item: it runs outside the interceptors' reach.
func (s *Server) issueOne(ctx context.Context, by *registration.Admitted, item *meshcav1.X509SVIDRequest) (result issued) {
	defer func() {
		if p := recover(); p != nil {
			result = issued{refused: s.panicked("IssueX509SVIDs", p)}
		}
	}()
	ttl := item.GetTtl().AsDuration()
	if t := item.GetTtl(); t != nil && t.CheckValid() != nil {
		ttl = -1 // no duration at all; refused as malformed, with the line of every request
	}
	r := registration.Request{Door: door, Token: attestor.NewToken(item.GetToken()), CSR: item.GetCsr(), TTL: ttl}
	if p := item.GetPod(); p != nil {
		r.Pod = &attestor.PodRef{Namespace: p.GetNamespace(), Name: p.GetName(), UID: p.GetUid()}
	}
	svid, err := s.Registration.Issue(ctx, by, r)
	return issued{svid, err}
}

// enter charges the caller for the message and takes places for its n requests.
func (s *Server) enter(caller *party, cluster string, n int, message proto.Message) (release func(), err error) {
	leave, err := s.accounts.spend(caller, n, proto.Size(message))
	if err != nil {
		return nil, s.accounts.tell(caller, cluster, err)
	}
	free, err := s.inFlight.take(n)
	if err != nil {
		leave()
		return nil, s.accounts.tell(caller, cluster, err)
	}
	return func() { free(); leave() }, nil
}

func (s *Server) guardUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	arrived(ctx)
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
	s.Log.Error("a request panicked; it was refused, the server goes on", "method", method, "panic", refusal.Panicked(p), "stack", string(debug.Stack()))
	return refusal.New(refusal.Internal, "an internal fault: the CA's log has it").After(5 * time.Second)
}

// healthDoor answers Check alone: a Watch would hold one of the few places of callers without an SVID for ever.
type healthDoor struct{ healthv1.HealthServer }

// Watch refuses.
func (healthDoor) Watch(*healthv1.HealthCheckRequest, grpc.ServerStreamingServer[healthv1.HealthCheckResponse]) error {
	return status.Error(codes.Unimplemented, "this server answers Check, not Watch")
}
