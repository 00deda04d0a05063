package agent

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/meshca/meshca/api/issuance/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// distrustEvery bounds how often the CA's word against the own SVID makes the agent attest anew: a CA that never takes
// one makes no storm, and calls in flight that were refused with the SVID before cost one attestation at most.
const distrustEvery = 5 * time.Second

// self is the agent's own SVID. It opens the CA's door; what workloads hold does not hang on it.
type self struct {
	domain    spiffeid.TrustDomain
	cluster   string
	tokenFile string
	version   string
	trust     *trust
	client    *client.Client
	store     *store
	clock     *clock
	now       func() instant
	log       *slog.Logger
	// gained is called when there is a new SVID to call with; anew: in the place of one that the CA did not take.
	gained func(anew bool)
	// uprooted is called when the CA says that the agent's node is no more.
	uprooted func(why error)

	wake   chan struct{}
	orders orders
	// identity is nil while there is none. Whoever waits for one finds a connection that shows it.
	identity *rotation.Current[*held]
	// shown is what handshakes show; it goes ahead of identity.
	shown atomic.Pointer[held]

	mu        sync.Mutex
	last      error // of the last attempt
	lastAt    time.Time
	next      time.Time
	rotations uint64
	had       bool // there was an SVID once
	// distrusted is when the CA's word was last taken for it.
	distrusted time.Time
	doubted    bool // and no other came since
}

var _ rotation.Subject = (*self)(nil)

// Renew attests the agent with its own token, every time.
func (s *self) Renew(ctx context.Context) (rotation.Term, error) {
	token, err := readToken(s.tokenFile)
	if err != nil {
		return rotation.Term{}, err
	}
	key, csr, err := newCSR()
	if err != nil {
		return rotation.Term{}, err
	}
	began := time.Now()
	answer, err := s.client.AttestAgent(ctx, &meshcav1.AttestAgentRequest{
		Cluster: s.cluster, Token: token.secret, Csr: csr, Version: s.version,
	})
	if refusal.Of(err) == refusal.NodeGone {
		s.uprooted(err)
	}
	if err != nil {
		return rotation.Term{}, err
	}
	s.clock.measure(answer.GetServerTime(), time.Since(began))
	if err := s.trust.offer(answer.GetBundle(), nil); err != nil {
		s.log.Error("the bundle that came with the agent's SVID cannot be used", "error", err)
	}
	h, err := receive(answer.GetSvid(), key, s.trust, s.now())
	if err != nil {
		return rotation.Term{}, err
	}
	if !s.mayBe(h.svid.ID) {
		return rotation.Term{}, fmt.Errorf("the CA answered with %s, which is no agent of cluster %s", h.svid.ID, s.cluster)
	}
	h.bearer = token.bearer()
	skew, _ := s.clock.offset()
	if err := s.store.save(selfName, Workload{}, h, skew); err != nil {
		s.log.Error("the agent's SVID cannot be kept; it is in use, but a restart has to attest anew", "error", err)
	}
	s.use(h)
	s.mu.Lock()
	anew := s.doubted
	s.doubted = false
	s.mu.Unlock()
	s.gained(anew)
	return h.term, nil
}

// mayBe reports whether the ID is that of an agent of this cluster.
func (s *self) mayBe(id spiffeid.ID) bool {
	return id.MemberOf(s.domain) && strings.HasPrefix(id.Path(), "/meshca/agent/"+s.cluster+"/")
}

// use puts an SVID, or none, in the place of the one before.
func (s *self) use(h *held) {
	s.shown.Store(h)
	if err := s.client.Redial(); err != nil {
		s.log.Error("the connection to the CA stays the old one", "error", err)
	}
	s.identity.Set(h)
}

// restore takes up what an earlier run kept.
func (s *self) restore(h *held) {
	s.mu.Lock()
	s.had = true
	s.mu.Unlock()
	s.use(h)
}

// Due spreads agents by their IDs.
func (s *self) Due(t rotation.Term) time.Time { return rotation.Phased(s.id())(t) }

// Expired stops showing the SVID; workloads keep theirs.
func (s *self) Expired() {
	s.log.Error("the agent's own SVID has ended; what workloads hold is served on, and the agent goes on attesting itself")
	if err := s.store.remove(selfName); err != nil {
		s.log.Error("the ended SVID of the agent cannot be removed", "error", err)
	}
	s.use(nil)
}

// distrustCaller is distrust for the answer to one item of a batch: what it says of pods and nodes may be the workload's,
// so only what can be meant for nobody but the agent counts. The rest the Sync stream tells.
func (s *self) distrustCaller(err error) {
	if meetsCaller(refusal.Of(err)) {
		s.distrust(err)
	}
}

// meetsCaller reports whether a refusal can be meant for nobody but the agent.
func meetsCaller(r refusal.Reason) bool {
	switch r {
	case refusal.AgentUnknown, refusal.AgentExpired, refusal.AgentNotListed, refusal.CallerUntrusted, refusal.AgentRequired:
		return true
	}
	return false
}

// distrust attests anew, without the SVID that the CA does not take. err says why it does not: the end of a stream, or
// of a call as a whole, which speak of the agent alone. Its pod may be another one than the SVID was given to (a restart
// with the runtime directory kept), its node, its cluster: only another proof can tell, so every final refusal counts.
func (s *self) distrust(err error) {
	if e, ok := refusal.From(err); !ok || !judges(e.Reason) {
		return
	}
	s.mu.Lock()
	again := time.Since(s.distrusted) < distrustEvery
	if !again {
		s.distrusted = time.Now()
	}
	s.mu.Unlock()
	if again || s.identity.Value() == nil {
		return
	}
	s.mu.Lock()
	s.doubted = true
	s.mu.Unlock()
	s.log.Warn("the CA does not take the agent's SVID; attesting anew", "error", err)
	s.use(nil)
	s.renewNow()
}

// judges reports whether a refusal is a verdict on who calls, which stands until something else is shown: no outage, no
// fault of the CA's, no fault of the message.
func judges(r refusal.Reason) bool {
	switch r.Code() {
	case codes.Unauthenticated, codes.PermissionDenied, codes.NotFound, codes.FailedPrecondition:
		return true
	}
	return false
}

func (s *self) renewNow() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// id is the agent's SPIFFE ID, empty before it had one.
func (s *self) id() string {
	if h := s.identity.Value(); h != nil {
		return h.svid.ID.String()
	}
	return ""
}

// certificate is what the client shows at a handshake.
func (s *self) certificate() *tls.Certificate {
	if h := s.shown.Load(); h != nil && !h.ended(s.now()) {
		return h.certificate()
	}
	return nil
}

// await returns once the agent has an SVID to call with. At the end of ctx it says why there is none.
func (s *self) await(ctx context.Context) error {
	for {
		h, stale := s.identity.Get()
		if h != nil && !h.ended(s.now()) {
			return nil
		}
		select {
		case <-stale:
		case <-ctx.Done():
			s.mu.Lock()
			defer s.mu.Unlock()
			if e, ok := refusal.From(s.last); ok {
				return &refusal.Error{Reason: e.Reason, Detail: "the agent has no SVID of its own: " + e.Detail, RetryAfter: e.RetryAfter}
			}
			if s.last != nil {
				return refusal.New(refusal.CAUnreachable, "the agent has no SVID of its own: %w", s.last)
			}
			return refusal.New(refusal.CAUnreachable, "the agent has no SVID of its own yet")
		}
	}
}

// observed notes an attempt of Keep.
func (s *self) observed(a rotation.Attempt) {
	s.mu.Lock()
	before := s.last
	s.last, s.lastAt, s.next = a.Err, time.Now(), a.Next
	if a.Err == nil && s.had {
		s.rotations++
	}
	s.had = s.had || a.Err == nil
	s.mu.Unlock()
	switch {
	case a.Err != nil && refusal.Of(before) != refusal.Of(a.Err):
		s.log.Warn("the agent cannot attest itself", "error", a.Err, "next", a.Next)
	case a.Err == nil:
		s.log.Info("the agent has a new SVID", "spiffe_id", s.id(), "cause", string(a.Cause), "next", a.Next)
	}
}
