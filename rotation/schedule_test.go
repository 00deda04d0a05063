package rotation

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func termAt(issued time.Time, life time.Duration) Term {
	return Term{Life: life, Left: life, Received: issued}
}

// The promise of DESIGN, Renewal: every T/2 for ever, at least T/4 after issue and never later than 3T/4.
func TestPhasedStaysWithinItsBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		life := time.Duration(rapid.Int64Range(int64(time.Millisecond), int64(400*24*time.Hour)).Draw(t, "life"))
		gone := time.Duration(rapid.Int64Range(0, int64(life)).Draw(t, "gone"))
		issued := time.Unix(0, rapid.Int64Range(-1e18, 4e18).Draw(t, "issued"))
		term := Term{Life: life, Left: life - gone, Received: issued.Add(gone)}
		due := Phased(rapid.String().Draw(t, "key"))(term)
		if age := due.Sub(issued); age < life/4 || age > life*3/4 {
			t.Fatalf("due %v after issue of a life of %v", age, life)
		}
		if again := HalfLife(term).Sub(issued); again != life/2 {
			t.Fatalf("half of %v is %v", life, again)
		}
	})
}

func TestPhasedRenewsEveryHalfLifeForEver(t *testing.T) {
	const life = 6 * time.Hour
	schedule := Phased("agent|spiffe://example.org/ns/a/sa/b|socket")
	at := schedule(termAt(time.Unix(1_800_000_000, 123), life))
	for i := range 1000 {
		// Answers take a moment.
		took := time.Duration(i%7) * 100 * time.Millisecond
		next := schedule(termAt(at.Add(took), life))
		if step := next.Sub(at); step != life/2 {
			t.Fatalf("step %d is %v", i, step)
		}
		at = next
	}
}

func TestPhasedIgnoresFractionsOfASecondInTheLife(t *testing.T) {
	schedule := Phased("key")
	issued := time.Unix(1_800_000_000, 0)
	a := schedule(termAt(issued, 6*time.Hour-900*time.Millisecond))
	b := schedule(termAt(issued, 6*time.Hour-100*time.Millisecond))
	if !a.Equal(b) {
		t.Errorf("lives that differ by a fraction of a second are on different grids: %v and %v", a, b)
	}
}

func TestPhasedSpreadsAFleetThatStartedTogether(t *testing.T) {
	const fleet, life = 100_000, 6 * time.Hour
	start := time.Unix(1_800_000_000, 0)
	due := make([]time.Time, fleet)
	schedules := make([]Schedule, fleet)
	for i := range fleet {
		schedules[i] = Phased(fmt.Sprintf("node-%d|spiffe://example.org/ns/ns-%d/sa/app|/run/s", i/100, i))
		due[i] = schedules[i](termAt(start, life))
	}
	for cycle := range 3 {
		first := slices.MinFunc(due, time.Time.Compare)
		minutes := make(map[int]int)
		for _, at := range due {
			minutes[int(at.Sub(first)/time.Minute)]++
		}
		busiest := 0
		for _, n := range minutes {
			busiest = max(busiest, n)
		}
		mean := float64(fleet) / (life / 2).Minutes()
		t.Logf("cycle %d: busiest minute %d, mean %.0f, ratio %.2f", cycle, busiest, mean, float64(busiest)/mean)
		if float64(busiest) > 1.5*mean {
			t.Errorf("cycle %d: the busiest minute has %d renewals, the mean is %.0f", cycle, busiest, mean)
		}
		for i := range due {
			due[i] = schedules[i](termAt(due[i], life))
		}
	}
}

func ExamplePhased() {
	term := Term{Life: 6 * time.Hour, Left: 6 * time.Hour, Received: time.Unix(1_800_000_000, 0).UTC()}
	due := Phased("agent/prod/node-1|spiffe://example.org/ns/shop/sa/web")(term)
	fmt.Println(due.Sub(term.Received) >= 90*time.Minute, due.Sub(term.Received) <= 270*time.Minute)
	// Output: true true
}
