package fakeca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

type service struct {
	meshcav1.UnimplementedIssuanceServiceServer
	ca *CA
}

// violation writes a breach of the contract down and refuses it.
func (c *CA) violation(format string, args ...any) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := fmt.Sprintf(format, args...)
	c.seen.Violations = append(c.seen.Violations, text)
	return refusal.Status(refusal.New(refusal.RequestMalformed, "%s", text))
}

func (s *service) AttestAgent(_ context.Context, r *meshcav1.AttestAgentRequest) (*meshcav1.AttestAgentResponse, error) {
	c := s.ca
	c.mu.Lock()
	c.seen.Attests++
	id, known := c.agents[r.GetToken()]
	_, workloads := c.workloads[r.GetToken()]
	ttl := c.agentTTL
	c.mu.Unlock()
	switch {
	case workloads:
		return nil, c.violation("a workload's token was shown as an agent's")
	case !known:
		return nil, refusal.Status(refusal.New(refusal.TokenRejected, "no agent has this token"))
	case r.GetCluster() != c.cluster:
		return nil, refusal.Status(refusal.New(refusal.ClusterUnknown, "no cluster %q", r.GetCluster()))
	}
	svid, err := c.issue(id, r.GetCsr(), ttl)
	if err != nil {
		return nil, refusal.Status(err)
	}
	return &meshcav1.AttestAgentResponse{Svid: svid, Bundle: c.Bundle(), ServerTime: c.now()}, nil
}

func (c *CA) now() *timestamppb.Timestamp {
	c.mu.Lock()
	defer c.mu.Unlock()
	return timestamppb.New(time.Now().Add(c.skew))
}

func (s *service) IssueX509SVIDs(ctx context.Context, r *meshcav1.IssueX509SVIDsRequest) (*meshcav1.IssueX509SVIDsResponse, error) {
	c := s.ca
	n := len(r.GetRequests())
	c.with(func() { c.seen.Batches = append(c.seen.Batches, n) })
	if n < 1 || n > 500 {
		return nil, c.violation("a batch of %d", n)
	}
	if err := s.agent(ctx, r.GetCluster()); err != nil {
		return nil, refusal.Status(err)
	}
	answer := &meshcav1.IssueX509SVIDsResponse{}
	for _, item := range r.GetRequests() {
		result := &meshcav1.X509SVIDResult{}
		if svid, err := s.one(item); err != nil {
			e, ok := refusal.From(err)
			if !ok {
				e = refusal.New(refusal.Internal, "%v", err)
			}
			no := &meshcav1.Refusal{Code: uint32(e.Reason.Code()), Reason: string(e.Reason), Message: e.Detail}
			if e.RetryAfter > 0 {
				no.RetryAfter = durationpb.New(e.RetryAfter)
			}
			result.Result = &meshcav1.X509SVIDResult_Refusal{Refusal: no}
		} else {
			result.Result = &meshcav1.X509SVIDResult_Svid{Svid: svid}
		}
		answer.Results = append(answer.Results, result)
	}
	answer.ServerTime = c.now()
	return answer, nil
}

func (s *service) one(item *meshcav1.X509SVIDRequest) (*meshcav1.X509SVID, error) {
	c := s.ca
	c.mu.Lock()
	id, known := c.workloads[item.GetToken()]
	_, agents := c.agents[item.GetToken()]
	if item.GetToken() == "" {
		id, known = c.pods[item.GetPod().GetUid()]
	}
	ttl := c.ttl
	c.mu.Unlock()
	switch {
	case item.GetToken() != "" && item.GetPod() != nil:
		return nil, c.violation("a request has a token and names a pod")
	case item.GetPod() != nil && !known:
		return nil, refusal.New(refusal.PodGone, "no pod has the UID %s", item.GetPod().GetUid())
	case agents:
		return nil, c.violation("an agent's token was shown as a workload's")
	case !known:
		return nil, refusal.New(refusal.TokenRejected, "no workload has this token")
	}
	if asked := item.GetTtl().AsDuration(); asked > 0 && asked < ttl {
		ttl = asked
	}
	return c.issue(id, item.GetCsr(), ttl)
}

// agent checks who calls, as it stands in the connection.
func (s *service) agent(ctx context.Context, cluster string) error {
	c := s.ca
	p, _ := peer.FromContext(ctx)
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return refusal.New(refusal.AgentRequired, "no client certificate")
	}
	id, _, err := x509svid.Verify(info.State.PeerCertificates, c.bundle.Value(), x509svid.WithTime(c.now().AsTime()))
	if err != nil {
		return refusal.New(refusal.CallerUntrusted, "%w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.callers != nil {
		if err := c.callers(info.State.PeerCertificates[0]); err != nil {
			return err
		}
	}
	for _, agent := range c.agents {
		if agent == id && cluster == c.cluster {
			return nil
		}
	}
	return refusal.New(refusal.AgentUnknown, "%s in %q", id, cluster)
}

// issue holds the CSR to the contract and signs.
func (c *CA) issue(id spiffeid.ID, der []byte, ttl time.Duration) (*meshcav1.X509SVID, error) {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, c.violation("a CSR that does not parse: %v", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, c.violation("a CSR with a bad signature: %v", err)
	}
	key, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, c.violation("a CSR whose key is not P-256")
	}
	if len(csr.URIs)+len(csr.DNSNames)+len(csr.Subject.Names)+len(csr.Extensions) > 0 {
		return nil, c.violation("a CSR that holds names or extensions")
	}
	public := string(csr.RawSubjectPublicKeyInfo)
	c.mu.Lock()
	used := c.keys[public]
	c.keys[public] = true
	refuse, skew := c.refuse, c.skew
	c.mu.Unlock()
	if used {
		return nil, c.violation("a key that was certified before")
	}
	if refuse != nil {
		if err := refuse(id); err != nil {
			return nil, err
		}
	}
	for _, denied := range c.state.Value().Denied {
		if denied == id.String() {
			return nil, refusal.New(refusal.IdentityDenied, "%s", id)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now().Add(skew)
	leaf, err := c.root.sign(id, key, now, ttl)
	if err != nil {
		return nil, err
	}
	c.seen.Issued[id]++
	return &meshcav1.X509SVID{
		SpiffeId: id.String(), Chain: [][]byte{leaf.Raw}, Life: durationpb.New(leaf.NotAfter.Sub(now)),
		Remaining: durationpb.New(leaf.NotAfter.Sub(time.Now().Add(skew))),
	}, nil
}

func (s *service) Sync(stream grpc.BidiStreamingServer[meshcav1.SyncRequest, meshcav1.SyncResponse]) error {
	c := s.ca
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	hello := first.GetHello()
	if hello == nil {
		return c.violation("the first message of Sync is no hello")
	}
	if err := s.agent(stream.Context(), hello.GetCluster()); err != nil {
		return refusal.Status(err)
	}
	c.with(func() { c.seen.Hellos = append(c.seen.Hellos, hello); c.seen.Streams++ })
	defer c.with(func() { c.seen.Streams-- })
	broken := make(chan error, 1)
	go func() { broken <- s.acks(stream) }()
	for {
		bundle, bundleStale := c.bundle.Get()
		state, stateStale := c.state.Get()
		encoded, err := bundle.Marshal()
		if err != nil {
			return err
		}
		err = stream.Send(&meshcav1.SyncResponse{Bundle: encoded, DeniedIds: state.Denied, Renew: state.Renew, Ended: state.Ended, PolicyReviewedAt: state.Reviewed, ServerTime: c.now()})
		if err != nil {
			return err
		}
		select {
		case <-bundleStale:
		case <-stateStale:
		case err := <-broken:
			return err
		}
	}
}

// acks takes acknowledgements: only of what was sent, each higher than the one before.
func (s *service) acks(stream grpc.BidiStreamingServer[meshcav1.SyncRequest, meshcav1.SyncResponse]) error {
	c := s.ca
	for last := uint64(0); ; {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		ack := m.GetAck()
		if ack == nil {
			return c.violation("a second hello")
		}
		current, _ := c.bundle.Value().SequenceNumber()
		if n := ack.GetBundleSequence(); n == last && len(ack.GetWaitsFor()) > 0 {
			continue // what it had before, and who lacks the next one
		} else if n > current || n <= last {
			return c.violation("bundle %d was acknowledged after %d, the newest is %d", n, last, current)
		}
		last = ack.GetBundleSequence()
		c.with(func() { c.seen.Acks = append(c.seen.Acks, last) })
	}
}

// Sign makes an SVID without a call, as one would have answered it.
func (c *CA) Sign(path string, csr []byte, life time.Duration) (*meshcav1.X509SVID, error) {
	id, err := spiffeid.FromPath(c.domain, path)
	if err != nil {
		return nil, err
	}
	return c.issue(id, csr, life)
}
