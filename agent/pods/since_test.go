package pods

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// Since when pods can come in: from when the socket is open, and peers are not sent away as everybody would be.
func TestSinceWhenPodsCanComeIn(t *testing.T) {
	n := newNode(t)
	n.ca.Pod(uidA, "/ns/shop/sa/a")
	var fails atomic.Bool
	fails.Store(true)
	n.label = func(string) error {
		if fails.Load() {
			return errors.New("the test says so")
		}
		return nil
	}
	n.begin()
	n.eventually("it failed to open", func() bool { return strings.Contains(n.source.Standing().NotReady.Error(), "the test says so") })
	if _, open := n.source.OpenSince(); open {
		t.Error("open, though it is not")
	}
	fails.Store(false)
	opening := time.Now()
	n.eventually("it is open", func() bool { _, open := n.source.OpenSince(); return open })
	since := func() time.Time { at, _ := n.source.OpenSince(); return at }
	if since().Before(opening) {
		t.Error("open before it was")
	}
	for _, what := range []string{"-", "-?", "-"} { // none was told yet: it may be so for all
		before := since()
		n.sentAway(what)
		if !since().After(before) {
			t.Errorf("%s: it does not count from then", what)
		}
		if _, open := n.source.OpenSince(); open == (what == "-?") {
			t.Errorf("%s: open %t", what, open)
		}
	}
	n.source.mu.Lock()
	n.source.openedAt = n.source.openedAt.Add(-strange)
	n.source.mu.Unlock()
	long := since()
	if n.sentAway("-"); !since().Equal(long) {
		t.Error("it has been open for long, and a stranger who comes again and again puts off when others are given up")
	}
	n.connect(uidA).served()
	before := since()
	n.sentAway("-")
	if !since().Equal(before) {
		t.Error("a stranger was sent away, and that counts for all, though a pod was told")
	}
}
