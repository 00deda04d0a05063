package inbound

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

const settled = time.Second

// hall is a Room whose guests have names.
type hall struct {
	t    *testing.T
	room *Room
	gone []string
	out  map[string]func()
}

func newHall(t *testing.T, size int) *hall {
	return &hall{t: t, room: NewRoom(size, settled), out: map[string]func(){}}
}

func (h *hall) enter(name, address string) bool {
	leave, ok := h.room.Enter(address+":1", func() { h.gone = append(h.gone, name) })
	h.out[name] = leave
	return ok
}

// lost checks who gave way since the last look.
func (h *hall) lost(what string, want ...string) {
	h.t.Helper()
	if !slices.Equal(h.gone, want) {
		h.t.Errorf("%s: %v gave way, want %v", what, h.gone, want)
	}
	h.gone = nil
}

func TestWhoHasTheMostGivesWay(t *testing.T) {
	h := newHall(t, 4)
	for i, address := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.3"} {
		if !h.enter(fmt.Sprint(i), address) {
			t.Fatalf("%d finds no place", i)
		}
	}
	h.lost("nobody more than there are places for")
	if !h.enter("kubelet", "10.0.0.9") {
		t.Error("a newcomer finds no place")
	}
	h.lost("a newcomer", "1")
	if !h.enter("again", "10.0.0.3") {
		t.Error("who has one finds no place")
	}
	h.lost("one more of an address that has one", "3")
	h.out["2"]()
	h.out["2"]()
	if !h.enter("5", "10.0.0.4") {
		t.Error("a place was not given back")
	}
	h.lost("into a free place")
	h.out["1"]() // lost its place before
	if !h.enter("6", "10.0.0.4") {
		t.Error("one more finds no place")
	}
	h.lost("a place is given back once", "5")
}

func TestWhoComesFirstHasItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHall(t, 4)
		for i := range 4 {
			h.enter(fmt.Sprint(i), fmt.Sprintf("10.0.0.%d", i))
		}
		time.Sleep(settled / 2)
		if h.enter("early", "10.0.1.1") {
			t.Error("one of many who come at once takes another's place")
		}
		h.lost("at once")
		time.Sleep(settled + 1)
		if !h.enter("late", "10.0.1.1") {
			t.Error("no place after a while")
		}
		h.lost("after a while", "0")
	})
}

// Who has a whole /64 has any number of addresses; it may also be a cluster, whose nodes and pods are many.
func TestACrowdGivesWayToOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHall(t, 4)
		h.enter("first", "10.0.0.1")
		for i := range 3 {
			h.enter(fmt.Sprint(i), fmt.Sprintf("[fd00::%d]", i))
		}
		if !h.enter("other", "[fd00:0:0:1::1]") {
			t.Error("a /64 keeps others out")
		}
		h.lost("another comes", "0")
		h.enter("3", "[fd00:0:0:2::3]") // no /64 has more than half now
		h.lost("another comes, and there is no crowd")
		time.Sleep(settled + 1)
		h.enter("4", "[fd00:0:0:3::3]")
		h.lost("another comes later", "first")
	})
	synctest.Test(t, func(t *testing.T) {
		h := newHall(t, 4)
		h.enter("first", "10.0.0.1")
		for i := range 3 {
			h.enter(fmt.Sprint(i), fmt.Sprintf("[fd00::%d]", i))
		}
		if h.enter("own", "[fd00::9]") {
			t.Error("one of the crowd has a place at once")
		}
		time.Sleep(settled + 1)
		if !h.enter("own", "[fd00::9]") {
			t.Error("one of the crowd has no place after a while")
		}
		h.lost("one of the crowd comes", "0")
	})
}
