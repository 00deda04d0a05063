package registration

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

func paceOf(t *testing.T, svidsPerPod int) *Pace {
	t.Helper()
	p, err := NewPace(svidsPerPod)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func inPod(t *testing.T, uid string) *attestor.Evidence {
	t.Helper()
	id, err := attestor.NewIdentity("one", "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	return &attestor.Evidence{Identity: id, PodName: "web-1", PodUID: uid}
}

// takeAll takes places until there are none, and says how many there were and why there are no more.
func takeAll(p *Pace, e *attestor.Evidence, life time.Duration) (n int, why error) {
	for why == nil {
		if _, why = p.take(e, life); why == nil {
			n++
		}
	}
	return n, why
}

func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := paceOf(t, 0)
		greedy, other := inPod(t, "a"), inPod(t, "b")
		n, why := takeAll(p, greedy, 10*time.Minute)
		if n != DefaultSVIDsPerPod {
			t.Errorf("%d SVIDs at once, want %d", n, DefaultSVIDsPerPod)
		}
		e, ok := refusal.From(why)
		if !ok || e.Reason != refusal.PodLimit || !e.Reason.Passing() || e.RetryAfter < time.Second || e.RetryAfter > time.Minute {
			t.Errorf("refused with %v, retry after %v", why, e.RetryAfter)
		}
		if _, err := p.take(other, 10*time.Minute); err != nil {
			t.Errorf("another pod pays for it: %v", err)
		}
		time.Sleep(e.RetryAfter)
		if n, _ := takeAll(p, greedy, 10*time.Minute); n != 1 {
			t.Errorf("after the time that the refusal named: %d SVIDs, want 1", n)
		}
		// All come back in the life of one.
		time.Sleep(10 * time.Minute)
		if n, _ := takeAll(p, greedy, 10*time.Minute); n != DefaultSVIDsPerPod {
			t.Errorf("a life later: %d SVIDs, want %d", n, DefaultSVIDsPerPod)
		}
		// Of long ones, in half an hour: agents start anew, and operators order renewals.
		time.Sleep(time.Hour)
		takeAll(p, greedy, 6*time.Hour)
		time.Sleep(15 * time.Minute)
		if n, _ := takeAll(p, greedy, 6*time.Hour); n != DefaultSVIDsPerPod/2 {
			t.Errorf("of six hours, 15 minutes later: %d SVIDs, want %d", n, DefaultSVIDsPerPod/2)
		}
	})
}

// Sixteen volumes of one pod renew at T/2 for ever, and an operator has all of them renewed twice meanwhile.
func TestPaceCoversHonestRenewals(t *testing.T) {
	for _, life := range []time.Duration{5 * time.Second, MinAsked, 6 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			p, e := paceOf(t, 0), inPod(t, "a")
			all := func() {
				for range 16 {
					if _, err := p.take(e, life); err != nil {
						t.Fatalf("lives of %v: %v", life, err)
					}
				}
			}
			for range 100 {
				all()
				if rand.N(4) == 0 {
					all() // roots change, policy changes, agents restart
				}
				time.Sleep(life / 2)
			}
		})
	}
}

func TestPaceGivesBack(t *testing.T) {
	p, e := paceOf(t, 1), inPod(t, "a")
	giveBack, err := p.take(e, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.take(e, time.Hour); refusal.Of(err) != refusal.PodLimit {
		t.Fatalf("got %v", err)
	}
	giveBack()
	if _, err := p.take(e, time.Hour); err != nil {
		t.Errorf("what was not signed counts: %v", err)
	}
}

func TestPaceOfAServiceAccount(t *testing.T) {
	p, e := paceOf(t, 1), inPod(t, "")
	if _, err := p.take(e, time.Hour); err != nil {
		t.Fatal(err)
	}
	if _, err := p.take(e, time.Hour); refusal.Of(err) != refusal.PodLimit {
		t.Errorf("a caller in no pod has no bound: %v", err)
	}
	other, err := attestor.NewIdentity("one", "shop", "db")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.take(&attestor.Evidence{Identity: other}, time.Hour); err != nil {
		t.Errorf("another service account pays for it: %v", err)
	}
}

func TestPaceIsBounded(t *testing.T) {
	p := paceOf(t, 1)
	for i := range p.shards { // full, of pods that asked long ago
		p.shards[i].by = make(map[uint64]places, pacePerShard)
		for k := range uint64(pacePerShard) {
			p.shards[i].by[k] = places{1, -time.Hour}
		}
	}
	const more = 2 * paceShards * paceLooks
	for i := range more {
		if _, err := p.take(inPod(t, fmt.Sprint(i)), time.Hour); err != nil {
			t.Fatalf("pod %d: %v", i, err)
		}
	}
	kept, fresh := 0, 0
	for i := range p.shards {
		kept += len(p.shards[i].by)
		for _, x := range p.shards[i].by {
			if x.at >= 0 {
				fresh++
			}
		}
	}
	if kept > paceShards*pacePerShard {
		t.Errorf("%d pods are remembered", kept)
	}
	if fresh != more {
		t.Errorf("%d of the %d pods that asked last are remembered", fresh, more)
	}
}

func TestPaceRefusesWhatCannotBeMeant(t *testing.T) {
	for _, n := range []int{-1, MaxSVIDsPerPod + 1} {
		if _, err := NewPace(n); err == nil {
			t.Errorf("%d is taken", n)
		}
	}
}

// BenchmarkPace is what it adds to each SVID.
func BenchmarkPace(b *testing.B) {
	p, err := NewPace(MaxSVIDsPerPod)
	if err != nil {
		b.Fatal(err)
	}
	id, err := attestor.NewIdentity("one", "shop", "web")
	if err != nil {
		b.Fatal(err)
	}
	var pods [1024]attestor.Evidence
	for i := range pods {
		pods[i] = attestor.Evidence{Identity: id, PodUID: fmt.Sprintf("0b0d4d6a-6b0c-4a5d-8f5e-%012d", i)}
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for i := rand.N(len(pods)); pb.Next(); i = (i + 1) % len(pods) {
			if _, err := p.take(&pods[i], time.Hour); err != nil {
				b.Fatal(err)
			}
		}
	})
}
