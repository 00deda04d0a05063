package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// nodeOf is a home that has only a name.
type nodeOf string

var _ home = nodeOf("")

func (nodeOf) issue(context.Context, *meshcav1.X509SVIDRequest) (*meshcav1.X509SVID, error) {
	return nil, refusal.New(refusal.CAUnreachable, "gone")
}
func (nodeOf) denied(spiffeid.ID) bool     { return false }
func (nodeOf) ended(*held) error           { return nil }
func (nodeOf) keep(*workload, *held) error { return nil }
func (n nodeOf) agentID() string           { return string(n) }
func (w *workload) wokenWithin(d time.Duration) bool {
	select {
	case <-w.wake:
		return true
	case <-time.After(d):
		return false
	}
}

// failing is a workload on a node of its own whose renewals fail, with so much left.
func failing(i int, life, left time.Duration) *workload {
	w := newWorkload(Workload{Socket: fmt.Sprint("/run/", i)}, nodeOf(fmt.Sprint("node-", i)), nil, &clock{now: machineClocks()}, slog.New(slog.DiscardHandler))
	w.state.failing = true
	if left > 0 {
		w.state.held = &held{
			svid: &x509svid.SVID{ID: spiffeid.RequireFromString("spiffe://mesh.test/ns/a/sa/b")},
			term: rotation.Term{Life: life, Left: left, Received: time.Now()},
		}
	}
	return w
}

// After an outage a fleet comes back over a hundredth of its lives, or a quarter of what is left.
func TestRetriesAfterAnOutageAreSpread(t *testing.T) {
	const many = 500
	for name, c := range map[string]struct{ life, left, within time.Duration }{
		"much is left":   {6 * time.Hour, 2 * time.Hour, 216 * time.Second},
		"little is left": {6 * time.Hour, 2 * time.Minute, 30 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				woken := make(chan time.Duration, many)
				for i := range many {
					w := failing(i, c.life, c.left)
					w.retrySoon()
					go func() {
						<-w.wake
						woken <- time.Since(began)
					}()
				}
				slots := make([]int, 10)
				for range many {
					at := <-woken
					if at > c.within {
						t.Fatalf("woken after %v", at)
					}
					slots[min(int(at*10/c.within), 9)]++
				}
				for i, n := range slots {
					if n < many/10/3 || n > many/10*3 {
						t.Errorf("tenth %d: %d of %d", i, n, many)
					}
				}
			})
		})
	}
}

func TestRetriesThatAreNotSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := failing(1, time.Hour, 0)
		if w.retrySoon(); !w.wokenWithin(time.Millisecond) {
			t.Error("who has nothing has to wait")
		}
		w = failing(2, time.Hour, time.Hour)
		w.state.held.bearer, w.state.bearer = Bearer{Subject: "a"}, Bearer{Subject: "b"}
		if w.retrySoon(); !w.wokenWithin(time.Millisecond) {
			t.Error("who has another's SVID has to wait")
		}
		w = failing(3, time.Hour, time.Hour)
		w.retrySoon()
		w.mu.Lock()
		w.state.failing = false
		w.mu.Unlock()
		if w.wokenWithin(time.Hour) {
			t.Error("woken, though it was renewed meanwhile")
		}
		w = failing(4, time.Hour, time.Hour)
		w.retrySoon()
		w.retries.stop()
		w.retrySoon()
		if w.wokenWithin(time.Hour) {
			t.Error("woken after the stop")
		}
	})
}

// midway is a workload whose second attempt waits to be told how it ends; further ones succeed.
type midway struct {
	*workload
	attempts int
	second   chan error
}

func (m *midway) Renew(ctx context.Context) (rotation.Term, error) {
	m.attempts++
	_, err := m.workload.Renew(ctx) // which fails: CA_UNREACHABLE
	if m.attempts == 2 {
		err = <-m.second
	} else if m.attempts > 2 {
		err = nil
	}
	return rotation.Term{Life: 6 * time.Hour, Left: 6 * time.Hour, Received: time.Now()}, err
}

// What would begin another attempt comes amid one: it is not to be followed by a second that has nothing left to do. After
// an outage that was one for each workload of the fleet.
func TestARetryAmidAnAttempt(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		want int
	}{"that succeeds": {nil, 2}, "that fails": {errors.New("lost"), 3}} {
		synctest.Test(t, func(t *testing.T) {
			m := &midway{workload: failing(1, 6*time.Hour, 0), second: make(chan error)}
			m.PodUID = "uid"
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- rotation.Keep(ctx, m, rotation.KeepOptions{Wake: m.wake, Observe: m.observed}) }()
			time.Sleep(time.Minute)
			if m.attempts != 2 {
				t.Fatalf("%d attempts were made", m.attempts)
			}
			m.retrySoon()
			m.retryNow()
			m.second <- c.err
			time.Sleep(time.Second)
			if m.attempts != c.want {
				t.Errorf("an attempt %s: %d were made a second later, want %d", name, m.attempts, c.want)
			}
			cancel()
			<-ended
		})
	}
}
