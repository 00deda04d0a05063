package sds

import (
	"context"
	"net"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/peer"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// registry knows the open streams. The zero registry is empty.
type registry struct {
	mu sync.Mutex
	// open has each stream that was let in; what it shows is written by its own goroutine under mu.
	open map[*stream]struct{}
	// peers has what each peer costs, by its account. One that has left is known until its pace is as good as new, or it
	// would come back for another burst.
	peers map[string]*load
	swept time.Time
	// spare is what the names of peers take beyond what each has for itself, in bytes.
	spare int
	// changed is set when a stream ends, begins to ask, or takes a bundle.
	changed rotation.Current[struct{}]
}

// load is what one peer costs over all its streams.
type load struct {
	streams, bytes int
	pace           *rate.Limiter
}

// enter lets a stream in, or refuses it.
func (r *registry) enter(st *stream, a Account, l Limits) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.open) >= l.Streams {
		return refusal.New(refusal.Overloaded, "%d SDS streams are open (limit: %s)", len(r.open), l.called("Streams"))
	}
	r.sweep()
	if r.open == nil {
		r.open, r.peers = map[*stream]struct{}{}, map[string]*load{}
	}
	p := r.peers[a.Name]
	if p == nil {
		p = &load{pace: rate.NewLimiter(rate.Limit(l.RequestsPerSecond), l.RequestsPerSecond)}
		r.peers[a.Name] = p
	}
	if p.streams >= a.Streams {
		return refusal.New(refusal.PeerLimit, "the peer has %d SDS streams open (limit: %s)", p.streams, a.Limit)
	}
	p.streams++
	r.open[st], st.load = struct{}{}, p
	return nil
}

// charge counts for the stream's peer what its subscription takes now, or refuses that. What a peer takes beyond its own is of
// what all share.
func (r *registry) charge(st *stream, bytes int, l *Limits) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	spare := r.spare - st.load.over(l) + load{bytes: st.load.bytes - st.charged + bytes}.over(l)
	if spare > r.spare && spare > l.SpareNameBytes {
		return refusal.New(refusal.PeerLimit, "the names that the peer asks for over its %d streams take more than %d bytes together (limit: %s), "+
			"and more than what all peers share is left of (limit: %s)", st.load.streams, l.NameBytes, l.called("NameBytes"), l.called("SpareNameBytes"))
	}
	r.spare = spare
	st.load.bytes += bytes - st.charged
	st.charged = bytes
	return nil
}

// over is what a peer's names take beyond what it has for itself.
func (p load) over(l *Limits) int { return max(0, p.bytes-l.NameBytes) }

func (r *registry) leave(st *stream) {
	r.mu.Lock()
	delete(r.open, st)
	st.load.streams--
	r.spare -= st.load.over(&st.server.config.Limits)
	st.load.bytes -= st.charged
	r.spare += st.load.over(&st.server.config.Limits)
	r.sweep()
	r.mu.Unlock()
	r.changed.Set(struct{}{})
}

// sweep forgets the peers that have left and are owed no waiting, once a second at most.
func (r *registry) sweep() {
	now := time.Now()
	if now.Sub(r.swept) < time.Second {
		return
	}
	r.swept = now
	for name, p := range r.peers {
		if p.streams == 0 && p.pace.TokensAt(now) >= float64(p.pace.Burst()) {
			delete(r.peers, name)
		}
	}
}

// show lets a stream change what it shows, and wakes whoever waits for acknowledgements if it matters to them.
func (r *registry) show(st *stream, change func(*stream)) {
	r.mu.Lock()
	sequence, waiting, asked := st.shown.Sequence, st.shown.Waiting, st.asked
	change(st)
	moved := sequence != st.shown.Sequence || waiting != st.shown.Waiting || asked != st.asked
	r.mu.Unlock()
	if moved {
		r.changed.Set(struct{}{})
	}
}

func (r *registry) all() []Stream {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]Stream, 0, len(r.open))
	for st := range r.open {
		if st.asked {
			all = append(all, st.shown)
		}
	}
	return all
}

func (r *registry) lacking(sequence uint64) (int, <-chan struct{}) {
	_, changed := r.changed.Get()
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for st := range r.open {
		if st.asked && !st.shown.Waiting && st.shown.Sequence < sequence {
			n++
		}
	}
	return n, changed
}

// peerOf is the default Config.Peer: the path of a unix socket, else the host of the peer's address.
func peerOf(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return ""
	}
	if p.LocalAddr != nil && p.LocalAddr.Network() == "unix" {
		return p.LocalAddr.String()
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	if err != nil {
		return p.Addr.String()
	}
	return host
}
