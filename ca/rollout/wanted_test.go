package rollout_test

import (
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
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
