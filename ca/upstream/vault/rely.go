package vault

import (
	"errors"
	"fmt"

	"github.com/meshca/meshca/ca"
)

// Rely has Issuers list those that sign, too, by their issuer_ids, as signing says at each look. They are no candidates:
// where one may not be read, or cannot sign, that is a failure, and where one ends soon, it is no fault of it. It comes before Run.
func (u *Upstream) Rely(signing func() []string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.signing = signing
}

func (u *Upstream) relied() []string {
	u.mu.Lock()
	signing := u.signing
	u.mu.Unlock()
	if signing == nil {
		return nil
	}
	return signing()
}

// failing says why the first of those that sign cannot be read, or cannot go on to sign; nil: all can.
func (u *Upstream) failing(list listing, relied []string, shown []ca.UpstreamIssuer) error {
	for _, name := range relied {
		if name == "" {
			continue
		}
		id, why := list.find(name), u.gone()
		for _, s := range shown {
			if s.Ref == id && id != "" {
				why = s.Fault
			}
		}
		if why == nil {
			continue
		}
		if _, told := errors.AsType[*Fault](why); told {
			return why
		}
		kind := KindOther
		if id == "" {
			kind = KindMissing
		}
		return &Fault{Kind: kind, What: fmt.Sprintf("looking at the issuer %.64q, which signs", name), Why: why.Error(), cause: why}
	}
	return nil
}
