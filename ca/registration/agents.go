package registration

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
)

// maxInstances bounds how many SVIDs of one agent ID may call at a time. An agent renews well before its SVID ends and
// its successor on the node may overlap with it, so two or three are usual.
const maxInstances = 8

// AgentStore keeps what is known of agents.
//
// DeleteAgent forgets one and reports whether there was one. UpdateAgent reads the record (an empty one with its ID when
// there is none), lets change alter it, and writes it durably, all in one transaction; change may run more than once. All
// methods are safe for concurrent use.
type AgentStore interface {
	Agents(ctx context.Context) ([]ca.AgentRecord, error)
	UpdateAgent(ctx context.Context, id string, change func(*ca.AgentRecord) error) error
	DeleteAgent(ctx context.Context, id string) (bool, error)
}

// AgentBook is the CA's record of its agents: which SVIDs may call, and on which node and pod each was attested. Reads
// come from memory; what decides about access is in the store before it is in memory.
type AgentBook struct {
	store AgentStore

	admitting sync.Mutex // keeps memory in the store's order

	mu   sync.RWMutex
	byID map[string]*agentState
	// floor is the sequence below which acknowledgements confirm nothing: see ca.History.
	floor uint64
}

type agentState struct {
	record ca.AgentRecord
	// streams are the Sync streams, at most one of each instance: there is more than one instance while an agent's pod is
	// replaced by its successor. Each has proxies of its own below it, and says so for them alone.
	streams map[*AgentStream]struct{}
	// heard is when this process heard of the agent last, or began, with a monotonic reading: LastSeen may be of a clock that
	// was wrong.
	heard time.Time
	dirty bool // record has news (seen, acked, holds) that Flush has not stored
}

// instance is one agent SVID that may call, with the evidence to check again.
type instance struct {
	ca.AgentInstance
	cluster  string
	evidence attestor.Evidence
}

// AgentView is what status shows of an agent.
type AgentView struct {
	ca.AgentRecord
	Connected bool
	// Rejections are who below the agent lacks the newest bundle and why, in the agent's words.
	Rejections []string
	// inUse is until when something may be in use that was issued to it or through it, whatever that says; zero: not known.
	inUse time.Time
}

// CountsUntil is when the last SVID ends that was issued to the agent or through it, or is certainly in use no more, as what a
// clock far ahead has issued: until then it must trust what others are signed under.
func (v AgentView) CountsUntil() time.Time {
	until := v.HoldsUntil
	for _, i := range v.Instances {
		until = later(until, i.NotAfter)
	}
	if !v.inUse.IsZero() && v.inUse.Before(until) {
		return v.inUse
	}
	return until
}

// inUse is until when something may be in use that was issued when this process heard of its holder last, by the clock of
// whoever says that it is at now. It is counted by how long the process runs, and stands still while no clock is set.
func inUse(heard, at time.Time) time.Time {
	set := at.Round(0).Sub(heard.Round(0)) - time.Since(heard)
	return heard.Round(0).Add(ca.InUse + set.Truncate(time.Minute))
}

// OpenAgentBook reads the store.
func OpenAgentBook(ctx context.Context, store AgentStore) (*AgentBook, error) {
	records, err := store.Agents(ctx)
	if err != nil {
		return nil, err
	}
	b := &AgentBook{store: store, byID: make(map[string]*agentState, len(records))}
	for _, r := range records {
		s := &agentState{record: r}
		s.recall(b)
		b.byID[r.ID] = s
	}
	return b, nil
}

// admit records a new agent SVID before it leaves the CA.
func (b *AgentBook) admit(ctx context.Context, id spiffeid.ID, cluster, version string, svid ca.SVID, e attestor.Evidence) error {
	b.admitting.Lock()
	defer b.admitting.Unlock()
	now := time.Now()
	added := ca.AgentInstance{
		Serial: serial.String(svid.Chain[0].SerialNumber), NotAfter: svid.NotAfter,
		NodeName: e.NodeName, NodeUID: e.NodeUID, PodName: e.PodName, PodUID: e.PodUID,
		Namespace: e.Identity.Namespace(), ServiceAccount: e.Identity.ServiceAccount(), ServiceAccountUID: e.ServiceAccountUID,
	}
	var stored ca.AgentRecord
	// gofail: var agentAdmitting struct{}
	err := b.store.UpdateAgent(ctx, id.String(), func(r *ca.AgentRecord) error {
		r.Cluster, r.LastSeen = cluster, now
		if version != "" {
			r.Version = version
		}
		live := slices.DeleteFunc(slices.Clone(r.Instances), func(i ca.AgentInstance) bool { return !now.Before(i.NotAfter) })
		r.Instances = append([]ca.AgentInstance{added}, live[:min(len(live), maxInstances-1)]...)
		stored = *r
		return nil
	})
	// gofail: var agentAdmitted struct{}
	if err != nil {
		return refusal.New(refusal.StoreUnavailable, "agent %s could not be recorded: %w", id, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.byID[id.String()]
	if s == nil {
		s = &agentState{}
		b.byID[id.String()] = s
	}
	if s.record.ID != "" {
		stored.AckedSequence = s.record.AckedSequence
	}
	stored.HoldsUntil = later(stored.HoldsUntil, s.record.HoldsUntil)
	s.record, s.heard = stored, now
	return nil
}

// instance finds the SVID that calls. AGENT_UNKNOWN makes the agent attest itself anew.
func (b *AgentBook) instance(id spiffeid.ID, serial string) (instance, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if s := b.byID[id.String()]; s != nil {
		for _, i := range s.record.Instances {
			if i.Serial == serial {
				return known(s.record.Cluster, i)
			}
		}
	}
	return instance{}, refusal.New(refusal.AgentUnknown, "SVID %s of %s is not on record", serial, id)
}

func known(cluster string, i ca.AgentInstance) (instance, error) {
	identity, err := attestor.NewIdentity(cluster, i.Namespace, i.ServiceAccount)
	if err != nil {
		return instance{}, refusal.New(refusal.AgentUnknown, "its record is damaged: %w", err)
	}
	return instance{AgentInstance: i, cluster: cluster, evidence: attestor.Evidence{
		Proven: true, Identity: identity, ServiceAccountUID: i.ServiceAccountUID,
		PodName: i.PodName, PodUID: i.PodUID, NodeName: i.NodeName, NodeUID: i.NodeUID,
	}}, nil
}

// issuedThrough notes until when something lives that was issued through the agent.
func (b *AgentBook) issuedThrough(id string, notAfter time.Time) {
	b.note(id, func(s *agentState) {
		s.hear()
		s.record.HoldsUntil = later(s.record.HoldsUntil, notAfter)
	})
}

// hear notes that the agent was heard of.
func (s *agentState) hear() {
	s.heard = time.Now()
	s.record.LastSeen = s.heard
}

func (b *AgentBook) note(id string, change func(*agentState)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s := b.byID[id]; s != nil {
		change(s)
		s.dirty = true
	}
}

// List returns all agents by ID.
func (b *AgentBook) List() []AgentView { return b.views(time.Now()) }

// views are all agents by ID, as those of their instances have it that count at this moment.
func (b *AgentBook) views(at time.Time) []AgentView {
	b.mu.RLock()
	defer b.mu.RUnlock()
	views := make([]AgentView, 0, len(b.byID))
	for _, s := range b.byID {
		v := AgentView{AgentRecord: s.record, Connected: s.connected(), Rejections: s.lack(at), inUse: inUse(s.heard, at)}
		v.AckedSequence = s.acked(at)
		views = append(views, v)
	}
	slices.SortFunc(views, func(x, y AgentView) int {
		if x.ID < y.ID {
			return -1
		}
		return 1
	})
	return views
}

// Unconfirmed returns the IDs of the agents that count and have not acknowledged a bundle of this sequence or a later one.
// An agent counts at a moment when an SVID lives that was issued to it or through it; all do at the zero time, for when
// nobody knows what they hold.
func (b *AgentBook) Unconfirmed(set uint64, at time.Time) []string {
	b.mu.RLock()
	set = max(set, b.floor)
	b.mu.RUnlock()
	var names []string
	for _, a := range b.views(at) {
		if (at.IsZero() || at.Before(a.CountsUntil())) && a.AckedSequence < set {
			names = append(names, a.ID)
		}
	}
	return names
}

// doubt has acknowledgements of sequences below floor confirm nothing: they may be of bundles that are lost.
func (b *AgentBook) doubt(floor uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.floor = max(b.floor, floor)
}

// Recall notes what the ledger knows of SVIDs that were issued through agents, newest entry first, as far back as a
// crash can have cost news: they count, and nobody would know.
func (b *AgentBook) Recall(ctx context.Context, scan func(ctx context.Context, fn func(ca.LedgerEntry) (bool, error)) error) error {
	var newest time.Time
	return scan(ctx, func(e ca.LedgerEntry) (bool, error) {
		if newest.IsZero() {
			newest = e.IssuedAt
		}
		var evidence LedgerEvidence
		if err := json.Unmarshal(e.Evidence, &evidence); err != nil {
			return false, fmt.Errorf("the ledger's entry %d: %w", e.Index, err)
		}
		b.note(evidence.Agent, func(s *agentState) { s.record.HoldsUntil = later(s.record.HoldsUntil, e.NotAfter) })
		return newest.Sub(e.IssuedAt) < 2*flushEvery, nil
	})
}

// flushEvery is how often news are stored.
const flushEvery = 30 * time.Second

// Flush stores the news that do not decide about access: last seen, acknowledged, holds until. It is called every half
// minute and at the end; a crash loses at most that much of them.
func (b *AgentBook) Flush(ctx context.Context) error {
	b.mu.Lock()
	var news []ca.AgentRecord
	for _, s := range b.byID {
		if s.dirty {
			s.dirty = false
			news = append(news, s.record)
		}
	}
	b.mu.Unlock()
	for i, n := range news {
		err := b.store.UpdateAgent(ctx, n.ID, func(r *ca.AgentRecord) error {
			r.Cluster, r.Version, r.LastSeen = n.Cluster, n.Version, later(r.LastSeen, n.LastSeen)
			r.AckedSequence = n.AckedSequence
			r.HoldsUntil = later(r.HoldsUntil, n.HoldsUntil)
			return nil
		})
		if err != nil {
			for _, left := range news[i:] {
				b.note(left.ID, func(*agentState) {})
			}
			return refusal.New(refusal.StoreUnavailable, "agents' last news could not be stored: %w", err)
		}
	}
	return nil
}

// Forget drops agents that have no SVID that may call, hold nothing that lives, and were not heard of since: the nodes
// of an autoscaled cluster come and go.
func (b *AgentBook) Forget(ctx context.Context, since time.Time) error {
	b.admitting.Lock()
	defer b.admitting.Unlock()
	now := time.Now()
	var gone []string
	b.mu.Lock()
	for id, s := range b.byID {
		v := AgentView{AgentRecord: s.record, inUse: inUse(s.heard, now)}
		// A clock that was ahead cannot have seen it later than this process heard of it.
		seen := v.LastSeen
		if heard := v.inUse.Add(-ca.InUse); heard.Before(seen) {
			seen = heard
		}
		if !s.connected() && !now.Before(v.CountsUntil()) && seen.Before(since) {
			gone = append(gone, id)
			delete(b.byID, id)
		}
	}
	b.mu.Unlock()
	for _, id := range gone {
		if _, err := b.store.DeleteAgent(ctx, id); err != nil {
			return refusal.New(refusal.StoreUnavailable, "agents that are gone could not be forgotten: %w", err)
		}
	}
	return nil
}

// Run flushes every half minute until ctx ends. Whoever ends it flushes once more, after the last call.
func (b *AgentBook) Run(ctx context.Context, failed func(error)) {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := b.Flush(ctx); err != nil {
				failed(err)
			}
		}
	}
}

func later(x, y time.Time) time.Time {
	if x.After(y) {
		return x
	}
	return y
}
