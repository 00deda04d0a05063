package rollout

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// maxRoots bounds the trust bundle: it travels to every agent and proxy, and each of its roots can vouch for everybody.
const maxRoots = 64

// Standing is how the last rollout stands, and what it waits for.
func (o *Operator) Standing() rotation.Standing {
	s, _ := o.roller.Standing()
	return s
}

// TrustRoots takes roots into the trust bundle that sign for nobody here, all of them or none. It returns the IDs of those
// that are new. Each must be a self-signed CA certificate.
func (o *Operator) TrustRoots(ctx context.Context, roots []*x509.Certificate) (added []string, err error) {
	if len(roots) == 0 {
		return nil, errors.New("there is no certificate in it")
	}
	o.changing.Lock()
	defer o.changing.Unlock()
	record, err := o.roller.Record(ctx)
	if err != nil {
		return nil, err
	}
	bundle, _ := o.roots.c.Trust.Bundle()
	count := len(bundle.X509Authorities())
	seen := map[string]bool{}
	for _, r := range roots {
		if t := taintOf(record, r); t != nil {
			return nil, tainted(r, *t)
		}
		// What is asked of every root of the bundle (ca.Trust) is asked below; that a stranger's is signed by its own key,
		// and so was not made up around a key of somebody else's, is asked here.
		if err := r.CheckSignatureFrom(r); err != nil {
			return nil, fmt.Errorf("%q (SHA-256 %s) is no self-signed CA certificate: %w", r.Subject, ca.RootID(r), err)
		}
		if id := ca.RootID(r); !bundle.HasX509Authority(r) && !seen[id] {
			seen[id] = true
			added = append(added, id)
		}
	}
	if count+len(added) > maxRoots {
		return nil, fmt.Errorf("the trust bundle would have %d roots, at most %d are kept: `certctl ca root remove` takes out those that nobody needs", count+len(added), maxRoots)
	}
	if err := o.roots.c.Trust.Judge(roots...); err != nil { // before the journal says of any that it is wanted
		return nil, err
	}
	err = o.want(ctx, record, func(r rotation.Rollout) (_ rotation.Rollout, err error) {
		for _, c := range roots {
			if r, err = r.Trust(ca.RootID(c)); err != nil {
				return r, err
			}
		}
		return r, nil
	})
	if err != nil {
		return nil, err
	}
	return added, o.roots.c.Trust.AddRoots(ctx, roots...)
}

// want notes that roots are wanted in the trust bundle for their own sake, where that is news.
func (o *Operator) want(ctx context.Context, record rotation.Rollout, wanted func(rotation.Rollout) (rotation.Rollout, error)) error {
	if next, err := wanted(record); err == nil && reflect.DeepEqual(next, record) {
		return nil
	}
	_, err := o.roller.Change(ctx, wanted)
	return err
}

// RemoveRoot takes a root out of the trust bundle that signs for nobody, that no rollout needs, and under which no SVID
// lives.
func (o *Operator) RemoveRoot(ctx context.Context, id string) error {
	o.changing.Lock()
	defer o.changing.Unlock()
	r, err := o.roller.Record(ctx)
	if err != nil {
		return err
	}
	bundle, _ := o.roots.c.Trust.Bundle()
	found := map[string]*RootView{}
	for _, c := range bundle.X509Authorities() {
		if ca.RootID(c) == id {
			found[id] = &RootView{Certificate: c, ID: id}
		}
	}
	switch {
	case found[id] == nil:
		return fmt.Errorf("the trust bundle has no root %.64q: `certctl ca status` shows those it has", id)
	case r.Active() && (id == r.Old.ID || id == r.New.ID):
		return fmt.Errorf("the rollout that is under way (%s) needs the root %s: `certctl ca abort` ends it, or it ends by itself", r.Step, id)
	case o.roots.c.Authority.Assignment().Signs(id):
		return fmt.Errorf("the root %s signs: `certctl ca rotate root` replaces it, and takes it out when nothing under it lives", id)
	}
	if err := o.countLive(ctx, found); err != nil {
		return fmt.Errorf("reading the ledger for what lives under the root: %w", err)
	}
	if v := found[id]; v.Live > 0 {
		next := "Try again then"
		if v.LastEnd.After(o.roots.c.Now().Add(Lives)) {
			next = fmt.Sprintf("A clock that was far ahead has signed that one. If this one is right, `certctl ca taint root %.12s` takes the root out for good, whatever lives under it", id)
		}
		return fmt.Errorf("%d SVIDs under the root %s are alive, the last one until %s: nobody would accept them any more. %s", v.Live, id, v.LastEnd.UTC().Format(time.RFC3339), next)
	}
	// First that nobody takes it in again by itself, then that it goes.
	forget := func(r rotation.Rollout) (rotation.Rollout, error) { return r.Forget(id), nil }
	if _, err := o.roller.Change(ctx, forget); err != nil {
		return err
	}
	return o.roots.c.Trust.RemoveRoot(ctx, id)
}

// configured is the Rollout when the configuration names a root. One that takes it out is somebody's word, too.
func configured(r rotation.Rollout, id string) rotation.Rollout {
	if next, err := r.Trust(id); err == nil {
		return next
	}
	return r
}

// TrustFound takes the roots of the upstream's issuers into the trust bundle that can be used and that nobody has taken
// out before: not tainted, not retired, not removed. They sign for nobody. One that the configuration names is then wanted
// there as after a start with it. It returns the issuers whose roots are new.
func (o *Operator) TrustFound(ctx context.Context, issuers []ca.UpstreamIssuer) (added []ca.UpstreamIssuer, err error) {
	o.changing.Lock()
	defer o.changing.Unlock()
	record, err := o.roller.Record(ctx)
	if err != nil {
		return nil, err
	}
	var failed []error
	for _, i := range issuers {
		bundle, _ := o.roots.c.Trust.Bundle()
		if i.Root == nil || i.Fault != nil || record.Leaves(ca.RootID(i.Root)) || barred(record, i) != nil {
			continue
		}
		wanted := func(r rotation.Rollout) (rotation.Rollout, error) {
			if i.Named {
				return configured(r, ca.RootID(i.Root)), nil
			}
			return r.Stay(ca.RootID(i.Root)), nil
		}
		if bundle.HasX509Authority(i.Root) {
			failed = append(failed, o.want(ctx, record, wanted))
			continue
		}
		err := errors.Join(i.Root.CheckSignatureFrom(i.Root), o.roots.c.Trust.Judge(i.Root))
		if err == nil && len(bundle.X509Authorities()) >= maxRoots {
			err = fmt.Errorf("the trust bundle has %d roots already: `certctl ca root remove` takes out those that nobody needs", maxRoots)
		}
		if err == nil {
			err = o.want(ctx, record, wanted)
		}
		if err == nil {
			err = o.roots.c.Trust.AddRoots(ctx, i.Root)
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("the root of issuer %s (%s): %w", i.Name, i.Ref, err))
			continue
		}
		added = append(added, i)
	}
	return added, errors.Join(failed...)
}
