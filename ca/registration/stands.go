package registration

import (
	"context"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
)

// Stands reports whether what was issued for an object's request would be granted now too: the pod and its account live,
// policy grants the same, nobody denied it. A door asks before it hands out what it could not hand out when it was issued. It
// leaves no decision behind: whoever is refused here asks anew, by Issue. What comes back is nil or a *refusal.Error, one that
// passes (Reason.Passing) where it could not be found out.
func (a *Authority) Stands(ctx context.Context, by *Admitted, r Request, svid ca.SVID) error {
	r.Claim = r.Claim.bounded()
	d := &Decision{Time: time.Now(), Event: eventIssue, Door: r.Door, Caller: by.caller, Cluster: by.cluster}
	d.claims(r.Claim)
	var err error
	if d.Evidence, err = a.attest(ctx, by, r); err != nil {
		return err
	}
	grant, _, err := a.grant(ctx, r, d)
	if err != nil {
		return err
	}
	if err := a.mayIssue(grant.ID); err != nil {
		return err
	}
	if less := lessThan(grant, svid); less != "" {
		return refusal.New(refusal.PolicyDenied, "policy (%s) grants %s %s than when it was issued", d.Rule, svid.ID, less)
	}
	return nil
}

// lessThan says what of an SVID's is not granted any more.
func lessThan(grant ca.Grant, svid ca.SVID) string {
	names := map[string]bool{}
	for _, n := range grant.DNSNames {
		names[n] = true
	}
	for _, n := range svid.Chain[0].DNSNames {
		if !names[n] {
			return "fewer DNS names"
		}
	}
	switch {
	case grant.ID != svid.ID:
		return "as another identity"
	case svid.Life > grant.TTL:
		return "for less time"
	}
	return ""
}
