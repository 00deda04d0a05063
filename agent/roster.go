package agent

import (
	"slices"
	"sync"

	"github.com/meshca/meshca/api/refusal"
)

// roster is the workloads of now. Those of the configuration are always there, those of sources come and go.
type roster struct {
	mu       sync.RWMutex
	all      []*workload // replaced, never changed: who walks it holds no lock
	bySocket map[string]*workload
}

// list returns the workloads of now, in the order in which they came.
func (r *roster) list() []*workload {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.all
}

// at returns the workload whose socket this is, or nil.
func (r *roster) at(socket string) *workload {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.bySocket[socket]
}

// add takes a workload in.
func (r *roster) add(w *workload) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.bySocket[w.Socket] != nil:
		return refusal.New(refusal.SocketInUse, "the socket %s is already a workload's", w.Socket)
	case len(r.all) >= maxWorkloads:
		return refusal.New(refusal.Overloaded, "this agent keeps %d workloads, as many as it may", len(r.all))
	}
	if r.bySocket == nil {
		r.bySocket = make(map[string]*workload)
	}
	r.bySocket[w.Socket] = w
	r.all = append(slices.Clip(r.all), w)
	return nil
}

// remove lets a workload go.
func (r *roster) remove(w *workload) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.bySocket[w.Socket] != w {
		return
	}
	delete(r.bySocket, w.Socket)
	r.all = slices.DeleteFunc(slices.Clone(r.all), func(other *workload) bool { return other == w })
}
