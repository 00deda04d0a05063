package agent

import (
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"
)

// testClocks are clocks that a test sets.
type testClocks struct {
	mu sync.Mutex
	// ahead is the wall clock minus the true one, and asleep how long the machine was suspended.
	ahead, asleep time.Duration
	boot          string
	began         time.Time
}

func newTestClocks() *testClocks { return &testClocks{boot: "a boot", began: time.Now()} }

func (c *testClocks) now() instant {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := instant{wall: time.Now().Add(c.ahead), boot: c.boot}
	if c.boot != "" {
		i.since = time.Since(c.began) + c.asleep + time.Hour
	}
	return i
}

func (c *testClocks) set(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

// What was kept is run down by the clock that nobody can set, for as long as the machine does not boot again.
func TestKeptAfterTheClockWasSet(t *testing.T) {
	const life = time.Hour
	for name, c := range map[string]struct {
		change func(*testClocks)
		skew   time.Duration
		want   time.Duration // left; 0: it is not given out
	}{
		"nothing":                           {func(*testClocks) {}, 0, life},
		"the clock was set forward":         {func(c *testClocks) { c.ahead = 3 * life }, 0, life},
		"the clock was set back":            {func(c *testClocks) { c.ahead = -3 * life }, 0, life},
		"set back, and the end passed":      {func(c *testClocks) { c.ahead, c.asleep = -3*life, life+time.Second }, 0, 0},
		"set back, and half of it passed":   {func(c *testClocks) { c.ahead, c.asleep = -3*life, life/2 }, 0, life / 2},
		"a clock that was wrong was set":    {func(c *testClocks) { c.ahead = 3 * life }, 3 * life, life},
		"a reboot":                          {func(c *testClocks) { c.boot, c.ahead = "the next boot", life/2 }, 0, life / 2},
		"a reboot, and the end passed":      {func(c *testClocks) { c.boot, c.ahead = "the next boot", life+time.Second }, 0, 0},
		"a reboot, by the CA's clock":       {func(c *testClocks) { c.boot = "the next boot" }, life / 2, life / 2},
		"a reboot to a clock far behind":    {func(c *testClocks) { c.boot, c.ahead = "the next boot", -3*life }, 0, life},
		"a machine that does not tell":      {func(c *testClocks) { c.boot, c.ahead = "", life/2 }, 0, life / 2},
		"a count that went back":            {func(c *testClocks) { c.asleep, c.ahead = -life/2, life/2 }, 0, life / 2},
		"a machine that never told, longer": {func(c *testClocks) { c.boot, c.ahead = "", life+time.Second }, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			ca, clocks := newCA(t), newTestClocks()
			tr := newTestTrust(t, ca)
			must(t, tr.offer(ca.Bundle(), nil))
			answer, key := issued(t, ca, "/ns/a/sa/b", life)
			h, err := receive(answer, key, tr, clocks.now())
			must(t, err)
			w := Workload{Socket: "/run/a.sock", TokenFile: "/run/a.token"}
			dir := filepath.Join(t.TempDir(), "keys")
			before := &store{dir, clocks.now}
			must(t, before.prepare())
			must(t, before.save(nameOf(w), w, h, c.skew))

			clocks.set(func() { c.change(clocks) })
			got, _, err := (&store{dir, clocks.now}).load(nameOf(w), w, ca.Domain())
			must(t, err)
			left := time.Duration(0)
			if got != nil {
				left = got.left(clocks.now())
			}
			if off := c.want - left; off < 0 || off > 10*time.Second {
				t.Errorf("%v left, want %v", left, c.want)
			}
		})
	}
}

func TestMachineClocks(t *testing.T) {
	read := machineClocks()
	a := read()
	time.Sleep(10 * time.Millisecond)
	b := read()
	d, ok := b.after(a)
	if runtime.GOOS != "linux" {
		if ok {
			t.Errorf("%v after, on a machine whose boots are not known", d)
		}
		return
	}
	if !ok || a.boot == "" || d < 10*time.Millisecond || d > 10*time.Second {
		t.Errorf("%v after %v: %v, %t", b, a, d, ok)
	}
}

// A machine that wakes up after the end of what is held: no timer of the process has fired yet, and nothing may go out.
func TestNothingThatEndedIsServedAfterASuspend(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	clocks := newTestClocks()
	n.config.now = clocks.now
	a := n.start()
	if fetch(t, n.path("web.sock"), "default")["default"] == nil {
		t.Fatal("nothing served")
	}
	n.ca.Stop()
	clocks.set(func() { clocks.asleep = 59 * time.Minute })
	if fetch(t, n.path("web.sock"), "default")["default"] == nil {
		t.Error("it went before its end")
	}
	clocks.set(func() { clocks.asleep = time.Hour })
	if got := fetch(t, n.path("web.sock"), "default", "ROOTCA"); got["default"] != nil || got["ROOTCA"] == nil {
		t.Errorf("after the end: %v", got)
	}
	if got := a.state(0); got != "expired" {
		t.Errorf("the state is %s", got)
	}
}
