package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

func TestAlive(t *testing.T) {
	for _, mode := range []Mode{TokenReview, JWKS} {
		b := newBench(t, Config{Mode: mode})
		ev, err := b.Attest(t.Context(), usual(b.now()).rs256(t), "meshca")
		if err != nil {
			t.Fatal(err)
		}
		before := b.liveReads()
		for range 50 {
			if err := b.Alive(t.Context(), ev); err != nil {
				t.Fatalf("%s: %v", mode, err)
			}
		}
		if n := b.liveReads() - before; n > int(kinds) {
			t.Errorf("%s: 50 questions took %d reads", mode, n)
		}
		gone := func(name string, want refusal.Reason) {
			t.Helper()
			await(t, func() error {
				b.clock.forward(time.Second)
				if err := b.Alive(t.Context(), ev); refusal.Of(err) != want {
					return fmt.Errorf("%s, %s: got %v, want %q", mode, name, err, want)
				}
				return nil
			})
		}
		b.server.put(nodes, &corev1.Node{ObjectMeta: meta("", "node-1", "another")})
		gone("another node", refusal.NodeGone)
		b.server.put(nodes, &corev1.Node{ObjectMeta: meta("", "node-1", "node-uid")})
		gone("its own again", "")
		b.server.put(serviceAccounts, &corev1.ServiceAccount{ObjectMeta: meta("shop", "web", "another")})
		gone("another account", refusal.ServiceAccountGone)
		b.server.put(serviceAccounts, &corev1.ServiceAccount{ObjectMeta: meta("shop", "web", "sa-uid")})
		b.server.remove(pods, name{"shop", "web-1"})
		gone("no pod", refusal.PodGone)

		other, _ := attestor.NewIdentity("other", "shop", "web")
		foreign := ev
		foreign.Identity = other
		if err := b.Alive(t.Context(), foreign); refusal.Of(err) != refusal.ClusterMismatch {
			t.Errorf("%s: evidence of another cluster: got %v", mode, err)
		}
		ev.NodeUID = ""
		if err := b.Alive(t.Context(), ev); refusal.Of(err) != refusal.NodeUnknown {
			t.Errorf("%s: evidence without a node: got %v", mode, err)
		}
	}
}

func TestMemo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemo(5*time.Second, time.Now)
		var asked atomic.Int64
		answer := func(err error) func(context.Context) error {
			return func(ctx context.Context) error {
				asked.Add(1)
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(time.Second):
					return err
				}
			}
		}
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if err := m.do(t.Context(), "a", answer(nil)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		_ = m.do(t.Context(), "a", answer(nil))
		if n := asked.Load(); n != 1 {
			t.Errorf("asked %d times for 101 who wanted to know", n)
		}
		time.Sleep(5 * time.Second)
		ill := errors.New("ill")
		for range 2 {
			if err := m.do(t.Context(), "a", answer(ill)); !errors.Is(err, ill) {
				t.Errorf("got %v", err)
			}
		}
		if n := asked.Load(); n != 3 {
			t.Errorf("what was ill is asked each time, and what was well after its time: asked %d times, want 3", n)
		}

		// Who came first and goes takes nothing from the others.
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			if err := m.do(ctx, "b", answer(nil)); !errors.Is(err, context.Canceled) {
				t.Errorf("who went: %v", err)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			if err := m.do(t.Context(), "b", answer(nil)); err != nil {
				t.Errorf("who stayed: %v", err)
			}
		})
		synctest.Wait()
		cancel()
		wg.Wait()

		for i := range 1000 {
			m.remember(fmt.Sprint(i), time.Now())
		}
		time.Sleep(6 * time.Second)
		m.remember("last", time.Now())
		if len(m.until) != 1 {
			t.Errorf("%d are remembered, want 1", len(m.until))
		}
	})
}
