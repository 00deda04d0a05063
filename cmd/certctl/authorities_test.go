package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// roots are a CA's authorities for scripts: the real machine of rollouts, on a journal and a trust bundle in memory. It
// moves a step at each look, so that whoever watches sees each of them.
type roots struct {
	f      *facts
	roller *rotation.Roller
	reader []rollout.Reader
	agents []registration.AgentView
	// gives is how many looks the machine waits for those who do not confirm; -1: for ever.
	gives int
	// upstreamErr is why the upstream does not answer.
	upstreamErr error
	// loss is what agents have shown to be lost.
	loss *ca.Loss

	mu      sync.Mutex // guards what follows
	bundle  *spiffebundle.Bundle
	record  rotation.Rollout
	version uint64
}

const agentID = "spiffe://mesh.example/meshca/agent/prod/"

// agent is one that counts for three hours more.
func (f *facts) agent(node string, acked uint64, connected bool, rejections ...string) registration.AgentView {
	return registration.AgentView{
		AgentRecord: ca.AgentRecord{ID: agentID + node, AckedSequence: acked, LastSeen: f.at(-2 * time.Hour), HoldsUntil: f.at(3 * time.Hour)},
		Connected:   connected, Rejections: rejections,
	}
}

func (f *facts) roots(gives int, agents ...registration.AgentView) *roots {
	x := &roots{f: f, gives: gives, agents: agents, bundle: f.bundle.Clone()}
	x.roller = rotation.NewRoller(rotation.RollerOptions{Journal: x, Authorities: x})
	return x
}

// rolling has begun a rollout that waits for two agents and a reader.
func (f *facts) rolling() (*roots, error) {
	x := f.roots(-1, f.agent("n1", 0, true), f.agent("n2", 3, false), f.agent("n3", 0, true, "/run/w/cart.sock: Envoy said \x1b[2J no"))
	x.reader = []rollout.Reader{{Name: "configmap", Refresh: 2*time.Hour + 30*time.Second}} // see facts.at
	if _, err := x.Rotate(context.Background(), rollout.RotateOptions{By: "uid 0", Canary: 5}); err != nil {
		return nil, err
	}
	for x.roller.Move(context.Background()) {
	}
	return x, nil
}

func (x *roots) Bundle() (*spiffebundle.Bundle, <-chan struct{}) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.bundle.Clone(), nil
}

// Agents that are connected and reject nothing have the newest bundle.
func (x *roots) Agents() []registration.AgentView {
	bundle, _ := x.Bundle()
	n, _ := bundle.SequenceNumber()
	all := slices.Clone(x.agents)
	for i, a := range all {
		if a.Connected && len(a.Rejections) == 0 {
			all[i].AckedSequence = n
		}
	}
	return all
}

func (x *roots) change(edit func(*spiffebundle.Bundle)) {
	x.mu.Lock()
	defer x.mu.Unlock()
	next := x.bundle.Clone()
	edit(next)
	if next.Equal(x.bundle) {
		return
	}
	n, _ := x.bundle.SequenceNumber()
	next.SetSequenceNumber(n + 1)
	x.bundle = next
}

func (x *roots) Standing() rotation.Standing {
	s, _ := x.roller.Standing()
	return s
}

func (x *roots) View(ctx context.Context) (rollout.View, error) {
	v := rollout.View{Standing: x.Standing(), UpstreamErr: x.upstreamErr, IssuesUntil: x.f.at(70 * time.Hour)}
	r := v.Standing.Rollout
	if r.Step == rotation.StepPublished {
		for _, reader := range x.reader {
			v.Readers = append(v.Readers, rollout.ReaderView{Reader: reader, Until: r.Entered.Add(reader.Refresh)})
		}
	}
	bundle, _ := x.Bundle()
	signs := x.signs(r)
	for _, c := range bundle.X509Authorities() {
		view := rollout.RootView{Certificate: c, ID: ca.RootID(c), State: "trusted"}
		if t, tainted := r.Tainted(view.ID); tainted {
			view.Tainted = t.At
		}
		switch {
		case view.ID == signs:
			view.State, view.Live, view.LastEnd = "signing", 1234, x.f.at(5*time.Hour)
			if r.NewShare > 0 && r.NewShare < 100 {
				view.State = fmt.Sprintf("signing %d %%", 100-r.NewShare)
			}
			view.Line = &ca.LineStatus{Chain: x.f.svid.Certificates[1:], NotAfter: x.f.at(71 * time.Hour)}
			view.Issuer = "8a1f-main"
			if x.upstreamErr != nil {
				view.Line.LastError = errors.New("the upstream did not sign an intermediate: sealed")
			}
		case r.Step == rotation.StepCanary && view.ID == r.New.ID:
			view.State = fmt.Sprintf("signing %d %%", r.NewShare)
		case r.Active() && (view.ID == r.New.ID || view.ID == r.Old.ID):
			view.State = string(r.Step)
		}
		v.Roots = append(v.Roots, view)
	}
	if x.upstreamErr == nil {
		if !bundle.HasX509Authority(x.f.stranger.cert) {
			v.Candidates = append(v.Candidates, ca.UpstreamIssuer{Ref: "77d2-next", Name: "next root", Root: x.f.stranger.cert, NotAfter: x.f.stranger.cert.NotAfter})
		}
		if !bundle.HasX509Authority(x.f.authority.cert) {
			v.Candidates = append(v.Candidates, ca.UpstreamIssuer{Ref: "8a1f-main", Name: "main", Root: x.f.authority.cert, NotAfter: x.f.authority.cert.NotAfter})
		}
		for i, c := range v.Candidates {
			v.Candidates[i].Fault = rollout.Tainted(r, c.Root)
		}
		v.Candidates = append(v.Candidates, ca.UpstreamIssuer{Ref: "90aa-old", Name: "old root", Fault: errors.New("it has no key")})
	}
	x.roller.Move(ctx) // the next look finds the next step
	return v, nil
}

// signs is the root that signs for most.
func (x *roots) signs(r rotation.Rollout) string {
	switch {
	case r.Step == "":
		return ca.RootID(x.f.authority.cert)
	case r.NewShare >= 50:
		return r.New.ID
	}
	return r.Old.ID
}

func (x *roots) Rotate(ctx context.Context, o rollout.RotateOptions) (rotation.Rollout, error) {
	if o.Issuer != "" && o.Issuer != "77d2-next" && o.Issuer != "next root" {
		return rotation.Rollout{}, fmt.Errorf("0 of the upstream's issuers fit; name one of them by its reference: 77d2-next (next root)")
	}
	begin := func(before rotation.Rollout) (rotation.Rollout, error) {
		return rotation.Begin(before, rotation.Party{ID: x.signs(before)}, rotation.Party{ID: ca.RootID(x.f.stranger.cert), Ref: "77d2-next"},
			rotation.BeginOptions{By: o.By, Canary: o.Canary}, time.Now())
	}
	if o.Within > 0 {
		record := x.Standing().Rollout
		signs := rotation.Party{ID: x.signs(record)}
		if o.Tainted == "" {
			o.Tainted = signs.ID
		}
		begin = func(before rotation.Rollout) (rotation.Rollout, error) {
			return before.Taint(rotation.Party{ID: o.Tainted}, rotation.Emergency{By: o.By, Within: o.Within, First: signs,
				Successor: rotation.Party{ID: ca.RootID(x.f.stranger.cert), Ref: "77d2-next"}}, time.Now())
		}
	}
	if o.DryRun {
		return begin(x.Standing().Rollout)
	}
	return x.roller.Change(ctx, begin)
}

func (x *roots) Continue(ctx context.Context, despite []string) (rotation.Rollout, error) {
	defer x.roller.Move(ctx) // as the real one, which is woken
	return x.roller.Change(ctx, func(r rotation.Rollout) (rotation.Rollout, error) {
		switch {
		case !r.Active():
			return r, rotation.ErrNotRolling
		case len(despite) == 0:
			return r.Continue(time.Now())
		}
		for _, name := range despite {
			if !slices.Contains(x.Standing().Waits, name) {
				return r, fmt.Errorf("%q is not waited for", name)
			}
		}
		return r.GiveUp(despite...)
	})
}

func (x *roots) Abort(ctx context.Context, by string) (rotation.Rollout, error) {
	return x.roller.Change(ctx, func(r rotation.Rollout) (rotation.Rollout, error) { return r.Abort(by, time.Now()) })
}

func (x *roots) RotateIntermediate(context.Context, time.Duration) (time.Time, error) {
	if x.upstreamErr != nil {
		return x.f.at(71 * time.Hour), x.upstreamErr
	}
	return x.f.at(71 * time.Hour), nil
}

// PlanIntermediates has one line, below the root that signs.
func (x *roots) PlanIntermediates(ctx context.Context) []rollout.IntermediatePlan {
	v, _ := x.View(ctx)
	for _, r := range v.Roots {
		if r.Line != nil {
			r.Line.Root = ca.Root{ID: r.ID, Ref: r.Issuer}
			p := rollout.IntermediatePlan{Line: *r.Line, NotAfter: x.f.at(72 * time.Hour)}
			if x.upstreamErr != nil {
				p.NotAfter, p.Fault = time.Time{}, fmt.Errorf("the upstream could not be asked for its issuers: %w", x.upstreamErr)
			}
			return []rollout.IntermediatePlan{p}
		}
	}
	return nil
}

// Repoint knows one issuer more of the root that signs.
func (x *roots) Repoint(_ context.Context, issuer string, _ bool) (ca.Root, bool, error) {
	return ca.Root{ID: x.signs(x.Standing().Rollout), Ref: issuer}, issuer == "55e0-again", nil
}

func (x *roots) TrustRoots(_ context.Context, all []*x509.Certificate) (added []string, err error) {
	for _, c := range all {
		if err := rollout.Tainted(x.Standing().Rollout, c); err != nil {
			return nil, err
		}
		if err := c.CheckSignatureFrom(c); err != nil {
			return nil, fmt.Errorf("%q is no self-signed CA certificate: %w", c.Subject, err)
		}
	}
	x.change(func(b *spiffebundle.Bundle) {
		for _, c := range all {
			if !b.HasX509Authority(c) {
				b.AddX509Authority(c)
				added = append(added, ca.RootID(c))
			}
		}
	})
	return added, nil
}

func (x *roots) RemoveRoot(_ context.Context, id string) error {
	if id == x.signs(x.Standing().Rollout) {
		return errors.New("the root signs: `certctl ca rotate root` replaces it")
	}
	return x.Withdraw(context.Background(), rotation.Party{ID: id})
}

// What follows is the journal, and what a rollout moves.

func (x *roots) Rollout(context.Context) (rotation.Rollout, uint64, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.record, x.version, nil
}

func (x *roots) SwapRollout(_ context.Context, version uint64, next rotation.Rollout) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if version != x.version {
		return rotation.ErrConflict
	}
	x.record, x.version = next, version+1
	return nil
}

func (x *roots) Publish(context.Context, rotation.Party) (uint64, error) {
	x.change(func(b *spiffebundle.Bundle) { b.AddX509Authority(x.f.stranger.cert) })
	bundle, _ := x.Bundle()
	n, _ := bundle.SequenceNumber()
	return n, nil
}

func (x *roots) Unconfirmed(_ context.Context, set uint64, _ time.Time) (names []string, err error) {
	if x.gives == 0 {
		return nil, nil
	}
	x.gives--
	for _, a := range x.Agents() {
		if a.AckedSequence < set {
			names = append(names, a.ID)
		}
	}
	for _, r := range x.reader {
		names = append(names, "reader "+r.Name)
	}
	return names, nil
}

func (x *roots) Prepare(context.Context, rotation.Party) error { return nil }

// Assign finds that what lived under the one that goes has just ended.
func (x *roots) Assign(_ context.Context, r rotation.Rollout) (time.Time, error) {
	if r.Step != rotation.StepSigning {
		return time.Time{}, nil
	}
	return time.Now(), nil
}

func (x *roots) Withdraw(_ context.Context, p rotation.Party) error {
	x.change(func(b *spiffebundle.Bundle) {
		for _, c := range b.X509Authorities() {
			if ca.RootID(c) == p.ID {
				b.RemoveX509Authority(c)
			}
		}
	})
	return nil
}
