package issuance

import (
	"context"
	"net"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/tap"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca/registration"
)

// Limits bound what one peer may cost. A peer is an agent by its SVID; whoever shows none is a peer by its address, and
// all of those together are bounded too. The zero value of a field takes its default.
type Limits struct {
	// CallsPerSecond of one peer, with bursts of four times as many. Default 50.
	CallsPerSecond float64 `json:"callsPerSecond"`
	// BytesPerSecond of tokens and CSRs of one peer, with bursts of eight times as many. Default 4 MiB.
	BytesPerSecond int `json:"bytesPerSecond"`
	// OpenCalls of one peer, streams among them. Default 32.
	OpenCalls int `json:"openCalls"`
	// OpenCallsWithoutSVID of all callers together that show no SVID. Default 256.
	OpenCallsWithoutSVID int `json:"openCallsWithoutSVID"`
	// RequestsInFlight is the number of CSRs that the CA works on at a time, of all peers. Default 4096.
	RequestsInFlight int `json:"requestsInFlight"`
	// Connections that are open at a time, of all peers. Default 16384.
	Connections int `json:"connections"`
}

// maxPeers bounds the memory of peers' accounts; idle ones are forgotten first.
const maxPeers = 65_536

func (l Limits) withDefaults() Limits {
	set := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	if l.CallsPerSecond <= 0 {
		l.CallsPerSecond = 50
	}
	set(&l.BytesPerSecond, 4<<20)
	set(&l.OpenCalls, 32)
	set(&l.OpenCallsWithoutSVID, 256)
	set(&l.RequestsInFlight, 4096)
	set(&l.Connections, 16384)
	return l
}

// accounts hold what each peer has used.
type accounts struct {
	limits Limits

	mu        sync.Mutex
	peers     map[string]*account
	strangers int // open calls of callers without an SVID
}

type account struct {
	calls, bytes *rate.Limiter
	open         int
	last         time.Time
}

func newAccounts(l Limits) *accounts {
	return &accounts{limits: l.withDefaults(), peers: make(map[string]*account)}
}

// admit is grpc's tap: it runs when a call's headers have come, before anything is read or kept for it. The call is
// over when ctx is.
func (a *accounts) admit(ctx context.Context, _ *tap.Info) (context.Context, error) {
	caller, err := callerOf(ctx)
	if err != nil {
		return nil, refusal.Status(err)
	}
	key, stranger := peerKey(caller)
	now := time.Now()

	a.mu.Lock()
	defer a.mu.Unlock()
	p, err := a.peer(key, now)
	if err != nil {
		return nil, refusal.Status(err)
	}
	switch {
	case stranger && a.strangers >= a.limits.OpenCallsWithoutSVID:
		return nil, refusal.Status(refusal.New(refusal.Overloaded, "%d calls without an SVID are open (openCallsWithoutSVID)", a.strangers).After(time.Second))
	case p.open >= a.limits.OpenCalls:
		return nil, refusal.Status(refusal.New(refusal.PeerLimit, "%d calls of this peer are open (openCalls)", p.open).After(time.Second))
	case !p.calls.AllowN(now, 1):
		return nil, refusal.Status(refusal.New(refusal.PeerLimit, "more than %g calls a second (callsPerSecond)", a.limits.CallsPerSecond).After(time.Second))
	}
	p.open++
	if stranger {
		a.strangers++
	}
	context.AfterFunc(ctx, func() { a.release(p, stranger) })
	return ctx, nil
}

func (a *accounts) release(p *account, stranger bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p.open--
	if stranger {
		a.strangers--
	}
}

// spend charges a peer for the bytes of a call.
func (a *accounts) spend(c registration.Caller, n int) error {
	key, _ := peerKey(c)
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	p, err := a.peer(key, now)
	if err != nil {
		return err
	}
	if !p.bytes.AllowN(now, n) {
		return refusal.New(refusal.PeerLimit, "more than %d bytes a second (bytesPerSecond)", a.limits.BytesPerSecond).After(time.Second)
	}
	return nil
}

// peer finds or opens an account; a.mu is held.
func (a *accounts) peer(key string, now time.Time) (*account, error) {
	if p := a.peers[key]; p != nil {
		p.last = now
		return p, nil
	}
	if len(a.peers) >= maxPeers {
		a.forgetIdle(now)
		if len(a.peers) >= maxPeers {
			return nil, refusal.New(refusal.Overloaded, "%d peers have calls open or had them within a minute", len(a.peers)).After(5 * time.Second)
		}
	}
	p := &account{
		calls: rate.NewLimiter(rate.Limit(a.limits.CallsPerSecond), max(1, int(4*a.limits.CallsPerSecond))),
		bytes: rate.NewLimiter(rate.Limit(a.limits.BytesPerSecond), max(maxMessage, 8*a.limits.BytesPerSecond)),
		last:  now,
	}
	a.peers[key] = p
	return p, nil
}

func (a *accounts) forgetIdle(now time.Time) {
	for key, p := range a.peers {
		if p.open == 0 && now.Sub(p.last) > time.Minute {
			delete(a.peers, key)
		}
	}
}

func peerKey(c registration.Caller) (key string, stranger bool) {
	if !c.ID.IsZero() {
		return c.ID.String(), false
	}
	host, _, err := net.SplitHostPort(c.Address)
	if err != nil {
		host = c.Address
	}
	return host, true
}

// slots is a semaphore that never waits: who finds none is told to come back.
type slots chan struct{}

func (s slots) take(n int) (release func(), err error) {
	for i := range n {
		select {
		case s <- struct{}{}:
		default:
			for range i {
				<-s
			}
			return nil, refusal.New(refusal.Overloaded, "%d requests are in hand (requestsInFlight)", cap(s)).After(time.Second)
		}
	}
	return func() {
		for range n {
			<-s
		}
	}, nil
}
