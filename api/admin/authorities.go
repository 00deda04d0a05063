package admin

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"math"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// Authorities is what operators order about the CA's authorities.
type Authorities interface {
	View(ctx context.Context) (rollout.View, error)
	Rotate(ctx context.Context, o rollout.RotateOptions) (rotation.Rollout, error)
	Continue(ctx context.Context, despite []string) (rotation.Rollout, error)
	Abort(ctx context.Context, by string) (rotation.Rollout, error)
	// RotateIntermediate returns until when what the old one signed, or its key would sign, is trusted.
	RotateIntermediate(ctx context.Context, tainted time.Duration) (time.Time, error)
}

// Roots is what operators order about the trust bundle's roots, and how the rollout of one stands.
type Roots interface {
	// Standing is cheap: it asks nobody.
	Standing() rotation.Standing
	// Repoint has a root that signs signed for by this issuer of the upstream, if that is another one of that very root.
	Repoint(ctx context.Context, issuer string, dryRun bool) (to ca.Root, moved bool, err error)
	// TrustRoots takes roots in, all or none, and returns the IDs of those that are new.
	TrustRoots(ctx context.Context, roots []*x509.Certificate) (added []string, err error)
	// RemoveRoot takes one out that nothing needs.
	RemoveRoot(ctx context.Context, id string) error
	// PlanIntermediates is what RotateIntermediate would do.
	PlanIntermediates(ctx context.Context) []rollout.IntermediatePlan
}

var (
	_ Authorities = (*rollout.Operator)(nil)
	_ Roots       = (*rollout.Operator)(nil)
)

// maxDespite bounds how many confirmations one call gives up.
const maxDespite = 10_000

// GetAuthorities describes roots, candidates, the rollout and who has confirmed what.
func (s *Server) GetAuthorities(ctx context.Context, _ *meshcav1.GetAuthoritiesRequest) (*meshcav1.GetAuthoritiesResponse, error) {
	v, err := s.c.Authorities.View(ctx)
	if err != nil {
		return nil, err
	}
	answer := &meshcav1.GetAuthoritiesResponse{BundleSequence: s.sequence(), Agents: s.confirmations(), IssuesUntil: stamp(v.IssuesUntil)}
	for _, r := range v.Readers {
		answer.Readers = append(answer.Readers, &meshcav1.ReaderConfirmation{Name: r.Name, Refresh: durationpb.New(r.Refresh), Until: stamp(r.Until), Fault: r.Fault})
	}
	if v.UpstreamErr != nil {
		answer.UpstreamError = v.UpstreamErr.Error()
	}
	for _, r := range v.Roots {
		answer.Roots = append(answer.Roots, encodeRoot(r))
	}
	answer.IssuersLeftOut = uint32(v.LeftOut)
	for _, c := range v.Candidates {
		out := &meshcav1.IssuerCandidate{Ref: c.Ref, Name: c.Name, NotAfter: stamp(c.NotAfter)}
		if c.Root != nil {
			out.Root = ca.RootID(c.Root)
		}
		if c.Fault != nil {
			out.Fault = c.Fault.Error()
		}
		answer.Candidates = append(answer.Candidates, out)
	}
	if v.Standing.Rollout.Old.ID != "" { // the first start leaves an entry that replaced nothing
		answer.Rollout = encodeStanding(v.Standing)
	}
	return answer, nil
}

// sequence is the trust bundle's.
func (s *Server) sequence() uint64 {
	bundle, _ := s.c.Bundle()
	if bundle == nil {
		return 0
	}
	n, _ := bundle.SequenceNumber()
	return n
}

// confirmations are the agents that count.
func (s *Server) confirmations() []*meshcav1.AgentConfirmation {
	now := s.c.Now()
	var all []*meshcav1.AgentConfirmation
	for _, a := range s.c.Agents() {
		until := a.CountsUntil()
		if !now.Before(until) {
			continue
		}
		all = append(all, &meshcav1.AgentConfirmation{
			SpiffeId: a.ID, AckedBundleSequence: a.AckedSequence, Connected: a.Connected, LastSeen: stamp(a.LastSeen), CountsUntil: stamp(until),
			Rejections: a.Rejections,
		})
	}
	return all
}

func encodeRoot(r rollout.RootView) *meshcav1.RootStatus {
	out := &meshcav1.RootStatus{
		Id: r.ID, Subject: r.Certificate.Subject.String(), NotBefore: stamp(r.Certificate.NotBefore), NotAfter: stamp(r.Certificate.NotAfter),
		State: r.State, Issuer: r.Issuer, LiveSvids: uint64(r.Live), LastEnd: stamp(r.LastEnd), Certificate: r.Certificate.Raw,
		Tainted: stamp(r.Tainted),
	}
	if r.Line != nil {
		out.Intermediate = encodeLine(*r.Line)
	}
	return out
}

func encodeLine(l ca.LineStatus) *meshcav1.AuthorityIntermediate {
	out := &meshcav1.AuthorityIntermediate{NotAfter: stamp(l.NotAfter), LastTry: stamp(l.LastTry)}
	if len(l.Chain) > 0 {
		out.Subject = l.Chain[0].Subject.String()
		out.Serial = serial.String(l.Chain[0].SerialNumber)
	}
	if l.LastError != nil {
		out.LastError = l.LastError.Error()
	}
	return out
}

func encodeRollout(r rotation.Rollout) *meshcav1.RolloutStatus {
	out := &meshcav1.RolloutStatus{
		OldRoot: r.Old.ID, NewRoot: r.New.ID, Step: string(r.Step), Entered: stamp(r.Entered), Begun: stamp(r.Begun), By: r.By,
		NewShare: uint32(r.NewShare), Canary: uint32(r.Canary), BundleSequence: r.Set, Despite: r.Despite, Aborted: r.Aborted,
		AbortedBy: r.AbortedBy, LastEnd: stamp(r.LastEnd), Active: r.Active(), Spared: r.Spares(),
	}
	if r.Within > 0 {
		out.Within = durationpb.New(r.Within)
	}
	for _, b := range r.Behind {
		out.Behind = append(out.Behind, b.ID)
	}
	for _, x := range r.Passed {
		out.Passed = append(out.Passed, encodePassage(r, x))
	}
	return out
}

func encodePassage(r rotation.Rollout, x rotation.Passage) *meshcav1.RolloutPassage {
	out := &meshcav1.RolloutPassage{Step: string(x.Step), Entered: stamp(x.Entered), Aborted: r.Aborted && !x.Entered.Before(r.AbortedAt)}
	if x.Had == nil {
		return out
	}
	out.Aborted = x.Had.Aborted
	out.Had = &meshcav1.RolloutPassage_Had{
		AbortedBy: x.Had.AbortedBy, NewShare: uint32(x.Had.NewShare), BundleSequence: x.Had.Set, GivenUp: x.Had.GivenUp, LastEnd: stamp(x.Had.LastEnd), Spared: x.Had.Spared,
	}
	if x.Had.Within > 0 {
		out.Had.Within = durationpb.New(x.Had.Within)
	}
	return out
}

func encodeStanding(s rotation.Standing) *meshcav1.RolloutStatus {
	out := encodeRollout(s.Rollout)
	out.Waits, out.Until = s.Waits, stamp(s.Until)
	if s.Err != nil {
		out.Error = s.Err.Error()
	}
	return out
}

// checkRotate reads the bound of an emergency, and checks the rest of the request.
func checkRotate(r *meshcav1.RotateRootRequest) (within time.Duration, err error) {
	if within, err = positive(r.GetTaintedWithin(), "tainted_within"); err != nil {
		return 0, err
	}
	switch {
	case r.GetShare() > 99:
		return 0, refusal.New(refusal.RequestMalformed, "a share of %d %%: it must lie between 1 and 99", r.GetShare()).On("share")
	case len(r.GetIssuer()) > maxWhy:
		return 0, refusal.New(refusal.RequestMalformed, "an issuer's name of %d bytes", len(r.GetIssuer())).On("issuer")
	case len(r.GetTaintedRoot()) > maxWhy:
		return 0, refusal.New(refusal.RequestMalformed, "a root's ID of %d bytes: it is the SHA-256 of its certificate, in hex", len(r.GetTaintedRoot())).On("tainted_root")
	case r.GetTaintedRoot() != "" && within == 0:
		return 0, refusal.New(refusal.RequestMalformed, "a root is tainted within a bound").On("tainted_within")
	}
	return within, nil
}

// RotateRoot begins to replace the root that signs, or does without one that is tainted.
func (s *Server) RotateRoot(ctx context.Context, r *meshcav1.RotateRootRequest) (*meshcav1.RotateRootResponse, error) {
	within, err := checkRotate(r)
	if err != nil {
		return nil, err
	}
	by := peerName(ctx)
	if r.GetIssuer() != "" && within == 0 && r.GetShare() == 0 {
		if answer, err := s.repoint(ctx, r, by); answer != nil || err != nil {
			return answer, err
		}
	}
	begun, err := s.c.Authorities.Rotate(ctx, rollout.RotateOptions{
		By: by, Issuer: r.GetIssuer(), Canary: int(r.GetShare()), Within: within, Tainted: r.GetTaintedRoot(), DryRun: r.GetDryRun(),
	})
	tainted := r.GetTaintedRoot()
	if within > 0 {
		tainted = cmp.Or(tainted, begun.Goes().ID)
	}
	what := []slog.Attr{slog.String("old", begun.Old.ID), slog.String("new", begun.New.ID), slog.String("issuer", begun.New.Ref)}
	switch {
	case r.GetDryRun():
	case within > 0:
		s.audit(ctx, "ca taint root", by, err, append(what, slog.String("tainted", tainted), slog.String("within", within.String()))...)
	default:
		s.audit(ctx, "ca rotate root", by, err, append(what, slog.Int("share", begun.Canary), slog.String("within", within.String()))...)
	}
	if err != nil {
		return nil, err
	}
	now := s.c.Now()
	return &meshcav1.RotateRootResponse{Rollout: encodeRollout(begun), Plan: plan(begun, tainted, now), AtOnce: atOnce(begun, tainted, now)}, nil
}

// repoint has the same root signed for by another issuer; nil: the one that was named is of another root.
func (s *Server) repoint(ctx context.Context, r *meshcav1.RotateRootRequest, by string) (*meshcav1.RotateRootResponse, error) {
	to, moved, err := s.c.Roots.Repoint(ctx, r.GetIssuer(), r.GetDryRun())
	if moved && !r.GetDryRun() {
		s.audit(ctx, "ca repoint root", by, err, slog.String("root", to.ID), slog.String("issuer", to.Ref))
	}
	if err != nil || !moved {
		return nil, err
	}
	return &meshcav1.RotateRootResponse{Rollout: encodeStanding(s.c.Roots.Standing()), Repointed: to.Ref, Plan: []string{
		fmt.Sprintf("the root %.12s stays: the issuer %s of the upstream has it too, and signs the intermediates below it from now on", to.ID, to.Ref),
		"nobody has to confirm anything, and nothing leaves the trust bundle",
	}}, nil
}

// ContinueRollout ends the canary, or gives confirmations up.
func (s *Server) ContinueRollout(ctx context.Context, r *meshcav1.ContinueRolloutRequest) (*meshcav1.ContinueRolloutResponse, error) {
	if len(r.GetDespite()) > maxDespite {
		return nil, refusal.New(refusal.RequestMalformed, "%d names, at most %d are taken", len(r.GetDespite()), maxDespite).On("despite")
	}
	now, err := s.c.Authorities.Continue(ctx, r.GetDespite())
	s.audit(ctx, "ca continue", peerName(ctx), err, slog.String("new", now.New.ID), slog.Any("despite", r.GetDespite()))
	if err != nil {
		return nil, err
	}
	return &meshcav1.ContinueRolloutResponse{Rollout: encodeRollout(now)}, nil
}

// AbortRollout goes back.
func (s *Server) AbortRollout(ctx context.Context, _ *meshcav1.AbortRolloutRequest) (*meshcav1.AbortRolloutResponse, error) {
	by := peerName(ctx)
	now, err := s.c.Authorities.Abort(ctx, by)
	s.audit(ctx, "ca abort", by, err, slog.String("old", now.Old.ID), slog.String("new", now.New.ID))
	if err != nil {
		return nil, err
	}
	return &meshcav1.AbortRolloutResponse{Rollout: encodeRollout(now)}, nil
}

// RotateIntermediate replaces the intermediates.
func (s *Server) RotateIntermediate(ctx context.Context, r *meshcav1.RotateIntermediateRequest) (*meshcav1.RotateIntermediateResponse, error) {
	within, err := positive(r.GetTaintedWithin(), "tainted_within")
	if err != nil {
		return nil, err
	}
	trying, cancel := tellingTime(ctx)
	defer cancel()
	until, err := s.c.Authorities.RotateIntermediate(trying, within)
	s.audit(ctx, "ca rotate intermediate", peerName(ctx), err, slog.String("taintedWithin", within.String()))
	if err != nil {
		return nil, notReplaced(err, within > 0, until)
	}
	answer := &meshcav1.RotateIntermediateResponse{TrustedUntil: stamp(until)}
	v, err := s.c.Authorities.View(ctx)
	if err != nil {
		return nil, err
	}
	for _, root := range v.Roots {
		if root.Line != nil && len(root.Line.Chain) > 0 {
			answer.NewSerials = append(answer.NewSerials, serial.String(root.Line.Chain[0].SerialNumber))
		}
	}
	return answer, nil
}

// PlanIntermediates says what RotateIntermediate would do.
func (s *Server) PlanIntermediates(ctx context.Context, _ *meshcav1.PlanIntermediatesRequest) (*meshcav1.PlanIntermediatesResponse, error) {
	answer := &meshcav1.PlanIntermediatesResponse{}
	for _, x := range s.c.Roots.PlanIntermediates(ctx) {
		out := &meshcav1.IntermediatePlan{Root: x.Line.Root.ID, Issuer: x.Line.Root.Ref, NotAfter: stamp(x.NotAfter)}
		if len(x.Line.Chain) > 0 {
			out.Replaces = encodeLine(x.Line)
		}
		if x.Fault != nil {
			out.Fault = x.Fault.Error()
		}
		answer.Plans = append(answer.Plans, out)
	}
	return answer, nil
}

// tellingTime ends somewhat before the call does: what fails because an upstream does not answer is to be told, too.
func tellingTime(ctx context.Context) (context.Context, context.CancelFunc) {
	end, bounded := ctx.Deadline()
	if !bounded {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, end.Add(-min(2*time.Second, time.Until(end)/4)))
}

// notReplaced tells the whole of why intermediates were not replaced, and what follows: of a refusal its own detail alone
// would travel. Of stolen ones it says first until when they are trusted.
func notReplaced(err error, stolen bool, until time.Time) error {
	text := err.Error()
	if stolen && !until.IsZero() {
		text = fmt.Sprintf("whoever has a stolen key can make certificates that are accepted until %s, only `certctl ca taint root` cuts that off; %s", stampText(until), text)
	}
	if e, is := refusal.From(err); is {
		return refusal.New(e.Reason, "%s", text)
	}
	return status.Error(codes.FailedPrecondition, text)
}

// positive reads a bound that may be unset: 0.
func positive(d *durationpb.Duration, field string) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	if d.CheckValid() != nil || d.AsDuration() <= 0 || d.AsDuration() > MaxSpread || d.GetSeconds() > math.MaxInt32 {
		return 0, refusal.New(refusal.RequestMalformed, "a bound must lie between 0 and %s", MaxSpread).On(field)
	}
	return d.AsDuration(), nil
}
