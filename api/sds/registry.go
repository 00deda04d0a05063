package sds

import (
	"context"
	"net"
	"sync"

	"google.golang.org/grpc/peer"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// registry knows the open streams. The zero registry is empty.
type registry struct {
	mu sync.Mutex
	// open has each stream that was let in; what it shows is written by its own goroutine under mu.
	open map[*stream]struct{}
	// peers counts the streams of each peer.
	peers map[string]int
	// changed is set when a stream ends, begins to ask, or takes a bundle.
	changed rotation.Current[struct{}]
}

// enter lets a stream in, or refuses it.
func (r *registry) enter(st *stream, l Limits) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.open) >= l.Streams {
		return refusal.New(refusal.Overloaded, "%d SDS streams are open (limit: Streams)", len(r.open))
	}
	if n := r.peers[st.shown.Peer]; n >= l.StreamsPerPeer {
		return refusal.New(refusal.PeerLimit, "the peer has %d SDS streams open (limit: StreamsPerPeer)", n)
	}
	if r.open == nil {
		r.open, r.peers = map[*stream]struct{}{}, map[string]int{}
	}
	r.open[st] = struct{}{}
	r.peers[st.shown.Peer]++
	return nil
}

func (r *registry) leave(st *stream) {
	r.mu.Lock()
	delete(r.open, st)
	if r.peers[st.shown.Peer]--; r.peers[st.shown.Peer] == 0 {
		delete(r.peers, st.shown.Peer)
	}
	r.mu.Unlock()
	r.changed.Set(struct{}{})
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
