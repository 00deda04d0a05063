package rollout

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// View is all that is known of authorities.
type View struct {
	Roots []RootView
	// Candidates are the upstream's issuers below roots that are not in the bundle.
	Candidates []ca.UpstreamIssuer
	// LeftOut is how many more issuers the upstream has, which it does not list unless they are named.
	LeftOut int
	// UpstreamErr is why the upstream could not be asked.
	UpstreamErr error
	Standing    rotation.Standing
	// IssuesUntil is until when the CA can issue if the upstream signs no more; zero: it cannot now.
	IssuesUntil time.Time
	// Readers are those that a published root waits for, or waited for, by the clock.
	Readers []ReaderView
}

// RootView is one root of the bundle.
type RootView struct {
	Certificate *x509.Certificate
	ID          string
	// State is what it does now, in a word or two.
	State string
	// Issuer is the upstream's reference; empty when it has none.
	Issuer string
	// Line is the intermediate below it, nil when there is none.
	Line *ca.LineStatus
	// Live are SVIDs under it that have not ended; LastEnd is the end of the last one.
	Live    int
	LastEnd time.Time
	// Tainted is when an operator said that it is not to be trusted; zero: nobody did.
	Tainted time.Time
	// Certified says which tainted key it has certified: whoever stole that one signs below this root. Nil: none that is known.
	Certified error
}

// viewPatience bounds how long a view waits for the upstream: who asks how things are wants to know that it does not
// answer.
const viewPatience = 5 * time.Second

// View describes everything as it is now.
func (o *Operator) View(ctx context.Context) (View, error) {
	standing, _ := o.roller.Standing()
	v := View{Standing: standing, IssuesUntil: o.roots.c.Authority.IssuesUntil(), Readers: o.readers(standing.Rollout)}
	bundle, _ := o.roots.c.Trust.Bundle()
	index := map[string]*RootView{}
	for _, c := range bundle.X509Authorities() {
		id := ca.RootID(c)
		view := RootView{Certificate: c, ID: id, State: o.state(standing.Rollout, id)}
		if t := taintOf(standing.Rollout, c); t != nil {
			view.Tainted = t.At
		}
		v.Roots = append(v.Roots, view)
	}
	for i := range v.Roots {
		index[v.Roots[i].ID] = &v.Roots[i]
	}
	asked := map[string]string{} // of several issuers below a root the one is shown that is asked to sign
	for _, root := range []ca.Root{o.roots.c.Authority.Assignment().Root, o.roots.c.Authority.Assignment().Successor} {
		asked[root.ID] = root.Ref
	}
	seen := o.look(ctx, standing.Rollout, slices.Collect(maps.Values(asked)))
	v.UpstreamErr, v.LeftOut = seen.err, seen.leftOut
	for _, i := range seen.issuers {
		if i.Root == nil || index[ca.RootID(i.Root)] == nil {
			if i.Fault == nil {
				i.Fault = barred(standing.Rollout, i)
			}
			v.Candidates = append(v.Candidates, i)
			continue
		}
		r := index[ca.RootID(i.Root)]
		if r.Issuer == "" || i.Ref == asked[r.ID] {
			r.Issuer = i.Ref
		}
		if err := Barred(standing.Rollout, i.Path); err != nil {
			r.Certified = err
		}
	}
	lines, _ := o.roots.c.Authority.Lines()
	for _, l := range lines {
		r := index[l.Root().ID]
		if r == nil {
			continue
		}
		st := l.Status()
		if len(st.Chain) > 1 {
			if err := Barred(standing.Rollout, st.Chain[1:]); err != nil { // no other one will come that way, and the thief needs none
				r.Certified = err
				st.LastError = fmt.Errorf("%w: whoever has that key signs below this root, `certctl ca taint root %.12s` ends that", err, r.ID)
			}
		}
		r.Line = &st
	}
	return v, o.countLive(ctx, index)
}

// viewKept is how long the views of one step of a rollout share what the upstream said: who watches a rollout looks every
// few seconds, and each look is a call for each issuer.
const viewKept = 30 * time.Second

// sighting is what the upstream said, when, and in which step of which rollout.
type sighting struct {
	issuers []ca.UpstreamIssuer
	leftOut int
	err     error
	at      time.Time
	begun   time.Time
	step    rotation.Step
}

// look asks the upstream for its issuers, or tells what it said a moment ago.
func (o *Operator) look(ctx context.Context, r rotation.Rollout, named []string) *sighting {
	last := o.seen.Load()
	if last != nil && r.Active() && last.begun.Equal(r.Begun) && last.step == r.Step && time.Since(last.at) < viewKept {
		return last
	}
	ask, cancel := context.WithTimeout(ctx, viewPatience)
	defer cancel()
	now := &sighting{begun: r.Begun, step: r.Step}
	now.issuers, now.err = o.roots.issuers(ask, named...)
	if u, ok := o.roots.c.Upstream.(Includer); ok {
		now.leftOut = u.LeftOut()
	}
	now.at = time.Now()
	if ctx.Err() == nil { // who does not wait for the answer must not have others see that
		o.seen.Store(now)
	}
	return now
}

func (o *Operator) countLive(ctx context.Context, index map[string]*RootView) error {
	return o.roots.c.Ledger.ScanLiving(ctx, o.roots.c.Now(), func(e ca.LedgerEntry) (bool, error) {
		if r := index[hex.EncodeToString(e.Root)]; r != nil {
			r.Live++
			if e.NotAfter.After(r.LastEnd) {
				r.LastEnd = e.NotAfter
			}
		}
		return true, nil
	})
}

// state says in a word or two what a root does now.
func (o *Operator) state(r rotation.Rollout, id string) string {
	a := o.roots.c.Authority.Assignment()
	switch {
	case a.Share == 0 && a.Root.ID == id:
		return "signing"
	case a.Root.ID == id:
		return fmt.Sprintf("signing %d %%", 100-a.Share)
	case a.Share > 0 && a.Successor.ID == id:
		return fmt.Sprintf("signing %d %%", a.Share)
	case r.Active() && (id == r.Goes().ID || id == r.Stays().ID):
		return string(r.Step)
	case slices.ContainsFunc(r.Behind, func(b rotation.Behind) bool { return b.ID == id }):
		return string(rotation.StepLeaving)
	}
	return "trusted"
}
