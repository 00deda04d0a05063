package rollout_test

import (
	"crypto/x509"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// An import of which one root cannot be trusted changes nothing, neither for a root that was removed nor for the one that a
// rollout brings in.
func TestARefusedImportChangesNothing(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	removed := anchor(t, nil, nil)
	ended := anchor(t, nil, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	h.must(second(h.operator.TrustRoots(t.Context(), []*x509.Certificate{removed})))
	h.must(h.operator.RemoveRoot(t.Context(), ca.RootID(removed)))
	h.agents.unconfirmed = []string{"agent-1"}
	r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{})
	h.must(err)
	before, version, err := h.store.Rollout(t.Context())
	h.must(err)
	trusted := h.trusted()
	added, err := h.operator.TrustRoots(t.Context(), slices.Concat([]*x509.Certificate{removed, ended}, h.rootsOf(r.New.ID)))
	if err == nil || !strings.Contains(err.Error(), "ended") || len(added) > 0 {
		t.Errorf("imported: %v, %v", added, err)
	}
	now, still, err := h.store.Rollout(t.Context())
	h.must(err)
	if still != version || now.Trusted || !now.Leaves(ca.RootID(removed)) || !slices.Equal(h.trusted(), trusted) {
		t.Errorf("it was %+v, and is %+v; trusted are %v", before, now, h.trusted())
	}
}

// aborted has the rollout that is under way be aborted, to its end.
func (h *house) aborted() {
	h.t.Helper()
	h.must(second(h.operator.Abort(h.t.Context(), "test")))
	for h.roller.Move(h.t.Context()) {
	}
	if h.step() != rotation.StepOut {
		h.t.Fatalf("the abort has no end: %s", h.step())
	}
}

// An upstream that did not answer at the start tells later whom the configuration names. An abort leaves that trusted as it
// would after a start, wherever the rollout that brings it in has come to meanwhile.
func TestAbortLeavesWhatIsHeardLate(t *testing.T) {
	t.Parallel()
	for _, published := range []bool{false, true} {
		for _, named := range []bool{false, true} {
			h := newHouse(t)
			h.agents.unconfirmed = []string{"agent-1"}
			r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{})
			h.must(err)
			if published {
				h.roller.Move(t.Context())
			}
			heard, err := h.upstream.Issuers(t.Context())
			h.must(err)
			heard = slices.DeleteFunc(heard, func(i ca.UpstreamIssuer) bool { return ca.RootID(i.Root) != r.New.ID })
			heard[0].Named = named
			h.must(second(h.operator.TrustFound(t.Context(), heard)))
			h.aborted()
			if got := slices.Contains(h.trusted(), r.New.ID); got != named {
				t.Errorf("published %v, named %v: trusted are %v", published, named, h.trusted())
			}
		}
	}
}

// A root that the configuration names was removed, and somebody goes to it: then it is trusted again, and an abort leaves
// it so, whether there was a start meanwhile or not.
func TestAbortLeavesWhatIsConfiguredAndWasRemoved(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ issuer, anchor, start, stays bool }{
		"nobody names it":                                    {},
		"an issuer that the configuration names":             {issuer: true, stays: true},
		"an anchor that the configuration names":             {anchor: true, stays: true},
		"an issuer that it names, and a start comes between": {issuer: true, start: true, stays: true},
	} {
		h := newHouse(t)
		var edit atomic.Pointer[func([]ca.UpstreamIssuer) ([]ca.UpstreamIssuer, error)]
		h.wrap = func(u ca.Upstream) ca.Upstream { return listing{u, &edit} }
		h.stop()
		h.open()
		made, err := h.upstream.NewIssuer(t.Context())
		h.must(err)
		id := ca.RootID(made.Root)
		naming := func(all []ca.UpstreamIssuer) ([]ca.UpstreamIssuer, error) {
			for n := range all {
				all[n].Named = all[n].Ref == made.Ref && c.issuer
			}
			return all, nil
		}
		edit.Store(&naming)
		if c.anchor {
			h.must(h.operator.Settle(t.Context(), made.Root))
		}
		h.must(second(h.operator.TrustRoots(t.Context(), []*x509.Certificate{made.Root})))
		h.must(h.operator.RemoveRoot(t.Context(), id))
		h.agents.unconfirmed = []string{"agent-1"}
		h.must(second(h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: made.Ref})))
		if c.start {
			h.must(h.operator.Settle(t.Context(), made.Root))
		}
		h.roller.Move(t.Context())
		h.aborted()
		if got := slices.Contains(h.trusted(), id); got != c.stays {
			t.Errorf("%s: trusted are %v", name, h.trusted())
		}
	}
}
