package registration

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

const (
	// maxSerials bounds what is remembered of one holder: as many SVIDs as a pod may have signed in half an hour, unless that was
	// raised. Sixteen volumes of whatever lives, each renewed twice in its life, have fewer that live.
	maxSerials = DefaultSVIDsPerPod
	// maxEndings, and so many serials in them, bound what is sent whole to an agent at each change, a megabyte at most; the
	// oldest, which it heard of first, are left out.
	maxEndings      = 2000
	maxEndedSerials = 16 * maxEndings
	// maxEndingWhy bounds the sentence that goes with one, in bytes.
	maxEndingWhy = 200
	// forgetAgents is how long ago an agent asked that is gone: each of its connections, which last an hour, begins with that.
	forgetAgents = 2 * time.Hour
)

// Ending says that what SVIDs were given for is no more. It is never changed once published.
type Ending struct {
	// Serials are those of the SVIDs, in lower-case hex.
	Serials []string
	Why     *refusal.Error
	// Until is the end of the last of them.
	Until time.Time
}

// Endings knows what lives of what was issued through agents, and what of it has ended with its cause before its time. All
// of it is in memory: the ledger says what was issued, and the clusters what has ended, after a start too.
type Endings struct {
	mu   sync.Mutex
	held map[holding]*lifetime
	told map[string]*told // by agent
}

// told is what an agent is told.
type told struct {
	*rotation.Current[[]Ending]
	asked time.Time // when it was asked for last
}

// holding is who holds SVIDs, and by which objects of the cluster; all of them by UID, for names are used again.
type holding struct {
	agent, cluster, id                 string
	podUID, serviceAccountUID, nodeUID string
}

// lifetime is what one holder has.
type lifetime struct {
	evidence attestor.Evidence
	svids    []living // newest first
	until    time.Time
}

// living is an SVID that may be in use. Which ones are, nobody says: a pod's volumes share an ID, and each renews its own in its
// own time, one every few minutes, another every few hours. So none is taken to be replaced by a newer one.
type living struct {
	serial   string
	notAfter time.Time
}

// NewEndings knows nothing yet.
func NewEndings() *Endings {
	return &Endings{held: map[holding]*lifetime{}, told: map[string]*told{}}
}

// Of returns what has ended of what was issued through an agent, and a channel that closes when that changes.
func (e *Endings) Of(agent spiffeid.ID) ([]Ending, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	t := e.ofAgent(agent.String())
	t.asked = time.Now()
	return t.Get()
}

// ofAgent is called with e.mu held.
func (e *Endings) ofAgent(agent string) *told {
	t := e.told[agent]
	if t == nil {
		t = &told{rotation.NewCurrent[[]Ending](nil), time.Now()}
		e.told[agent] = t
	}
	return t
}

// issued notes an SVID that goes to an agent.
func (e *Endings) issued(d *Decision, svid ca.SVID) {
	ev := &d.Evidence
	e.hold(svid.ID.String(), serial.String(svid.Chain[0].SerialNumber), svid.NotAfter, true, &LedgerEvidence{
		Agent: d.agent(), Cluster: ev.Identity.Cluster(), Namespace: ev.Identity.Namespace(), ServiceAccount: ev.Identity.ServiceAccount(),
		ServiceAccountUID: ev.ServiceAccountUID, Pod: ev.PodName, PodUID: ev.PodUID, Node: ev.NodeName, NodeUID: ev.NodeUID, Method: ev.Method,
	})
}

// hold notes an SVID: newest says that it is, else it is older than all that were noted.
func (e *Endings) hold(id, serial string, notAfter time.Time, newest bool, v *LedgerEvidence) {
	h := holding{agent: v.Agent, cluster: v.Cluster, id: id, podUID: v.PodUID, serviceAccountUID: v.ServiceAccountUID, nodeUID: v.NodeUID}
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.held[h]
	if l == nil {
		identity, err := attestor.NewIdentity(v.Cluster, strings.Clone(v.Namespace), strings.Clone(v.ServiceAccount))
		if err != nil || v.Agent == "" || v.Pod == "" || v.PodUID == "" || v.Node == "" || v.NodeUID == "" {
			return // of nothing that a cluster could be asked about, or of nobody who could be told
		}
		// Clones: what comes out of a token would keep all of it in memory.
		h.podUID, h.serviceAccountUID, h.nodeUID = strings.Clone(h.podUID), strings.Clone(h.serviceAccountUID), strings.Clone(h.nodeUID)
		l = &lifetime{evidence: attestor.Evidence{
			Proven: true, Identity: identity, Method: v.Method, ServiceAccountUID: h.serviceAccountUID,
			PodName: strings.Clone(v.Pod), PodUID: h.podUID, NodeName: strings.Clone(v.Node), NodeUID: h.nodeUID,
		}}
		e.held[h] = l
	}
	l.until = later(l.until, notAfter)
	l.add(living{serial, notAfter}, newest, time.Now())
}

// add notes one more, and leaves out what has ended by itself. Beyond the bound that is what ends first.
func (l *lifetime) add(x living, newest bool, now time.Time) {
	l.svids = slices.DeleteFunc(l.svids, func(y living) bool { return !now.Before(y.notAfter) })
	switch {
	case slices.ContainsFunc(l.svids, func(y living) bool { return y.serial == x.serial }):
	case newest:
		l.svids = slices.Insert(l.svids, 0, x)
	default:
		l.svids = append(l.svids, x)
	}
	if len(l.svids) <= maxSerials {
		return
	}
	first := 0
	for i, y := range l.svids {
		if !y.notAfter.After(l.svids[first].notAfter) { // of those that end together the oldest
			first = i
		}
	}
	l.svids = slices.Delete(l.svids, first, first+1)
}

// serials are those of what lives, newest first.
func (l *lifetime) serials(now time.Time) (all []string) {
	for _, x := range l.svids {
		if now.Before(x.notAfter) {
			all = append(all, x.serial)
		}
	}
	return all
}

// Recall notes what lives by the ledger. What is issued meanwhile is noted as ever.
func (e *Endings) Recall(ctx context.Context, scan LedgerScan) error {
	return scan(ctx, time.Now(), func(x ca.LedgerEntry) (bool, error) {
		if x.Profile != ca.ProfileWorkload {
			return true, nil
		}
		var v LedgerEvidence
		if err := json.Unmarshal(x.Evidence, &v); err != nil {
			return false, fmt.Errorf("the ledger's entry %d: %w", x.Index, err)
		}
		e.hold(x.ID, serial.String(new(big.Int).SetBytes(x.Serial)), x.NotAfter, false, &v)
		return true, nil
	})
}

// of are the holders in a cluster, without those whose last SVID has ended, and their evidence, which does not change.
func (e *Endings) of(cluster string, now time.Time) (holders []holding, evidence []*attestor.Evidence) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for h, l := range e.held {
		switch {
		case h.cluster != cluster:
		case !now.Before(l.until):
			delete(e.held, h)
		default:
			holders, evidence = append(holders, h), append(evidence, &l.evidence)
		}
	}
	return holders, evidence
}

// ended is one holder with what it had.
type ended struct {
	holding
	evidence attestor.Evidence
	serials  []string // newest first, at least one
	until    time.Time
	why      *refusal.Error
}

// end takes the holders out and tells their agents. It returns what they had.
func (e *Endings) end(now time.Time, gone map[holding]*refusal.Error) []ended {
	e.mu.Lock()
	defer e.mu.Unlock()
	byAgent, all := map[string][]Ending{}, make([]ended, 0, len(gone))
	for h, why := range gone {
		l := e.held[h]
		if l == nil {
			continue
		}
		delete(e.held, h)
		serials := l.serials(now)
		if len(serials) == 0 {
			continue // it ended by itself meanwhile
		}
		all = append(all, ended{h, l.evidence, serials, l.until, why})
		short := &refusal.Error{Reason: why.Reason, Detail: refusal.Clip(why.Detail, maxEndingWhy)}
		byAgent[h.agent] = append(byAgent[h.agent], Ending{Serials: serials, Why: short, Until: l.until})
	}
	for agent, fresh := range byAgent {
		c := e.ofAgent(agent)
		c.Set(lastOf(append(alive(c.Value(), now), fresh...)))
	}
	slices.SortFunc(all, func(x, y ended) int { return cmp.Compare(x.evidence.PodName, y.evidence.PodName) })
	return all
}

// lastOf are the last of them, as many as are told.
func lastOf(told []Ending) []Ending {
	from, serials := len(told), 0
	for from > 0 && len(told)-from < maxEndings {
		if serials += len(told[from-1].Serials); serials > maxEndedSerials {
			break
		}
		from--
	}
	return told[from:]
}

// alive are those whose SVIDs have not all ended by themselves.
func alive(told []Ending, now time.Time) []Ending {
	return slices.DeleteFunc(slices.Clone(told), func(x Ending) bool { return !now.Before(x.Until) })
}

// forget leaves out what has ended by itself meanwhile. That is news to nobody, so agents are told when it is worth it. An agent
// that holds nothing, is told nothing and has not asked for long is forgotten: nodes come and go.
func (e *Endings) forget(now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	holding := map[string]bool{}
	for h := range e.held {
		holding[h.agent] = true
	}
	for agent, c := range e.told {
		before := c.Value()
		if kept := alive(before, now); len(kept) <= len(before)/2 && len(before) > 0 {
			c.Set(kept)
		}
		if len(c.Value()) == 0 && !holding[agent] && now.Sub(c.asked) > forgetAgents {
			delete(e.told, agent)
			c.Set(nil) // who follows it in spite of all asks again
		}
	}
}

// Count is how many holders there are of what lives, and how many endings agents are told.
func (e *Endings) Count() (held, told int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for c := range maps.Values(e.told) {
		told += len(c.Value())
	}
	return len(e.held), told
}
