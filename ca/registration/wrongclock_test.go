package registration_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

// daysBehind is the time of a machine that came up with its clock two days behind: it signs for hours.
func daysBehind(t *testing.T, w *world.World) {
	t.Helper()
	for i := range 300 {
		at := time.Now().Add(-48*time.Hour + time.Duration(i)*time.Minute)
		entry := ca.LedgerEntry{Serial: []byte{2, byte(i >> 8), byte(i)}, ID: fmt.Sprintf("spiffe://mesh.test/late%d", i), Profile: "workload", IssuedAt: at, NotAfter: at.Add(time.Hour), Evidence: []byte("{}")}
		if err := w.Store.AppendLedger(t.Context(), []ca.LedgerEntry{entry}); err != nil {
			t.Fatal(err)
		}
	}
}

// What lives is found below what was signed while the clock was days behind: by a review, by who remembers causes of death, and
// by an order that has to cover what a fast clock has issued.
func TestAClockThatWasBehindHidesNothing(t *testing.T) {
	w := world.New(t, "rules: [{}]")
	if _, err := w.Issue(w.AttestAgent(world.Agent), world.Web); err != nil {
		t.Fatal(err)
	}
	fast := time.Now().Add(time.Hour)
	entry := ca.LedgerEntry{Serial: []byte{1}, ID: "spiffe://mesh.test/web", Profile: "workload", IssuedAt: fast, NotAfter: fast.Add(time.Hour), Evidence: []byte("{}")}
	if err := w.Store.AppendLedger(t.Context(), []ca.LedgerEntry{entry}); err != nil {
		t.Fatal(err)
	}
	daysBehind(t, w)
	w.SetPolicy("rules: [{deny: true}]")
	sum, err := w.RA.Review(t.Context(), time.Now().Add(time.Second), w.Store.ScanLiving)
	if err != nil || sum.Doubted != 1 {
		t.Errorf("a review doubts %+v: %v", sum, err)
	}
	endings := registration.NewEndings()
	if err := endings.Recall(t.Context(), w.Store.ScanLiving); err != nil {
		t.Fatal(err)
	}
	if held, _ := endings.Count(); held != 1 {
		t.Errorf("%d holders are known", held)
	}
	if err := w.RA.Orders.RenewAll(t.Context(), "a step", time.Minute); err != nil {
		t.Fatal(err)
	}
	if standing, _ := w.RA.Orders.Get(); !standing.Renew[0].IssuedBefore.After(fast) {
		t.Errorf("the order does not cover what is issued at %s: %+v", fast, standing.Renew)
	}
}
