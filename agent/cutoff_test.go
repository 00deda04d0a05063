package agent

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/sds"
)

// Whose stream the agent itself ends is coming back, and has until then what it had.
func TestWhoIsCutOffIsWaitedFor(t *testing.T) {
	inCell(t, func(t *testing.T, c *cell) {
		r := c.start()
		r.follow(c, 1)
		denied := refusal.New(refusal.IdentityDenied, "the test says so")
		first, _ := r.connect("/web.sock", "ROOTCA")
		first.take()
		second, _ := r.connect("/web.sock", ofDomain)
		second.take()
		r.says(0, 1)
		cut := func() {
			t.Helper()
			w := r.roster.at("/web.sock")
			w.mu.Lock()
			w.state.parting = &sds.Parting{Why: denied}
			w.publish()
			w.mu.Unlock()
			synctest.Wait()
			if n := r.proxies.missing("/web.sock"); n != 2 {
				t.Fatalf("%d streams are awaited", n)
			}
		}
		cut()
		r.follow(c, 2)
		r.says(1, 1, "/web.sock: 2 of the 2 streams")
		first, _ = r.connect("/web.sock", "ROOTCA")
		first.take()
		r.says(1, 1, "/web.sock: 1 of the 2 streams")
		second, _ = r.connect("/web.sock", ofDomain)
		second.take()
		r.says(1, 2)

		// They are given as long as after a restart, from then on, and the next run waits for them, too.
		time.Sleep(ComeBack / 2)
		cut()
		r.follow(c, 3)
		began := time.Now()
		sequence, lacking, err := r.taken(t.Context(), 2, time.Hour)
		if took := time.Since(began); err != nil || sequence != 3 || len(lacking) > 0 || took != ComeBack {
			t.Errorf("after %v: %d, %q, %v", took, sequence, lacking, err)
		}
		r.kill()
		r = c.start()
		if n := r.proxies.missing("/web.sock"); n != 2 {
			t.Errorf("after a restart %d streams are awaited", n)
		}
	})
}

// A stream's own end says that nobody is there any more, and so does that of a pod that is gone.
func TestWhoLeavesIsNotWaitedFor(t *testing.T) {
	inCell(t, func(t *testing.T, c *cell) {
		r := c.start()
		r.follow(c, 1)
		_, end := r.connect("/web.sock", "ROOTCA")
		end()
		r.connect("/db.sock", "ROOTCA")
		w := r.roster.at("/db.sock")
		w.mu.Lock()
		w.state.gone = refusal.New(refusal.PodGone, "the test says so")
		w.publish()
		w.mu.Unlock()
		synctest.Wait()
		if n, _ := r.proxies.awaits(); n != 0 {
			t.Errorf("%d workloads are awaited", n)
		}
	})
}
