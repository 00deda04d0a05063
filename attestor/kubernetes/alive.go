package kubernetes

import (
	"context"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// aliveFor is how long mode tokenReview takes something for alive after it was found so. A deletion takes the cluster
// itself longer than that.
const aliveFor = 5 * time.Second

// Alive says whether what an earlier attestation rested on still lives: nil, or the refusal. Mode jwks knows from its
// watches; mode tokenReview asks, once in a few seconds for each evidence. With liveness none it cannot know: nil.
func (c *Cluster) Alive(ctx context.Context, ev attestor.Evidence) error {
	if !c.live {
		return nil
	}
	if ev.Identity.Cluster() != c.name {
		return refusal.New(refusal.ClusterMismatch, "the evidence is from cluster %q, this is %q", ev.Identity.Cluster(), c.name)
	}
	if ev.NodeName == "" || ev.NodeUID == "" || ev.PodName == "" {
		return refusal.New(refusal.NodeUnknown, "the evidence does not name pod and node")
	}
	if c.alive == nil {
		return c.standing(ctx, laneKnown, &ev, attestor.Wants{})
	}
	id := ev.Identity
	key := strings.Join([]string{id.Namespace(), id.ServiceAccount(), ev.ServiceAccountUID, ev.PodName, ev.PodUID, ev.NodeName, ev.NodeUID}, "\x00")
	return c.alive.do(ctx, key, func(ctx context.Context) error { return c.standing(ctx, laneKnown, &ev, attestor.Wants{}) })
}

// memo remembers for a while what was found well, and asks once for all who want to know the same. What was found ill
// is asked again.
type memo struct {
	life   time.Duration
	now    func() time.Time
	flight singleflight.Group

	mu    sync.Mutex
	until map[string]time.Time
	swept time.Time
}

func newMemo(life time.Duration, now func() time.Time) *memo {
	return &memo{life: life, now: now, until: map[string]time.Time{}}
}

func (m *memo) do(ctx context.Context, key string, ask func(context.Context) error) error {
	m.mu.Lock()
	well := m.now().Before(m.until[key])
	m.mu.Unlock()
	if well {
		return nil
	}
	// The asking is shared, so it does not end with the patience of whoever came first; its calls have bounds of their own.
	done := m.flight.DoChan(key, func() (any, error) {
		asked := m.now()
		err := ask(context.WithoutCancel(ctx))
		if err == nil {
			m.remember(key, asked)
		}
		return nil, err
	})
	select {
	case <-ctx.Done():
		return ctx.Err()
	case r := <-done:
		return r.Err
	}
}

func (m *memo) remember(key string, asked time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.until[key] = asked.Add(m.life)
	if asked.Sub(m.swept) < m.life {
		return
	}
	m.swept = asked
	for k, until := range m.until {
		if !asked.Before(until) {
			delete(m.until, k)
		}
	}
}
