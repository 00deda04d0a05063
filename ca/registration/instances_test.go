package registration_test

import (
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
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
	unconfirmed("both are away, and one has it", 6, true)
	if a := book.List()[0]; a.Connected || a.AckedSequence != 5 || len(a.Rejections) != 0 {
		t.Errorf("shown is %+v", a)
	}
}

// A stream ends at each change of the trust bundle, to be opened anew. The proxies below the instance have what they have
// meanwhile: it counts, and who looks in that moment sees what it said last.
func TestAnInstanceIsNotItsStream(t *testing.T) {
	for name, c := range map[string]struct {
		then  func(w *world.World, first registration.Caller, book *registration.AgentBook)
		at    time.Duration // from the end of the old one's SVID; 0: now
		waits bool
		lacks int
	}{
		"its stream is being opened anew": {waits: true, lacks: 1},
		"it came back and said nothing, twice": {then: func(_ *world.World, first registration.Caller, book *registration.AgentBook) {
			book.Connected(first.ID, first.Serial, "v1").Close()
			book.Connected(first.ID, first.Serial, "v1").Close()
		}, waits: true},
		"it is back with it": {then: func(_ *world.World, first registration.Caller, book *registration.AgentBook) {
			book.Connected(first.ID, first.Serial, "v1").Acknowledge(5, nil)
		}},
		"it is back with it, by another SVID": {then: func(w *world.World, _ registration.Caller, book *registration.AgentBook) {
			renewed := w.AttestAgent(world.Agent)
			book.Connected(renewed.ID, renewed.Serial, "v1").Acknowledge(5, nil)
		}},
		"its SVID lives yet": {at: -time.Second, waits: true, lacks: 1},
		"its SVID has ended": {at: time.Second, lacks: 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := world.New(t, "")
			book := w.RA.Agents
			w.RA.AgentTTL = time.Hour
			first := w.AttestAgent(world.Agent)
			old := book.Connected(first.ID, first.Serial, "v1")
			old.Acknowledge(4, []string{"web.sock: rejects it: no"})
			w.RA.AgentTTL = ca.MaxTTL
			subject := world.Agent
			subject.Pod, subject.PodUID = "agent-2", "pod-agent-2"
			second := w.AttestAgent(subject)
			book.Connected(second.ID, second.Serial, "v2").Acknowledge(5, nil)
			old.Close()
			if c.then != nil {
				c.then(w, first, book)
			}
			at := time.Now()
			if c.at != 0 {
				at = first.NotAfter.Add(c.at)
			}
			if names := book.Unconfirmed(5, at); (len(names) == 1) != c.waits {
				t.Errorf("unconfirmed are %q", names)
			}
			shown := uint64(4)
			if !c.waits && c.at == 0 {
				shown = 5
			}
			if a := book.List()[0]; !a.Connected || len(a.Rejections) != c.lacks || a.AckedSequence != shown {
				t.Errorf("shown is %+v", a)
			}
			if names := book.Unconfirmed(4, time.Now()); len(names) != 0 {
				t.Errorf("of the bundle before unconfirmed are %q", names)
			}
		})
	}
}

// The CA is restarted while two instances of an agent overlap, and one of them is back first. What the other one's proxies have
// is what they had, until it is back, or gone.
func TestAnInstanceIsAwayAcrossARestartOfTheCA(t *testing.T) {
	w := world.New(t, "")
	w.RA.AgentTTL = time.Hour
	first := w.AttestAgent(world.Agent)
	w.RA.AgentTTL = ca.MaxTTL
	subject := world.Agent
	subject.Pod, subject.PodUID = "agent-2", "pod-agent-2"
	second := w.AttestAgent(subject)
	w.RA.Agents.Connected(first.ID, first.Serial, "v1").Acknowledge(4, []string{"web.sock: rejects it: no"})
	w.RA.Agents.Connected(second.ID, second.Serial, "v2").Acknowledge(5, nil)
	book := w.RA.Agents
	unconfirmed := func(what string, at time.Time, want bool) {
		t.Helper()
		if names := book.Unconfirmed(5, at); (len(names) == 1) != want {
			t.Errorf("%s: unconfirmed are %q", what, names)
		}
		if names := book.Unconfirmed(4, at); len(names) != 0 {
			t.Errorf("%s: of the bundle before unconfirmed are %q", what, names)
		}
	}
	restart := func() {
		t.Helper()
		err := book.Flush(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if book, err = registration.OpenAgentBook(t.Context(), w.Store); err != nil {
			t.Fatal(err)
		}
	}
	restart()
	unconfirmed("nobody is back", time.Now(), true)
	book.Connected(second.ID, second.Serial, "v2").Acknowledge(5, nil)
	unconfirmed("one is back", time.Now(), true)
	restart() // what is stored is what all have
	back := book.Connected(second.ID, second.Serial, "v2")
	back.Acknowledge(5, nil)
	unconfirmed("one is back again", time.Now(), true)
	unconfirmed("the other one's SVID has ended", first.NotAfter.Add(time.Second), false)
	book.Connected(first.ID, first.Serial, "v1").Acknowledge(5, nil)
	unconfirmed("both are back", time.Now(), false)
	restart()
	back = book.Connected(second.ID, second.Serial, "v2")
	back.Close()
	unconfirmed("it is away again", time.Now(), false)
}
