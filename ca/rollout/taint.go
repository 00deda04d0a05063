package rollout

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// taint has a root leave the trust bundle within a bound, and never come back. The upstream may take its time to say who can
// follow, and the rollout goes on meanwhile: what the order does is decided once more as it is entered.
func (o *Operator) taint(ctx context.Context, x RotateOptions) (rotation.Rollout, error) {
	record, err := o.roller.Record(ctx)
	if err != nil {
		return rotation.Rollout{}, err
	}
	unnamed := x.Tainted == ""
	if unnamed {
		x.Tainted = o.signs(record).ID
	}
	what, err := o.known(ctx, record, x.Tainted)
	if err != nil {
		return rotation.Rollout{}, err
	}
	var next successor
	command := func(r rotation.Rollout) (rotation.Rollout, error) {
		e := rotation.Emergency{By: x.By, Within: x.Within, First: o.signs(r), Successor: next.Party, Twins: o.twins(what)}
		return r.Taint(what, e, o.roots.c.Now())
	}
	would, err := command(record)
	switch {
	case errors.Is(err, rotation.ErrNeedsSuccessor):
		if next, err = o.choose(ctx, marked(record, what), x); err != nil {
			return rotation.Rollout{}, fmt.Errorf("nothing was changed, for without the root %s nobody could sign: %w", what.ID, err)
		}
		would, err = command(record)
	case err == nil && x.Issuer != "" && !o.names(ctx, x.Issuer, would.Stays()):
		return rotation.Rollout{}, fmt.Errorf("nothing was changed: without the root %s, %s signs, and --issuer names another one: leave that out, or taint %[2]s too",
			what.ID, would.Stays().ID)
	}
	if err != nil || x.DryRun {
		return would, err
	}
	o.changing.Lock()
	defer o.changing.Unlock()
	r, err := o.roller.Change(ctx, func(r rotation.Rollout) (rotation.Rollout, error) {
		done, err := command(r)
		switch {
		case errors.Is(err, rotation.ErrNeedsSuccessor), unnamed && o.signs(r).ID != what.ID:
			return r, rotation.ErrMeanwhile
		case err == nil && x.Issuer != "" && done.Stays().ID != would.Stays().ID:
			return r, rotation.ErrMeanwhile
		case err == nil && !done.Begun.Equal(r.Begun): // it goes to the successor
			err = next.fits(marked(r, what))
		}
		return done, err
	})
	if err == nil && o.leavesAlone(r, what) {
		err = o.roots.c.Renewals.RenewAll(ctx, "", renewalShare(x.Within))
	}
	return r, err
}

// leavesAlone reports whether a root leaves later that has no part in an emergency's rollout: what it has signed is renewed
// before, and no step orders that.
func (o *Operator) leavesAlone(r rotation.Rollout, what rotation.Party) bool {
	return slices.ContainsFunc(r.Behind, func(b rotation.Behind) bool {
		return (!r.Active() || r.Within == 0) && (b.ID == what.ID || what.Key != "" && b.Key == what.Key) && b.By.After(o.roots.c.Now())
	})
}

// names reports whether a reference or a name means the issuer of this root.
func (o *Operator) names(ctx context.Context, issuer string, p rotation.Party) bool {
	if issuer == p.Ref {
		return true
	}
	ask, cancel := context.WithTimeout(ctx, viewPatience)
	defer cancel()
	issuers, err := o.roots.issuers(ask, issuer)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(issuers, func(i ca.UpstreamIssuer) bool { return i.Ref == p.Ref && i.Name == issuer })
}

// marked is the record with one taint more, to choose a successor by.
func marked(r rotation.Rollout, what rotation.Party) rotation.Rollout {
	r.Taints = append(append([]rotation.Taint(nil), r.Taints...), rotation.Taint{ID: what.ID, Key: what.Key, At: time.Now()})
	return r
}

// twins are the other roots of the trust bundle that have the key of this one.
func (o *Operator) twins(what rotation.Party) (twins []rotation.Party) {
	bundle, _ := o.roots.c.Trust.Bundle()
	for _, c := range bundle.X509Authorities() {
		if id := ca.RootID(c); id != what.ID && ca.KeyOf(c) == what.Key {
			twins = append(twins, rotation.Party{ID: id, Key: what.Key})
		}
	}
	return twins
}

// known finds a root that can be tainted: of the trust bundle, of the upstream, or of the rollout that is under way.
func (o *Operator) known(ctx context.Context, record rotation.Rollout, id string) (rotation.Party, error) {
	what := rotation.Party{ID: id}
	for _, p := range []rotation.Party{record.Old, record.New} {
		if p.ID == id {
			what = p
		}
	}
	bundle, _ := o.roots.c.Trust.Bundle()
	for _, c := range bundle.X509Authorities() {
		if ca.RootID(c) == id {
			what.Key = ca.KeyOf(c)
			return what, nil
		}
	}
	ask, cancel := context.WithTimeout(ctx, viewPatience)
	defer cancel()
	issuers, err := o.roots.c.Upstream.Issuers(ask)
	for _, i := range issuers {
		if i.Root != nil && ca.RootID(i.Root) == id {
			return party(i), nil
		}
	}
	if what.Ref != "" {
		return what, nil
	}
	return what, errors.Join(fmt.Errorf("neither the trust bundle nor the upstream has a root %.64q: `certctl ca status` shows those there are", id), err)
}

// Settle brings a journal up to what is known of keys: it names those that a journal of before does not name, and has the roots
// of the trust bundle leave whose key is tainted, as they may be after a backup of before the taint was put back. Roots
// that the configuration names stay, where the bundle has them only for what they had signed before that, or by the
// rollout that is under way.
func (o *Operator) Settle(ctx context.Context, named ...*x509.Certificate) error {
	o.named.Store(&named)
	record, err := o.roller.Record(ctx)
	if err != nil {
		return err
	}
	ask, cancel := context.WithTimeout(ctx, viewPatience)
	defer cancel()
	issuers, _ := o.roots.c.Upstream.Issuers(ask) // one that is away leaves keys without a name, and is no fault here
	keys := o.keys(issuers)
	bundle, _ := o.roots.c.Trust.Bundle()
	settled := func(r rotation.Rollout) (rotation.Rollout, error) {
		r = r.Keyed(keys)
		for _, c := range named {
			if taintOf(r, c) == nil {
				r = configured(r, ca.RootID(c))
			}
		}
		for _, c := range bundle.X509Authorities() {
			if taintOf(r, c) != nil {
				r = r.Expel(rotation.Party{ID: ca.RootID(c), Key: ca.KeyOf(c)}, o.roots.c.Now())
			}
		}
		return r, nil
	}
	if now, _ := settled(record); reflect.DeepEqual(now, record) {
		return nil
	}
	_, err = o.roller.Change(ctx, settled)
	return err
}

// keys names the keys of the roots of the trust bundle, and of these issuers.
func (o *Operator) keys(issuers []ca.UpstreamIssuer) func(id string) string {
	known := map[string]string{}
	bundle, _ := o.roots.c.Trust.Bundle()
	for _, c := range bundle.X509Authorities() {
		known[ca.RootID(c)] = ca.KeyOf(c)
	}
	for _, i := range issuers {
		if i.Root != nil {
			known[ca.RootID(i.Root)] = ca.KeyOf(i.Root)
		}
	}
	return func(id string) string { return known[id] }
}

// taintOf is the taint of a root or of its key; nil when there is none, and for no root.
func taintOf(r rotation.Rollout, root *x509.Certificate) *rotation.Taint {
	if root == nil {
		return nil
	}
	t, found := r.Tainted(ca.RootID(root))
	if !found {
		t, found = r.TaintedKey(ca.KeyOf(root))
	}
	if !found {
		return nil
	}
	return &t
}

// Tainted says why a root may not be trusted; nil when it may.
func Tainted(r rotation.Rollout, root *x509.Certificate) error {
	if t := taintOf(r, root); t != nil {
		return tainted(root, *t)
	}
	return nil
}

// Barred says why none of these certificates may stand above an intermediate; nil when they may. Who has stolen a key signs
// with it below whatever root certifies it.
func Barred(r rotation.Rollout, above []*x509.Certificate) error {
	for _, c := range above {
		if err := Tainted(r, c); err != nil {
			return err
		}
	}
	return nil
}

// barred says why an issuer may not be used; nil when it may.
func barred(r rotation.Rollout, i ca.UpstreamIssuer) error {
	return Barred(r, append(slices.Clip(i.Path), i.Root))
}

func tainted(root *x509.Certificate, t rotation.Taint) error {
	what := "it"
	if id := ca.RootID(root); id != t.ID {
		what = fmt.Sprintf("its key, which the root %.16s… has too,", t.ID)
	}
	return refusal.New(refusal.RootTainted, "the CA certificate %q (SHA-256 %s): %s was tainted at %s by %s", root.Subject, ca.RootID(root), what,
		t.At.UTC().Format(time.RFC3339), t.By)
}
