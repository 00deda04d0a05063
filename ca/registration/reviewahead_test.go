package registration

import (
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
)

// What a clock far ahead has issued, and was replaced since, is asked for again while somebody may hold it, and not for as
// long as it says that it lives: the order names all that is issued meanwhile.
func TestAReviewOfWhatAClockFarAheadIssuedIsOverSoon(t *testing.T) {
	now := time.Now()
	issued := now.Add(365 * 24 * time.Hour)
	of := holder{"spiffe://mesh.test/meshca/agent/one/node1", "pod", "spiffe://mesh.test/web"}
	r := review{now: now, found: map[holder]finding{of: {doubted: true, behind: true, issued: issued, notAfter: issued.Add(ca.MaxTTL)}}}
	orders := r.orders(r.sum())[of.agent]
	if len(orders) != 1 || !orders[0].IssuedBefore.After(issued) || orders[0].Until.After(now.Add(2*ca.MaxTTL)) {
		t.Errorf("ordered is %+v", orders)
	}
}
