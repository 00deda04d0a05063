// Package admin is the CA's admin socket: the server of meshca.v1.AdminService, which certctl speaks to.
//
// The socket is a unix socket of mode 0600: whoever can open it is an operator, and is told what went wrong in full.
// Each verb that changes something leaves an audit line with the peer's uid, as the kernel vouches for it. Answers are
// bounded ([MaxEntries], [MaxDecisions]), so that a question cannot cost the CA its memory.
package admin

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/policy"
	"github.com/meshca/meshca/ca/registration"
)

// Ledger is the record of what was issued.
type Ledger interface {
	// ScanLedger calls fn for each entry, newest first, until it returns false or an error. fn may be slow.
	ScanLedger(ctx context.Context, fn func(ca.LedgerEntry) (more bool, err error)) error
	// ScanLiving does so for those that end after a moment.
	ScanLiving(ctx context.Context, at time.Time, fn func(ca.LedgerEntry) (more bool, err error)) error
}

// Decisions is the memory of what was decided lately. Both finders return at most n, newest first.
type Decisions interface {
	ByID(id string, n int) []registration.Decision
	ByPod(namespace, name string, n int) []registration.Decision
	// Since is the time of the oldest decision that is certain to be remembered; zero when none was forgotten yet.
	Since() time.Time
}

// Orders is what operators have ordered. Changes are durable when they return.
type Orders interface {
	Deny(ctx context.Context, d ca.Denial) (ca.Denial, error)
	// Allow reports whether there was a denial.
	Allow(ctx context.Context, id string) (bool, error)
	Renew(ctx context.Context, r ca.RenewOrder) error
	// Get returns all that stands; it must not be changed.
	Get() (*registration.Standing, <-chan struct{})
}

// Policy is the policy in force.
type Policy interface {
	Read(ctx context.Context, in policy.Input) ([]policy.Reading, policy.Decision, error)
}

// Attestor proves tokens of one cluster, as it does for requests.
type Attestor interface {
	Attest(ctx context.Context, token attestor.Token, audience string) (attestor.Evidence, error)
}

var (
	_ Decisions = (*registration.Ring)(nil)
	_ Orders    = (*registration.Orders)(nil)
	_ Policy    = (*policy.Policy)(nil)
)

// Config is what a Server is made of; every field but Checks and Now is needed.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// Status describes the CA as it is now. It is called for GetStatus and for Check.
	Status func(ctx context.Context) (*meshcav1.GetStatusResponse, error)
	// Checks are findings beyond those that Findings draws from the status, such as permissions of files.
	Checks    func(ctx context.Context) []*meshcav1.Finding
	Bundle    func() (*spiffebundle.Bundle, <-chan struct{})
	Ledger    Ledger
	Decisions Decisions
	Orders    Orders
	// Policy returns the policy that is in force.
	Policy func() Policy
	// Clusters are the attestors by the cluster's name.
	Clusters map[string]Attestor
	// Connected is how many agents have an open Sync stream.
	Connected func() int
	// Authorities is what operators order about roots and intermediates.
	Authorities Authorities
	// Roots is what operators order about the roots of the trust bundle.
	Roots Roots
	// Agents are all that the CA knows.
	Agents func() []registration.AgentView
	// Backup copies the store as it is at one moment.
	Backup func(ctx context.Context) (Snapshot, error)
	// Continuity is whether the store is the one that agents have followed.
	Continuity Continuity
	// MaxLife is the longest life of any SVID in the ledger: what was issued longer ago has ended.
	MaxLife time.Duration
	// Audit writes the line of a verb that changes something, or failed to.
	Audit func(ctx context.Context, verb, peer string, attrs ...slog.Attr)
	Log   *slog.Logger
	// Now is the clock that rollouts go by: whom they wait for, and what has its end. It is time.Now by default.
	Now func() time.Time
}

// Server answers AdminService. It is safe for concurrent use.
type Server struct {
	meshcav1.UnimplementedAdminServiceServer
	meshcav1.UnimplementedAuthorityServiceServer
	c       Config
	started time.Time
	// backingUp has the one place of a backup that is under way.
	backingUp chan struct{}
	// backupTime is maxBackupTime.
	backupTime time.Duration
}

var _ meshcav1.AdminServiceServer = (*Server)(nil)

// New checks that the configuration is complete.
func New(c Config) (*Server, error) {
	switch {
	case c.TrustDomain.IsZero():
		return nil, errors.New("admin: no trust domain")
	case c.Status == nil || c.Bundle == nil || c.Ledger == nil || c.Decisions == nil || c.Orders == nil || c.Policy == nil,
		c.Connected == nil, c.Authorities == nil || c.Roots == nil || c.Agents == nil, c.Backup == nil || c.Continuity == nil, c.Audit == nil, c.Log == nil, len(c.Clusters) == 0:
		return nil, errors.New("admin: incomplete configuration")
	case c.MaxLife <= 0:
		return nil, errors.New("admin: the longest life of SVIDs is not set")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Server{c: c, started: time.Now(), backingUp: make(chan struct{}, 1), backupTime: maxBackupTime}, nil
}

// GetStatus describes the CA as it is now.
func (s *Server) GetStatus(ctx context.Context, _ *meshcav1.GetStatusRequest) (*meshcav1.GetStatusResponse, error) {
	answer, err := s.c.Status(ctx)
	if err == nil {
		answer.Rollout, answer.Rollback = s.rollout(), rollback(s.c.Continuity.Loss())
	}
	return answer, err
}

// GetBundle returns the trust bundle in SPIFFE JSON, with its sequence.
func (s *Server) GetBundle(context.Context, *meshcav1.GetBundleRequest) (*meshcav1.GetBundleResponse, error) {
	bundle, _ := s.c.Bundle()
	if bundle == nil {
		return nil, errors.New("the CA has no trust bundle yet")
	}
	encoded, err := bundle.Marshal()
	if err != nil {
		return nil, err
	}
	return &meshcav1.GetBundleResponse{Bundle: encoded}, nil
}

// Check returns what Findings sees in the status, candidates for a new root, and what the configuration's own checks found.
func (s *Server) Check(ctx context.Context, _ *meshcav1.CheckRequest) (*meshcav1.CheckResponse, error) {
	status, err := s.GetStatus(ctx, nil)
	if err != nil {
		return nil, err
	}
	found := Findings(status, time.Now())
	switch view, err := s.c.Authorities.View(ctx); {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil: // a check tells what is wrong, also where it cannot tell all
		found = append(found, &meshcav1.Finding{Subject: "ledger", Level: levelError, Detail: err.Error(), Hint: refusal.StoreUnavailable.Do()})
	default:
		found = append(found, rootFindings(view)...)
	}
	if s.c.Checks != nil {
		found = append(found, s.c.Checks(ctx)...)
	}
	return &meshcav1.CheckResponse{Findings: found}, nil
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
