package inbound

import (
	"slices"
	"sync"
	"time"
)

// Room has places for connections, or for what connections have begun, of which nothing good is known yet. Whoever has
// opened the most of them cannot keep others out: when all places are taken, the oldest connection of the address that has
// the most gives way to a newcomer. Where nobody has more than one, it is the oldest in an IPv6 /64 that has more than half
// of the places, or else the oldest of all, if it has had its time: many who come at once do not take the places from each
// other.
type Room struct {
	size  int
	grace time.Duration

	mu     sync.Mutex
	guests []*guest // the oldest first
	by     map[string]int
}

type guest struct {
	host, network string
	since         time.Time
	giveWay       func()
}

// NewRoom has so many places. Grace is how old one must be to give way where nobody has more than one: what an honest one takes.
func NewRoom(size int, grace time.Duration) *Room {
	return &Room{size: max(1, size), grace: grace, by: map[string]int{}}
}

// Enter takes a place for a connection from an address, until leave is called, which may be done more than once. giveWay is
// called if the place goes to another, and is to close the connection. ok is false where it is the newcomer that finds
// none.
func (r *Room) Enter(address string, giveWay func()) (leave func(), ok bool) {
	g := &guest{host: Host(address), network: Network(address), since: time.Now(), giveWay: giveWay}
	out, ok := r.enter(g)
	if out != nil {
		out.giveWay()
	}
	return func() { r.leave(g) }, ok
}

// enter also returns who has lost its place for it.
func (r *Room) enter(g *guest) (out *guest, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.guests) >= r.size {
		if out = r.loser(g); out == nil {
			return nil, false
		}
		r.remove(out)
	}
	r.guests = append(r.guests, g)
	r.by[g.host]++
	return out, true
}

// loser is who gives way to a newcomer; nil: nobody. r.mu is held here and below.
func (r *Room) loser(g *guest) *guest {
	host, most := g.host, r.by[g.host]+1
	for h, n := range r.by {
		if n > most {
			host, most = h, n
		}
	}
	if most > 1 {
		return r.oldest(func(o *guest) bool { return o.host == host })
	}
	crowd, all := r.crowd()
	o := r.oldest(func(o *guest) bool { return all || o.network == crowd })
	if !all && g.network != crowd || g.since.Sub(o.since) > r.grace {
		return o
	}
	return nil
}

// crowd is the network that has more than half of the places; all: none has.
func (r *Room) crowd() (network string, all bool) {
	by := map[string]int{}
	for _, o := range r.guests {
		if by[o.network]++; by[o.network] > r.size/2 && by[o.network] > 1 {
			return o.network, false
		}
	}
	return "", true
}

func (r *Room) oldest(of func(*guest) bool) *guest {
	return r.guests[slices.IndexFunc(r.guests, of)]
}

func (r *Room) leave(g *guest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.remove(g)
}

// remove does nothing for one that is gone.
func (r *Room) remove(g *guest) {
	i := slices.Index(r.guests, g)
	if i < 0 {
		return
	}
	r.guests = slices.Delete(r.guests, i, i+1)
	if r.by[g.host]--; r.by[g.host] == 0 {
		delete(r.by, g.host)
	}
}
