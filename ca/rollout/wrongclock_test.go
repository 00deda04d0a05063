package rollout_test

import (
	"crypto/x509"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// A machine came up with its clock two days behind, and signed for hours before that was set right. What it had signed before
// lives, and what it is under stays trusted.
func TestAClockThatWasBehindEndsNoCertificate(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	old, held := h.auth.Assignment().Root.ID, anchor(t, nil, nil)
	h.must(second(h.operator.TrustRoots(t.Context(), []*x509.Certificate{held})))
	end := time.Now().Add(5 * time.Hour).Truncate(time.Second)
	signed := func(root string, issued, notAfter time.Time) {
		t.Helper()
		sum, err := hex.DecodeString(root)
		h.must(err)
		h.must(h.store.AppendLedger(t.Context(), []ca.LedgerEntry{{Serial: []byte{1}, Profile: "workload", Root: sum, IssuedAt: issued, NotAfter: notAfter, Evidence: []byte("{}")}}))
	}
	signed(old, time.Now(), end)
	signed(ca.RootID(held), time.Now(), end)
	for i := range 300 {
		at := time.Now().Add(-48*time.Hour + time.Duration(i)*time.Minute)
		signed(old, at, at.Add(time.Hour))
	}
	r := rotation.Rollout{Step: rotation.StepSigning, Old: rotation.Party{ID: old}, New: rotation.Party{ID: strings.Repeat("0", 64)}, NewShare: 100}
	last, err := h.roots.Assign(t.Context(), r)
	h.must(err)
	if !last.Equal(end) {
		t.Errorf("the last certificate ends at %s, want %s", last, end)
	}
	v, err := h.operator.View(t.Context())
	h.must(err)
	if len(v.Roots) != 2 || v.Roots[0].Live != 1 || v.Roots[1].Live != 1 {
		t.Errorf("view %+v", v.Roots)
	}
	if err := h.operator.RemoveRoot(t.Context(), ca.RootID(held)); err == nil || !strings.Contains(err.Error(), "1 SVIDs under the root") {
		t.Errorf("a root that is needed is taken out: %v", err)
	}
}

// A clock that was a year ahead has signed below a root: that is not taken out at a word, but told what leads out.
func TestARemovalNamesWhatAClockFarAheadHasSigned(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	held := anchor(t, nil, nil)
	h.must(second(h.operator.TrustRoots(t.Context(), []*x509.Certificate{held})))
	sum, err := hex.DecodeString(ca.RootID(held))
	h.must(err)
	for _, c := range []struct {
		end time.Time
		way string
	}{
		{time.Now().Add(5 * time.Hour), "Try again then"},
		{time.Now().AddDate(1, 0, 0), "`certctl ca taint root " + ca.RootID(held)[:12] + "`"},
	} {
		h.must(h.store.AppendLedger(t.Context(), []ca.LedgerEntry{{Serial: []byte{1}, Profile: "workload", Root: sum, IssuedAt: c.end.Add(-time.Hour), NotAfter: c.end, Evidence: []byte("{}")}}))
		if err := h.operator.RemoveRoot(t.Context(), ca.RootID(held)); err == nil || !strings.Contains(err.Error(), c.way) {
			t.Errorf("what lives until %s: %v", c.end, err)
		}
	}
}
