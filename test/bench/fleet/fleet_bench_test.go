// Package fleet measures how evenly a fleet that started together renews.
package fleet

import (
	"fmt"
	"testing"
	"time"

	"github.com/meshca/meshca/rotation"
)

// BenchmarkRenewals lets 100 000 identities of six hours start in the same second and follows them through three
// cycles. It reports the busiest minute against the mean one, of the first cycle and of the worst.
func BenchmarkRenewals(b *testing.B) {
	const fleet, life, cycles = 100_000, 6 * time.Hour, 3
	start := time.Unix(1_800_000_000, 0)
	mean := fleet / (life / 2).Minutes()
	for range b.N {
		minutes := make([]map[int]int, cycles)
		for c := range minutes {
			minutes[c] = map[int]int{}
		}
		for i := range fleet {
			schedule := rotation.Phased(fmt.Sprintf("node-%d|spiffe://mesh.test/ns/ns-%d/sa/app|/run/app.sock", i/100, i))
			at := start
			for c := range cycles {
				at = schedule(rotation.Term{Life: life, Left: life, Received: at})
				minutes[c][int(at.Sub(start)/time.Minute)]++
			}
		}
		worst := 0.0
		for c := range minutes {
			busiest := 0
			for _, n := range minutes[c] {
				busiest = max(busiest, n)
			}
			ratio := float64(busiest) / mean
			if c == 0 {
				b.ReportMetric(ratio, "first-cycle-busiest-of-mean")
			}
			worst = max(worst, ratio)
		}
		b.ReportMetric(worst, "busiest-of-mean")
	}
}
