package agent

import (
	"net"
	"sync"

	"github.com/meshca/meshca/rotation"
)

// account is whom a workload's connections and streams are counted for, and how many that may have: a pod, for all its sockets
// together, or a socket that is no pod's.
type account struct {
	name                 string
	connections, streams int
	// limit is where the number of streams is configured.
	limit string
}

// account is the workload's. Where it is a socket's alone, SDS has its number of streams.
func (c *Config) account(w Workload) account {
	uid := w.PodUID
	if uid == "" {
		uid = w.Pod.UID
	}
	if uid == "" {
		return account{name: w.Socket, connections: c.ConnectionsPerSocket, limit: "sds.streamsPerSocket"}
	}
	return account{name: uid, connections: c.ConnectionsPerPod, streams: c.StreamsPerPod, limit: "sds.streamsPerPod"}
}

// places counts the open connections of each account, over all its sockets.
type places struct {
	freed rotation.Current[struct{}]

	mu   sync.Mutex
	open map[string]int
}

func newPlaces() *places { return &places{open: map[string]int{}} }

// door is where the connections of one account come in.
type door struct {
	account
	places *places
}

func (a *Agent) door(w *workload) door { return door{a.config.account(w.Workload), a.places} }

// enter takes a place, until leave is called, as often as that may be. ok is false where the account has all of its own.
func (d door) enter() (leave func(), ok bool) {
	p := d.places
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open[d.name] >= d.connections {
		return nil, false
	}
	p.open[d.name]++
	return sync.OnceFunc(func() { p.leave(d.name) }), true
}

func (p *places) leave(name string) {
	p.mu.Lock()
	if p.open[name]--; p.open[name] <= 0 {
		delete(p.open, name)
	}
	p.mu.Unlock()
	p.freed.Set(struct{}{})
}

// await is enter that waits until there is a place, or done closes.
func (d door) await(done <-chan struct{}) (leave func(), err error) {
	for {
		_, freed := d.places.freed.Get() // first: a place that is given back meanwhile closes it
		if leave, ok := d.enter(); ok {
			return leave, nil
		}
		select {
		case <-freed:
		case <-done:
			return nil, net.ErrClosed
		}
	}
}
