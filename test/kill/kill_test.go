package kill

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	// kills of each kind of Rollout, at least.
	kills = 100
	// atOnce is how many CAs run side by side: most of a Rollout's time is waiting for certificates to end.
	atOnce = 48
	// seed makes the choice of failpoints the same in each run of the tests.
	seed = 20260817
	// quick and slow are how long a peer takes to bring other roots into use, at most, and the other one at least: in the
	// ledger a moment of issue has whole seconds.
	quick, slow = time.Second, 1200 * time.Millisecond
)

// Kill -9 at every step of every kind of Rollout, where it persists, publishes and signs, often enough that each failpoint on
// its way is met: the next process resumes, nothing was signed under a root that peers had not acknowledged, nothing is gone
// that somebody needed, the bundle's sequence grows, and in the end one root signs.
func TestKilledRolloutsEnd(t *testing.T) {
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	places := make(chan struct{}, atOnce)
	var mu sync.Mutex
	hit, ended := map[string]int{}, 0
	var running sync.WaitGroup
	for _, k := range kinds {
		running.Go(func() { // all side by side: the places alone bound them
			t.Run(k.name, func(t *testing.T) {
				c := campaign{t: t, b: b, k: k, places: places, hit: map[string]int{}, rand: rand.New(rand.NewPCG(seed, uint64(len(k.name))))}
				c.survey()
				if t.Failed() {
					return
				}
				c.run()
				if never := slices.DeleteFunc(c.points(), func(point string) bool { return c.hit[point] > 0 }); len(never) > 0 {
					t.Errorf("no process died at %v", never)
				}
				t.Logf("%d variants, %d runs, %d of them excused, %d processes killed, at %v", len(k.variants), c.runs, c.excused, c.killed, c.hit)
				mu.Lock()
				defer mu.Unlock()
				ended++
				for point, n := range c.hit {
					hit[point] += n
				}
			})
		})
	}
	running.Wait()
	for _, point := range steps {
		if hit[point] == 0 && ended == len(kinds) { // -run may choose some
			t.Errorf("no kind of Rollout passes the failpoint %s", point)
		}
	}
}

// campaign kills processes until enough have died.
type campaign struct {
	t      *testing.T
	b      built
	k      kind
	places chan struct{}
	rand   *rand.Rand
	// met is how often each variant passes each failpoint when nobody kills it.
	met []map[string]int

	mu     sync.Mutex // guards what follows
	runs   int
	killed int
	// excused are runs on a machine so slow that SVIDs ended before they were renewed.
	excused int
	hit     map[string]int
}

// survey makes a run of each variant that nobody kills.
func (c *campaign) survey() {
	c.met = make([]map[string]int, len(c.k.variants))
	var running sync.WaitGroup
	for i, v := range c.k.variants {
		c.places <- struct{}{}
		running.Go(func() {
			defer func() { <-c.places }()
			var err error
			if c.met[i], err = surveyed(c.t, c.b, v); err != nil {
				c.t.Errorf("variant %d, which nobody kills: %v", i, err)
			}
			if len(c.met[i]) < 12 {
				c.t.Errorf("variant %d meets %d failpoints: %v", i, len(c.met[i]), c.met[i])
			}
		})
	}
	running.Wait()
}

func surveyed(t *testing.T, b built, v variant) (met map[string]int, err error) {
	d, end := begin(t, b, v, course{})
	defer end()
	if d == nil {
		return nil, nil
	}
	if err := d.ready(t.Context()); err != nil {
		return nil, err
	}
	for _, point := range steps {
		if err := d.arm(t.Context(), point, "off"); err != nil {
			return nil, err
		}
	}
	if err := d.run(t.Context()); err != nil {
		return nil, d.described(t.Context(), err)
	}
	met = map[string]int{}
	for _, point := range steps {
		n, err := d.passed(t.Context(), point)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			met[point] = n
		}
	}
	return met, d.conclude(t.Context())
}

// points are all that are met on the way.
func (c *campaign) points() []string {
	all := map[string]int{}
	for _, met := range c.met {
		maps.Copy(all, met)
	}
	return slices.Sorted(maps.Keys(all))
}

// course is how one run goes.
type course struct {
	variant int
	// now is where its first process dies, then the second; empty: nowhere.
	now, then fault
	// lie is what it does wrong; empty: nothing.
	lie string
	// slow is how long peers take to bring other roots into use, one after the other.
	slow []time.Duration
}

// plan is how the runs go: a process dies at each failpoint when it is first passed, in a variant that passes it, and then
// anywhere. The variants take turns.
func (c *campaign) plan() (all []course) {
	turn := 0
	add := func(passes func(met map[string]int) bool, where func(met map[string]int) fault) {
		for !passes(c.met[turn%len(c.met)]) {
			turn++
		}
		r := course{variant: turn % len(c.met)}
		r.now = where(c.met[r.variant])
		r.slow = []time.Duration{time.Duration(c.rand.Int64N(int64(quick))), slow + time.Duration(c.rand.Int64N(int64(quick)))}
		c.rand.Shuffle(len(r.slow), func(i, j int) { r.slow[i], r.slow[j] = r.slow[j], r.slow[i] })
		if len(all)%4 == 3 { // the one that follows dies too, on its way back
			r.then = fault{c.any(c.met[r.variant]), 1}
		}
		all = append(all, r)
		turn++
	}
	for _, point := range c.points() {
		add(func(met map[string]int) bool { return met[point] > 0 }, func(map[string]int) fault { return fault{point, 1} })
	}
	for len(all) < kills {
		add(func(map[string]int) bool { return true }, func(met map[string]int) fault {
			point := c.any(met)
			return fault{point, 1 + c.rand.IntN(min(met[point], 12))}
		})
	}
	return all
}

func (c *campaign) any(met map[string]int) string {
	points := slices.Sorted(maps.Keys(met))
	return points[c.rand.IntN(len(points))]
}

func (c *campaign) run() {
	var running sync.WaitGroup
	for _, r := range c.plan() {
		c.places <- struct{}{}
		running.Go(func() {
			defer func() { <-c.places }()
			// A failpoint that was passed less often this time: nobody died, so it is tried again at its first passage.
			if !c.one(r) && !c.t.Failed() {
				r.now.nth = 1
				c.one(r)
			}
		})
	}
	running.Wait()
	// Some failpoints lie on the way only if others are in time. Each variant that has met one tries it.
	for _, point := range c.points() {
		for i, met := range c.met {
			if met[point] > 0 && c.hit[point] == 0 && !c.t.Failed() {
				c.one(course{variant: i, now: fault{point, 1}, slow: []time.Duration{quick / 2, slow}})
			}
		}
	}
}

// one makes a run, and reports whether a process died in it.
func (c *campaign) one(r course) bool {
	d, end := begin(c.t, c.b, c.k.variants[r.variant], r)
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
	if d.excused {
		c.excused++
	}
	if d.killed > 0 {
		c.hit[r.now.point]++
	}
	if err != nil {
		c.t.Errorf("variant %d, killed at %+v and then %+v, %d times: %v", r.variant, r.now, r.then, d.killed, d.described(c.t.Context(), err))
		return true
	}
	return d.killed > 0
}

// described is an error with what can be seen of its CA.
func (d *drive) described(ctx context.Context, err error) error {
	a, _ := d.authorities(ctx)
	d.kill()
	journal, found := d.inspect(ctx)
	return fmt.Errorf("%w\nin its store: %v\nthe journal: %+v\nthe CA said: %v\nit printed:\n%s", err, found, journal, a.GetRollout(), tail(d.ca.Output(), 4<<10))
}

// begin starts a site for a run; end ends it.
func begin(t *testing.T, b built, v variant, r course) (*drive, func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "kill") // t.TempDir is too long for sockets
	if err != nil {
		t.Error(err)
		return nil, func() {}
	}
	d, err := opened(t.Context(), b, dir, v, r)
	if err != nil {
		_ = os.RemoveAll(dir)
		t.Errorf("starting a CA: %v", err)
		return nil, func() {}
	}
	return d, func() { d.close(); _ = os.RemoveAll(dir) }
}

// opened starts a CA in a folder, an agent and the peers below it.
func opened(ctx context.Context, b built, dir string, v variant, r course) (_ *drive, err error) {
	s, err := newSite(b, dir, v.settings, nil)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	patience, cancel := context.WithTimeout(ctx, startsIn)
	defer cancel()
	// An agent that starts sooner tries again, and that takes its time.
	if err := s.ca.Await(patience, func(context.Context) error { _, err := os.Stat(s.bundleFile()); return err }); err != nil {
		return nil, err
	}
	if err := s.startAgent(context.WithoutCancel(ctx), b.tokens); err != nil {
		return nil, err
	}
	d := &drive{variant: v, site: s, witness: newWitness(dir, s.root, v.settings), now: r.now, then: r.then, lie: r.lie}
	s.startPeers(context.WithoutCancel(ctx), d.witness, r.slow)
	return d, nil
}

func tail(s string, n int) string { return strings.TrimSpace(s[max(0, len(s)-n):]) }
