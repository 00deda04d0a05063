package kill

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
)

const (
	// kills of each kind of Rollout, at least.
	kills = 100
	// atOnce is how many CAs run side by side: most of a Rollout's time is waiting for certificates to end.
	atOnce = 24
	// seed makes the choice of failpoints the same in each run of the tests.
	seed = 20260817
)

// Kill -9 at every step of every kind of Rollout, where it persists, publishes and signs, often enough that each failpoint on
// its way is met: the next process resumes, nothing was signed under a root that was not confirmed, nothing is retired
// early, the bundle's sequence grows, and in the end one root signs.
func TestKilledRolloutsEnd(t *testing.T) {
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	places := make(chan struct{}, atOnce)
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			met := survey(t, b, k, places)
			if len(met) < 12 {
				t.Fatalf("a rollout meets %d failpoints: %v", len(met), met)
			}
			c := campaign{t: t, b: b, k: k, places: places, met: met, hit: map[string]int{}, rand: rand.New(rand.NewPCG(seed, uint64(len(k.name))))}
			c.run()
			var never []string
			for point := range met {
				if c.hit[point] == 0 {
					never = append(never, point)
				}
			}
			if len(never) > 0 {
				t.Errorf("no process died at %v", never)
			}
			t.Logf("%d runs, %d processes killed, at %v", c.runs, c.killed, c.hit)
		})
	}
}

// survey runs a Rollout that nobody kills, and returns how often it passes each failpoint.
func survey(t *testing.T, b built, k kind, places chan struct{}) map[string]int {
	t.Helper()
	places <- struct{}{}
	defer func() { <-places }()
	met := map[string]int{}
	d, end := begin(t, b, k, fault{}, fault{})
	defer end()
	must(t, d.ready(t.Context()))
	for _, point := range steps {
		must(t, d.arm(t.Context(), point, "off"))
	}
	if err := d.run(t.Context()); err != nil {
		t.Fatalf("a rollout that nobody kills: %v", err)
	}
	for _, point := range steps {
		n, err := d.passed(t.Context(), point)
		must(t, err)
		if n > 0 {
			met[point] = n
		}
	}
	must(t, d.conclude(t.Context()))
	return met
}

// campaign kills processes until enough have died.
type campaign struct {
	t      *testing.T
	b      built
	k      kind
	places chan struct{}
	met    map[string]int
	rand   *rand.Rand

	mu     sync.Mutex // guards what follows
	runs   int
	killed int
	hit    map[string]int
}

// plan is where the process of each run dies: at each failpoint when it is first passed, and then anywhere.
func (c *campaign) plan() []fault {
	var points []string
	for point := range c.met {
		points = append(points, point)
	}
	slices.Sort(points)
	var all []fault
	for _, point := range points {
		all = append(all, fault{point, 1})
	}
	for len(all) < kills {
		point := points[c.rand.IntN(len(points))]
		all = append(all, fault{point, 1 + c.rand.IntN(min(c.met[point], 12))})
	}
	return all
}

func (c *campaign) run() {
	plan := c.plan()
	var running sync.WaitGroup
	for i, f := range plan {
		var then fault
		if i%4 == 3 { // the one that follows dies too, on its way back
			then = fault{plan[c.rand.IntN(len(plan))].point, 1}
		}
		c.places <- struct{}{}
		running.Go(func() {
			defer func() { <-c.places }()
			// A failpoint that was passed less often this time: nobody died, so it is tried again at its first passage.
			if !c.one(f, then) && !c.t.Failed() {
				c.one(fault{f.point, 1}, then)
			}
		})
	}
	running.Wait()
}

// one makes a run, and reports whether a process died in it.
func (c *campaign) one(f, then fault) bool {
	d, end := begin(c.t, c.b, c.k, f, then)
	defer end()
	if d == nil {
		return true
	}
	err := d.run(c.t.Context())
	if err == nil {
		err = d.conclude(c.t.Context())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.runs++
	c.killed += d.killed
	if d.killed > 0 {
		c.hit[f.point]++
	}
	if err != nil {
		r, _ := d.authorities(c.t.Context())
		d.kill()
		journal, also := d.inspect(c.t.Context())
		c.t.Errorf("killed at %+v and then %+v, %d times: %v\nthe journal: %+v (%v)\nthe CA said: %v\nit printed:\n%s", f, then, d.killed, err, journal, also, r.GetRollout(), tail(d.ca.Output(), 4<<10))
		return true
	}
	return d.killed > 0
}

// begin starts a site for a run; end ends it.
func begin(t *testing.T, b built, k kind, f, then fault) (*drive, func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "kill") // t.TempDir is too long for sockets
	if err != nil {
		t.Error(err)
		return nil, func() {}
	}
	ctx, cancel := context.WithTimeout(t.Context(), endsIn)
	defer cancel()
	s, err := newSite(context.WithoutCancel(ctx), dir, b.meshca, k.settings)
	if err != nil {
		_ = os.RemoveAll(dir)
		t.Errorf("starting a CA: %v", err)
		return nil, func() {}
	}
	return &drive{kind: k, site: s, witness: newWitness(dir), now: f, then: then}, func() { s.close(); _ = os.RemoveAll(dir) }
}

// conclude looks at a Rollout that has ended: from outside, and then at the store.
func (d *drive) conclude(ctx context.Context) error {
	patience, cancel := context.WithTimeout(ctx, startsIn)
	defer cancel()
	if err := d.ca.Await(patience, func(ctx context.Context) error { return d.over(ctx, d.site) }); err != nil {
		return err
	}
	d.kill()
	r, err := d.inspect(ctx)
	if err != nil {
		return err
	}
	if r.Step != "out" {
		return fmt.Errorf("the journal is at %s", r.Step)
	}
	return nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func tail(s string, n int) string { return strings.TrimSpace(s[max(0, len(s)-n):]) }
