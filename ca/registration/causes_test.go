package registration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
)

// morgue is a cluster that only ever says what has ended.
type morgue struct {
	Cluster
	takes time.Duration

	mu    sync.Mutex
	looks int
	gone  map[string]bool // by the UID of pods
}

func (m *morgue) looked() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.looks
}

func (m *morgue) take(pod string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.gone[pod] = true
}

func (m *morgue) Ended(_ context.Context, held []*attestor.Evidence) map[int]*refusal.Error {
	time.Sleep(m.takes)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.looks++
	ended := map[int]*refusal.Error{}
	for i, ev := range held {
		if m.gone[ev.PodUID] {
			ended[i] = refusal.New(refusal.PodGone, "pod %s does not exist", ev.PodName)
		}
	}
	return ended
}

func mortalAuthority(members map[string]Member) *Authority {
	journal := NewJournal(new(bytes.Buffer), NewRing(10), NewMetrics(prometheus.NewRegistry()), slog.New(slog.DiscardHandler))
	return &Authority{Config{Clusters: members, Agents: &AgentBook{}, Endings: NewEndings(), Journal: journal}}
}

func (e *Endings) add(agent, cluster, pod string, until time.Time) {
	e.hold("spiffe://mesh.test/ns/shop/sa/web", pod, until, true, &LedgerEvidence{
		Agent: agent, Cluster: cluster, Namespace: "shop", ServiceAccount: "web", ServiceAccountUID: "sa", Pod: pod, PodUID: pod, Node: "n", NodeUID: "n",
	})
}

func nothing(context.Context, time.Time, func(ca.LedgerEntry) (bool, error)) error { return nil }

const someAgent = "spiffe://mesh.test/meshca/agent/one/node1"

// A cluster whose looks last must not hold up another's, and is not asked without a pause itself. What ends is told within
// a second of when it is known.
func TestLooksHaveTheirPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quick, slow := &morgue{gone: map[string]bool{}}, &morgue{takes: 10 * time.Second, gone: map[string]bool{}}
		a := mortalAuthority(map[string]Member{"one": {Cluster: quick}, "two": {Cluster: slow}})
		a.Endings.add(someAgent, "one", "web-1", time.Now().Add(time.Hour))
		a.Endings.add(someAgent, "two", "web-2", time.Now().Add(time.Hour))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); a.WatchCauses(ctx, nothing, slog.New(slog.DiscardHandler)) }()
		time.Sleep(time.Minute - time.Millisecond)
		if quick.looked() != 60 || slow.looked() != 5 {
			t.Errorf("in a minute %d looks and %d slow ones", quick.looked(), slow.looked())
		}
		quick.take("web-1")
		began := time.Now()
		_, stale := a.Endings.Of(spiffeid.RequireFromString(someAgent))
		<-stale
		if took := time.Since(began); took > lookEvery {
			t.Errorf("told after %v", took)
		}
		cancel()
		<-done
	})
}

// A ledger that cannot be read is tried again, and holds up nothing that is issued meanwhile.
func TestTheLedgerIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &morgue{gone: map[string]bool{"web-1": true}}
		a := mortalAuthority(map[string]Member{"one": {Cluster: m}})
		ctx, cancel := context.WithCancel(t.Context())
		var tries atomic.Int32
		scan := func(context.Context, time.Time, func(ca.LedgerEntry) (bool, error)) error {
			if tries.Add(1) < 3 {
				return errors.New("the store is away")
			}
			return nil
		}
		done := make(chan struct{})
		go func() { defer close(done); a.WatchCauses(ctx, scan, slog.New(slog.DiscardHandler)) }()
		a.Endings.add(someAgent, "one", "web-1", time.Now().Add(time.Hour))
		time.Sleep(2 * time.Second)
		if _, told := a.Endings.Count(); told != 1 || tries.Load() != 1 {
			t.Errorf("%d are told after %d tries", told, tries.Load())
		}
		time.Sleep(time.Minute)
		if tries.Load() != 3 {
			t.Errorf("%d tries", tries.Load())
		}
		cancel()
		<-done
	})
}

// All of it is bounded, and forgotten once the SVIDs have ended by themselves.
func TestEndingsAreBounded(t *testing.T) {
	e, now := NewEndings(), time.Now()
	agent := spiffeid.RequireFromString(someAgent)
	hold := func(serial string, until time.Time, newest bool) {
		e.hold("spiffe://mesh.test/ns/shop/sa/web", serial, until, newest, &LedgerEvidence{
			Agent: someAgent, Cluster: "one", Namespace: "shop", ServiceAccount: "web", Pod: "p", PodUID: "p", Node: "n", NodeUID: "n",
		})
	}
	hold("ended", now.Add(-time.Second), true)
	hold("long", now.Add(2*time.Hour), true)
	for i := range maxSerials + 5 {
		hold(fmt.Sprint(i), now.Add(time.Hour), true)
	}
	hold("recalled", now.Add(2*time.Hour), false)
	hold("recalled", now.Add(2*time.Hour), false)
	gone := func() map[holding]*refusal.Error {
		all := map[holding]*refusal.Error{}
		holders, _ := e.of("one", now)
		for _, h := range holders {
			all[h] = refusal.New(refusal.PodGone, "%0300d", 1)
		}
		return all
	}
	e.end(now, gone())
	told, _ := e.Of(agent)
	// What ends first is left out, and of what ends together the oldest.
	s := told[0].Serials
	if len(s) != maxSerials || s[0] != fmt.Sprint(maxSerials+4) || s[maxSerials-3] != "7" || s[maxSerials-2] != "long" || s[maxSerials-1] != "recalled" {
		t.Errorf("told %q", s)
	}
	if len(told[0].Why.Detail) != maxEndingWhy || !told[0].Until.Equal(now.Add(2*time.Hour)) {
		t.Errorf("told %+v", told[0])
	}
	for i := range maxEndings + 5 {
		e.add(someAgent, "one", fmt.Sprint("web-", i), now.Add(time.Hour))
	}
	e.end(now, gone())
	if told, _ := e.Of(agent); len(told) != maxEndings {
		t.Errorf("%d are told", len(told))
	}
	for i := range maxEndings {
		for j := range maxSerials {
			e.hold("spiffe://mesh.test/ns/shop/sa/web", fmt.Sprint(j), now.Add(time.Hour), true, &LedgerEvidence{
				Agent: someAgent, Cluster: "one", Namespace: "shop", ServiceAccount: "web", Pod: "p", PodUID: fmt.Sprint(i), Node: "n", NodeUID: "n",
			})
		}
	}
	e.end(now, gone())
	if told, _ := e.Of(agent); len(told) != maxEndedSerials/maxSerials {
		t.Errorf("%d of %d serials each are told", len(told), maxSerials)
	}
	if held, _ := e.Count(); held != 0 {
		t.Errorf("%d are held", held)
	}

	_, stale := e.Of(agent)
	e.forget(now.Add(time.Hour - time.Second))
	select {
	case <-stale:
		t.Error("agents are told of nothing new")
	default:
	}
	e.forget(now.Add(time.Hour))
	if told, _ := e.Of(agent); len(told) != 0 {
		t.Errorf("%d are told still", len(told))
	}
	e.add(someAgent, "one", "web", now.Add(time.Hour))
	if holders, _ := e.of("one", now.Add(time.Hour)); len(holders) != 0 {
		t.Error("what has ended by itself is asked about")
	}
	if held, _ := e.Count(); held != 0 {
		t.Errorf("%d are held", held)
	}
}

// Nodes come and go, and each has an agent of another name.
func TestAgentsThatAreGoneAreForgotten(t *testing.T) {
	e, now := NewEndings(), time.Now()
	agent := func(i int) spiffeid.ID {
		return spiffeid.RequireFromString(fmt.Sprintf("spiffe://mesh.test/meshca/agent/one/n%d", i))
	}
	for i := range 100 {
		e.Of(agent(i))
	}
	e.add(agent(0).String(), "one", "web", now.Add(6*time.Hour))
	e.forget(now.Add(time.Hour))
	if len(e.told) != 100 {
		t.Errorf("%d of 100 agents are known after an hour", len(e.told))
	}
	_, stale := e.Of(agent(1))
	e.forget(now.Add(3 * time.Hour))
	if len(e.told) != 1 || e.told[agent(0).String()] == nil {
		t.Errorf("%d agents are known, want the one that holds something", len(e.told))
	}
	select {
	case <-stale:
	default:
		t.Error("who follows an agent that was forgotten never hears again")
	}
}

// An instance of an agent that is away counts for what it said last, until its cluster says that its pod is gone. One that is
// connected says for itself.
func TestAnInstanceEndsWithItsPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one := &morgue{gone: map[string]bool{}}
		a := mortalAuthority(map[string]Member{"one": {Cluster: one}})
		record := ca.AgentRecord{ID: someAgent, Cluster: "one"}
		for _, pod := range []string{"old", "next"} {
			record.Instances = append(record.Instances, ca.AgentInstance{
				Serial: pod, NotAfter: time.Now().Add(time.Hour), PodName: pod, PodUID: pod, NodeName: "n", NodeUID: "n",
				Namespace: "meshca", ServiceAccount: "agent", ServiceAccountUID: "sa",
			})
		}
		a.Agents.byID = map[string]*agentState{someAgent: {record: record}}
		id := spiffeid.RequireFromString(someAgent)
		old, next := a.Agents.Connected(id, "old", ""), a.Agents.Connected(id, "next", "")
		old.Acknowledge(4, nil)
		next.Acknowledge(5, nil)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); a.WatchCauses(ctx, nothing, slog.New(slog.DiscardHandler)) }()
		waits := func(what string, want bool) {
			t.Helper()
			time.Sleep(2 * lookSlowest)
			if names := a.Agents.Unconfirmed(5, time.Now()); (len(names) == 1) != want {
				t.Errorf("%s: unconfirmed are %q", what, names)
			}
		}
		one.take("old")
		waits("its pod is said to be gone, and it is connected", true)
		one.mu.Lock()
		delete(one.gone, "old")
		one.mu.Unlock()
		old.Close()
		waits("it is away", true)
		one.take("old")
		waits("its pod is gone", false)
		old.Acknowledge(4, nil)
		old.Close()
		waits("a dead one says something", false)

		// A process that follows knows it from its record, and hears of its end as well.
		one.mu.Lock()
		delete(one.gone, "old")
		one.mu.Unlock()
		state := &agentState{record: a.Agents.byID[someAgent].record}
		state.record.AckedSequence = 4
		state.recall(a.Agents)
		a.Agents.note(someAgent, func(s *agentState) { *s = *state })
		a.Agents.Connected(id, "next", "").Acknowledge(5, nil)
		waits("it is not back yet", true)
		one.take("old")
		waits("its pod is gone meanwhile", false)
		stop()
		<-ended
	})
}
