package registration_test

import (
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/test/world"
)

// Two agents of one node overlap, as when a DaemonSet is updated with surge: the new one has nobody below it yet, and the
// proxies are all at the old one. It does not confirm for them.
func TestAnInstanceConfirmsForItselfAlone(t *testing.T) {
	w := world.New(t, "")
	book := w.RA.Agents
	unconfirmed := func(what string, set uint64, want bool) {
		t.Helper()
		if names := book.Unconfirmed(set, time.Now()); (len(names) == 1) != want {
			t.Errorf("%s: of bundle %d unconfirmed are %q", what, set, names)
		}
	}
	first := w.AttestAgent(world.Agent)
	old := book.Connected(first.ID, first.Serial, "v1")
	old.Acknowledge(4, []string{"web.sock: rejects it: no"})
	subject := world.Agent
	subject.Pod, subject.PodUID = "agent-2", "pod-agent-2"
	second := w.AttestAgent(subject)
	next := book.Connected(second.ID, second.Serial, "v2")
	next.Acknowledge(5, nil)
	unconfirmed("the old one rejects it", 5, true)
	unconfirmed("both have the one before", 4, false)
	if a := book.List()[0]; a.AckedSequence != 4 || !slices.Equal(a.Rejections, []string{"web.sock: rejects it: no"}) {
		t.Errorf("shown is %+v", a)
	}

	// A connection of the old one that nobody has found dead makes nobody wait, nor does it say anything any more.
	again := book.Connected(first.ID, first.Serial, "v1")
	unconfirmed("the old one came back and has said nothing", 4, true)
	again.Acknowledge(5, nil)
	old.Acknowledge(5, []string{"late"})
	old.Close()
	unconfirmed("both have it", 5, false)
	again.Close()
	next.Acknowledge(6, nil)
	next.Close()
	unconfirmed("both have left, the last one with it", 6, false)
	if a := book.List()[0]; a.Connected || a.AckedSequence != 6 || len(a.Rejections) != 0 {
		t.Errorf("shown is %+v", a)
	}
}
