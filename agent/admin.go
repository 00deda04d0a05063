package agent

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"time"

	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/rotation"
)

// admin answers at the admin socket. It changes nothing, so it leaves no audit lines.
type admin struct {
	meshcav1.UnimplementedAgentAdminServiceServer
	agent *Agent
}

var _ meshcav1.AgentAdminServiceServer = (*admin)(nil)

// serveAdmin answers at the admin socket until ctx ends.
func (a *Agent) serveAdmin(ctx context.Context, l net.Listener) error {
	server := grpc.NewServer(append(guard{a.log}.options(),
		grpc.ConnectionTimeout(5*time.Second), grpc.MaxRecvMsgSize(64<<10), grpc.MaxHeaderListSize(16<<10), grpc.MaxConcurrentStreams(16),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 5 * time.Minute}),
	)...)
	meshcav1.RegisterAgentAdminServiceServer(server, &admin{agent: a})
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { defer close(ended); stopGracefully(server) })
	err := server.Serve(netutil.LimitListener(l, 64))
	if !stop() {
		<-ended
		return nil
	}
	return fmt.Errorf("the admin socket: %w", err)
}

// GetAgentStatus shows the agent and all it holds; keys excepted.
func (s *admin) GetAgentStatus(context.Context, *meshcav1.GetAgentStatusRequest) (*meshcav1.GetAgentStatusResponse, error) {
	a := s.agent
	connected, last, lastAt, _ := a.follower.standing()
	if err, at := a.self.lastError(); err != nil && at.After(lastAt) {
		last, lastAt = err, at
	}
	why := a.NotReady()
	status := &meshcav1.GetAgentStatusResponse{
		Version: a.config.Version, TrustDomain: a.config.TrustDomain.Name(), Cluster: a.config.Cluster, Server: a.config.Server,
		StartedAt: timestamppb.New(a.started), AgentTime: timestamppb.Now(), Ready: len(why) == 0, NotReady: why,
		Self: a.self.view(), Connected: connected, BundleSequence: a.trust.sequence(),
	}
	if last != nil {
		status.LastError, status.LastErrorAt = last.Error(), timestamppb.New(lastAt)
	}
	if skew, measured := a.clock.offset(); measured {
		status.ClockSkew = durationpb.New(skew)
	}
	traffic := a.traffic()
	for _, w := range a.roster.list() {
		shown := w.shown()
		traffic[w.Socket].show(shown)
		shown.AwaitedStreams = uint32(a.proxies.missing(w.Socket))
		status.Workloads = append(status.Workloads, shown)
	}
	for _, d := range a.readers.list() {
		status.Deliveries = append(status.Deliveries, d.view())
	}
	return status, nil
}

// view is the form of a delivery in status.
func (d deliveryOf) view() *meshcav1.DeliveryStatus {
	v := &meshcav1.DeliveryStatus{Name: d.name, After: d.After, Failures: d.Failures, Fault: d.Fault, BundleSequence: d.sequence}
	if !d.WrittenAt.IsZero() {
		v.WrittenAt = timestamppb.New(d.WrittenAt)
	}
	if !d.AfterAt.IsZero() {
		v.AfterAt = timestamppb.New(d.AfterAt)
	}
	return v
}

// GetAgentBundle returns the trust bundle in use.
func (s *admin) GetAgentBundle(context.Context, *meshcav1.GetAgentBundleRequest) (*meshcav1.GetAgentBundleResponse, error) {
	encoded, err := s.agent.trust.current.Value().Marshal()
	if err != nil {
		return nil, fmt.Errorf("the bundle: %w", err)
	}
	return &meshcav1.GetAgentBundleResponse{Bundle: encoded}, nil
}

// CheckAgent looks at everything that the agent rests on.
func (s *admin) CheckAgent(ctx context.Context, _ *meshcav1.CheckAgentRequest) (*meshcav1.CheckAgentResponse, error) {
	return &meshcav1.CheckAgentResponse{Findings: s.agent.check(ctx)}, nil
}

// shown is the form of an SVID in status.
func (h *held) shown(renewAt time.Time, rotations uint64, now instant) *meshcav1.HeldSVID {
	v := &meshcav1.HeldSVID{
		SpiffeId: h.svid.ID.String(), Serial: h.serial(), NotAfter: timestamppb.New(h.leaf().NotAfter),
		Remaining: durationpb.New(h.left(now)), Life: durationpb.New(h.term.Life),
		Rotations: rotations, DnsNames: h.leaf().DNSNames, Chain: h.chain(),
	}
	if !renewAt.IsZero() {
		v.RenewAt = timestamppb.New(renewAt)
	}
	return v
}

func (s *self) view() *meshcav1.HeldSVID {
	h := s.identity.Value()
	if h == nil {
		return nil
	}
	due := s.Due(h.term)
	s.mu.Lock()
	defer s.mu.Unlock()
	return h.shown(planned(s.next, due), s.rotations, s.now())
}

// lastError is why the last attempt failed, if it did.
func (s *self) lastError() (error, time.Time) { //nolint:revive,staticcheck // the error is the subject here, not the outcome
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last, s.lastAt
}

// traffic is what the open streams of one socket say together. A nil traffic has none.
type traffic struct {
	streams uint32
	nack    sds.Stream // the one that refused last, and took nothing since
	unknown map[string]bool
	asked   uint32 // in vain
}

// traffic sums the open streams up, by socket.
func (a *Agent) traffic() map[string]*traffic {
	all := make(map[string]*traffic)
	for _, st := range a.sds.Streams() {
		t := all[st.Peer]
		if t == nil {
			t = &traffic{unknown: map[string]bool{}}
			all[st.Peer] = t
		}
		t.streams++
		if st.LastNackAt.After(t.nack.LastNackAt) {
			t.nack = st
		}
		t.asked += uint32(st.UnknownCount)
		for _, name := range st.Unknown {
			t.unknown[name] = true
		}
	}
	return all
}

// maxUnknown is how many names that are asked for in vain status lists for a socket; maxName cuts each, in bytes.
const (
	maxUnknown = 8
	maxName    = 256
)

func (t *traffic) show(v *meshcav1.WorkloadStatus) {
	if t == nil {
		return
	}
	v.OpenStreams, v.LastNack, v.UnknownCount = t.streams, t.nack.LastNack, t.asked
	names := slices.Sorted(maps.Keys(t.unknown))
	for _, name := range names[:min(maxUnknown, len(names))] {
		v.UnknownNames = append(v.UnknownNames, refusal.Clip(name, maxName))
	}
}

// limitShown is how long a proxy that met a limit is in trouble for: it comes back within minutes, and meets it again or not.
const (
	limitShown = 10 * time.Minute
	maxLimit   = 512
)

func (w *workload) shown() *meshcav1.WorkloadStatus {
	phase := rotation.Phased(w.phase())
	w.mu.Lock()
	defer w.mu.Unlock()
	st := &w.state
	v := &meshcav1.WorkloadStatus{Socket: w.Socket, TokenFile: w.TokenFile, State: string(w.standing()), Nacks: st.nacks,
		Namespace: w.Pod.Namespace, Pod: w.Pod.Name}
	if !st.lastID.IsZero() {
		v.LastSpiffeId = st.lastID.String()
	}
	if v.Limited = st.limits; st.limit != nil && time.Since(st.limitAt) < limitShown {
		v.LastLimit, v.LastLimitAt = refusal.Clip(st.limit.Error(), maxLimit), timestamppb.New(st.limitAt)
	}
	if st.held != nil && !st.withheld {
		v.Svid = st.held.shown(planned(st.next, phase(st.held.term)), st.rotations, w.now())
	}
	if st.failing && !st.next.IsZero() {
		v.NextTry = timestamppb.New(st.next)
	}
	why, at := st.refused, st.refusedAt
	switch {
	case st.withheld:
		why, at = refusal.New(refusal.SVIDPending, "the kept list of denied identities is damaged: what was kept is not served before the CA says what is denied"), time.Time{}
	case st.doubt() != nil:
		if why = st.doubt(); !st.failing {
			at = time.Time{}
		}
	case why == nil && st.tried:
		why, at = st.listening, time.Time{}
	}
	if why != nil {
		v.LastRefusal = refusalOf(why)
		if !at.IsZero() {
			v.LastRefusalAt = timestamppb.New(at)
		}
	}
	return v
}

// planned is when the next attempt comes: what Keep said last, or what the schedule says of what was restored.
func planned(next, due time.Time) time.Time {
	if next.IsZero() {
		return due
	}
	return next
}

// refusalOf is the form of an error in status.
func refusalOf(err error) *meshcav1.Refusal {
	e, ok := refusal.From(err)
	if !ok {
		return &meshcav1.Refusal{Code: uint32(refusal.Internal.Code()), Reason: string(refusal.Internal), Message: err.Error()}
	}
	v := &meshcav1.Refusal{Code: uint32(e.Reason.Code()), Reason: string(e.Reason), Message: e.Detail}
	if e.RetryAfter > 0 {
		v.RetryAfter = durationpb.New(e.RetryAfter)
	}
	return v
}
