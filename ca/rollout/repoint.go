package rollout

import (
	"context"
	"fmt"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// Repoint has the root that signs, or a party of the rollout that is under way, signed for by another of the upstream's
// issuers, where issuer names one below that very root: the same root has other references after it was imported anew.
// Trust is not touched, so nothing has to be confirmed. It reports false, and changes nothing, for an issuer of another root
// and for the one that is asked already.
func (o *Operator) Repoint(ctx context.Context, issuer string, dryRun bool) (to ca.Root, moved bool, err error) {
	issuers, err := o.roots.issuers(ctx, issuer)
	if err != nil {
		return ca.Root{}, false, fmt.Errorf("asking the upstream for its issuers: %w", err)
	}
	record, failed := o.roller.Record(ctx)
	if failed != nil {
		return ca.Root{}, false, failed
	}
	for _, i := range issuers {
		if i.Root != nil && i.Fault == nil {
			i.Fault = barred(record, i)
		}
		if i.Root != nil && (i.Ref == issuer || i.Name == issuer) && (i.Fault == nil || to.ID == "") {
			to, err = ca.Root{ID: ca.RootID(i.Root), Ref: i.Ref}, i.Fault
		}
	}
	party := rotation.Party{ID: to.ID, Ref: to.Ref}
	if to.ID == "" {
		return ca.Root{}, false, nil
	}
	if _, moved = record.Repoint(party); !moved {
		return ca.Root{}, false, nil
	}
	if err != nil {
		return ca.Root{}, false, fmt.Errorf("issuer %s cannot be used: %w", to.Ref, err)
	}
	if dryRun {
		return to, true, nil
	}
	if err := o.repoint(ctx, party); err != nil {
		return ca.Root{}, false, err
	}
	return to, true, o.try(ctx, to)
}

func (o *Operator) repoint(ctx context.Context, to rotation.Party) error {
	o.changing.Lock()
	defer o.changing.Unlock()
	_, err := o.roller.Change(ctx, func(r rotation.Rollout) (rotation.Rollout, error) {
		next, moved := r.Repoint(to)
		if !moved {
			return r, rotation.ErrMeanwhile
		}
		return next, nil
	})
	if err == nil {
		o.roots.c.Authority.Repoint(ca.Root{ID: to.ID, Ref: to.Ref})
	}
	return err
}

// try has the issuer sign now, so that whoever named it sees whether it does. If it does not, the intermediate of before
// stays in use. The upstream may be slow, so nothing is held that an emergency waits for.
func (o *Operator) try(ctx context.Context, root ca.Root) error {
	lines, _ := o.roots.c.Authority.Lines()
	for _, l := range lines {
		if l.Root() != root {
			continue
		}
		if err := l.RenewNow(ctx); err != nil {
			return fmt.Errorf("issuer %s is asked from now on, and has not signed yet; that is tried again by itself: %w", root.Ref, err)
		}
	}
	return nil
}
