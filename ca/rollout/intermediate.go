package rollout

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// RotateIntermediate replaces the intermediates at once. With tainted, all that was issued is renewed, spread over it, as
// soon as one that signs is replaced, whatever becomes of others; where one is replaced later only, by this process or
// another one, all is renewed then. It returns until when certificates of the old ones would still be trusted, had their
// keys been stolen, also where it fails.
func (o *Operator) RotateIntermediate(ctx context.Context, tainted time.Duration) (until time.Time, err error) {
	all, _ := o.roots.c.Authority.Lines()
	signs := o.roots.c.Authority.Assignment().Signs
	lines := o.replaceable()
	for _, l := range lines {
		if end := l.Status().NotAfter; end.After(until) {
			until = end
		}
	}
	var failed []error
	var noted error
	if tainted > 0 {
		if noted = o.owe(ctx, lines, tainted); noted != nil {
			failed = append(failed, fmt.Errorf("what was ordered could not be kept, so what is not done now wants the command again: %w", noted))
		}
		for _, l := range all {
			if err := l.Forget(); err != nil { // also if nothing replaces it now, a restart must not bring it back
				failed = append(failed, fmt.Errorf("the intermediate below the root %s stays on record, and comes back if the CA starts again before it is replaced: %w", l.Root().ID, err))
			}
		}
	}
	// gofail: var intermediatesForgotten struct{}
	replaced := false
	for i, err := range replace(ctx, lines) {
		root := lines[i].Root().ID
		if err != nil {
			failed = append(failed, unreplaced(root, tainted > 0 && noted == nil && signs(root), err))
		}
		replaced = replaced || err == nil && signs(root)
	}
	// gofail: var intermediatesReplaced struct{}
	if tainted > 0 && replaced {
		// Also where the caller's time went by for a line that does not answer.
		if err := o.orderOwed(context.WithoutCancel(ctx), noted != nil, tainted); err != nil {
			failed = append(failed, err)
		} else if len(failed) > 0 {
			failed = append(failed, errors.New("what is replaced signs already, and all that was issued is ordered to be renewed"))
		}
	}
	return until, errors.Join(failed...)
}

// replaceable are the lines whose intermediates RotateIntermediate replaces. A root that is to sign and waits for its first
// one has none that could be.
func (o *Operator) replaceable() []*ca.Line {
	all, _ := o.roots.c.Authority.Lines()
	signs := o.roots.c.Authority.Assignment().Signs
	return slices.DeleteFunc(slices.Clone(all), func(l *ca.Line) bool { return !signs(l.Root().ID) && len(l.Status().Chain) == 0 })
}

// IntermediatePlan is what RotateIntermediate would do below one root.
type IntermediatePlan struct {
	// Line is how it is now: its root, the issuer that would sign, and the intermediate that would be replaced.
	Line ca.LineStatus
	// NotAfter is when the new one would end, at most; zero where that is not known.
	NotAfter time.Time
	// Fault says why it could not be had now; nil where nothing is seen that hinders. That the upstream signs is seen only
	// when it does.
	Fault error
}

// PlanIntermediates says what RotateIntermediate would do. It asks the upstream for its issuers, and changes nothing.
func (o *Operator) PlanIntermediates(ctx context.Context) []IntermediatePlan {
	lines := o.replaceable()
	var refs []string
	for _, l := range lines {
		refs = append(refs, l.Root().Ref)
	}
	ask, cancel := context.WithTimeout(ctx, viewPatience)
	defer cancel()
	issuers, err := o.roots.issuers(ask, refs...)
	var plans []IntermediatePlan
	for _, l := range lines {
		p := IntermediatePlan{Line: l.Status()}
		i := slices.IndexFunc(issuers, func(x ca.UpstreamIssuer) bool { return x.Ref == p.Line.Root.Ref })
		switch {
		case err != nil:
			p.Fault = fmt.Errorf("the upstream could not be asked for its issuers: %w", err)
		case i < 0:
			p.Fault = fmt.Errorf("the upstream has no issuer %s any more: bring it back. Where the same root was imported again, `certctl ca rotate root --issuer` "+
				"with the reference that it got then goes on with it", p.Line.Root.Ref)
		default:
			p.NotAfter, p.Fault = l.Foresee(issuers[i])
		}
		plans = append(plans, p)
	}
	return plans
}

// unreplaced says of an intermediate that is not replaced what follows; owed: also that what it signed is renewed then.
func unreplaced(root string, owed bool, err error) error {
	switch {
	case refusal.Of(err) == refusal.RootTainted:
		return fmt.Errorf("the intermediate below the root %s is not replaced, and is not while this stands: %w", root, err)
	case owed:
		return fmt.Errorf("the intermediate below the root %s is not replaced, and signs until it is. That is tried again by itself, and all that was issued is "+
			"ordered to be renewed then, also if the CA starts again before: the command is not wanted again for that. It failed with: %w", root, err)
	}
	return fmt.Errorf("the intermediate below the root %s is not replaced, which is tried again by itself: %w", root, err)
}

// replace renews lines, each for itself: one that does not answer keeps no other one waiting.
func replace(ctx context.Context, lines []*ca.Line) []error {
	errs := make([]error, len(lines))
	var renewing sync.WaitGroup
	for i, l := range lines {
		renewing.Go(func() { errs[i] = l.RenewNow(ctx) })
	}
	renewing.Wait()
	return errs
}

// intermediate names the one of a line; empty when there is none.
func intermediate(l *ca.Line) string {
	if chain := l.Status().Chain; len(chain) > 0 {
		return serial.String(chain[0].SerialNumber)
	}
	return ""
}

// owe notes in the journal that all that was issued is to be renewed when these lines, as far as they sign, have other
// intermediates: that can take long where the upstream is away, and neither the caller nor this process may see it.
func (o *Operator) owe(ctx context.Context, lines []*ca.Line, within time.Duration) error {
	signs, now := o.roots.c.Authority.Assignment().Signs, time.Now()
	_, err := o.roller.Change(ctx, func(r rotation.Rollout) (rotation.Rollout, error) {
		for _, l := range lines {
			if id := l.Root().ID; signs(id) {
				r = r.Owe(rotation.Owed{ID: id, Signer: intermediate(l), At: now.UTC(), Within: within})
			}
		}
		return r, nil
	})
	return err
}

// orderOwed orders the renewals that are owed for intermediates that are replaced, or sign no more; one order does for all.
// With always it orders one also where none is.
func (o *Operator) orderOwed(ctx context.Context, always bool, spread time.Duration) error {
	o.ordering.Lock()
	defer o.ordering.Unlock()
	r, err := o.roller.Record(ctx)
	if err != nil && !always {
		return err
	}
	now := map[string]string{}
	lines, _ := o.roots.c.Authority.Lines()
	for _, l := range lines {
		now[l.Root().ID] = intermediate(l)
	}
	mark := ""
	var due []rotation.Owed
	for _, x := range r.Owed {
		if signer, is := now[x.ID]; !is || signer != "" && signer != x.Signer {
			due = append(due, x)
			spread = min(spread, x.Within)
			mark += fmt.Sprintf("intermediate %s below %s, stolen by the order of %s; ", x.Signer, x.ID, x.At.Format(time.RFC3339Nano))
		}
	}
	if len(due) == 0 && !always {
		return nil
	}
	o.roots.c.Serving()
	if err := o.roots.c.Renewals.RenewAll(ctx, mark, spread); err != nil {
		return fmt.Errorf("the renewal of all that was issued could not be ordered, which is tried again by itself: %w", err)
	}
	if len(due) == 0 {
		return nil
	}
	_, err = o.roller.Change(ctx, func(r rotation.Rollout) (rotation.Rollout, error) { return r.Settled(due), nil })
	return err
}

// owedEvery is how often it is looked whether what renewals wait for has come.
const owedEvery = time.Second

// Run orders the renewals that are owed when what they wait for has come, until ctx ends.
func (o *Operator) Run(ctx context.Context) {
	look := time.NewTicker(owedEvery)
	defer look.Stop()
	for {
		if len(o.Standing().Rollout.Owed) > 0 {
			_ = o.orderOwed(ctx, false, ca.MaxTTL) // the store is away: it is tried again
		}
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
	}
}
