package issuance

import (
	"context"
	"fmt"
	"net/netip"
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
	// BytesPerSecond of messages of one peer, with bursts of eight times as many. Default 4 MiB.
	BytesPerSecond int `json:"bytesPerSecond"`
	// OpenCalls of one peer, streams among them. Default 32.
	OpenCalls int `json:"openCalls"`
	// OpenCallsWithoutSVID of all callers together that show no SVID. Default 256.
	OpenCallsWithoutSVID int `json:"openCallsWithoutSVID"`
	// OpenRequests is the number of CSRs of one peer that the CA works on at a time. Default 1024.
	OpenRequests int `json:"openRequests"`
	// RequestsInFlight is the number of CSRs that the CA works on at a time, of all peers. Default 4096.
	RequestsInFlight int `json:"requestsInFlight"`
	// Connections that are open at a time, of all peers. Default 16384.
	Connections int `json:"connections"`
	// ConnectionsPerAddress that are open at a time. An agent has one, for a moment two. Default 256; raise it where many
	// agents come from behind one address.
	ConnectionsPerAddress int `json:"connectionsPerAddress"`
}

// maxLimit bounds each of them: no machine serves more, and nothing overflows below it.
const maxLimit = 1 << 30

// Check refuses limits that cannot be meant.
func (l Limits) Check() error {
	if l.CallsPerSecond < 0 || l.CallsPerSecond > maxLimit {
		return fmt.Errorf("callsPerSecond: %g does not lie between 0 (the default) and %d", l.CallsPerSecond, maxLimit)
	}
	for _, f := range []struct {
		key   string
		value int
	}{
		{"bytesPerSecond", l.BytesPerSecond}, {"openCalls", l.OpenCalls}, {"openCallsWithoutSVID", l.OpenCallsWithoutSVID},
		{"openRequests", l.OpenRequests}, {"requestsInFlight", l.RequestsInFlight}, {"connections", l.Connections},
		{"connectionsPerAddress", l.ConnectionsPerAddress},
	} {
		if f.value < 0 || f.value > maxLimit {
			return fmt.Errorf("%s: %d does not lie between 0 (the default) and %d", f.key, f.value, maxLimit)
		}
	}
	return nil
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
	set(&l.OpenRequests, 1024)
	set(&l.RequestsInFlight, 4096)
	set(&l.Connections, 16384)
	set(&l.ConnectionsPerAddress, 256)
	return l
}

// accounts hold what each peer has used.
type accounts struct {
	limits Limits
	// refused gets a line for what a limit refused: the first, and then one a while for each peer.
	refused func(c registration.Caller, err error)

	mu        sync.Mutex
	peers     map[string]*account
	strangers int // open calls of callers without an SVID
}

type account struct {
	calls, bytes *rate.Limiter
	open         int // calls
	requests     int // CSRs in hand
	last         time.Time
	told         time.Time // when a refusal was last recorded
	untold       int       // refusals since
}

// tellEvery is how often a peer that is over its limits leaves a line: the audit log must not become the attack.
const tellEvery = 10 * time.Second

func newAccounts(l Limits, refused func(registration.Caller, error)) *accounts {
	return &accounts{limits: l.withDefaults(), refused: refused, peers: make(map[string]*account)}
}

// admit is grpc's tap: it runs when a call's headers have come, before anything is read or kept for it. The call is
// over when ctx is.
func (a *accounts) admit(ctx context.Context, _ *tap.Info) (context.Context, error) {
	caller, err := callerOf(ctx)
	if err != nil {
		return nil, refusal.Status(err)
	}
	if err := a.open(ctx, caller); err != nil {
		return nil, refusal.Status(a.tell(caller, err))
	}
	return ctx, nil
}

// open takes a place for a call until ctx ends.
func (a *accounts) open(ctx context.Context, caller registration.Caller) error {
	key, stranger := peerKey(caller)
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	p, err := a.peer(key, now)
	switch {
	case err != nil:
		return err
	case stranger && a.strangers >= a.limits.OpenCallsWithoutSVID:
		return refusal.New(refusal.Overloaded, "%d calls without an SVID are open (openCallsWithoutSVID)", a.strangers).After(time.Second)
	case p.open >= a.limits.OpenCalls:
		return refusal.New(refusal.PeerLimit, "%d calls of this peer are open (openCalls)", p.open).After(time.Second)
	case !p.calls.AllowN(now, 1):
		return refusal.New(refusal.PeerLimit, "more than %g calls a second (callsPerSecond)", a.limits.CallsPerSecond).After(time.Second)
	}
	p.open++
	if stranger {
		a.strangers++
	}
	context.AfterFunc(ctx, func() { a.release(p, stranger) })
	return nil
}

// tell records what a limit refused, now and then, and returns err.
func (a *accounts) tell(c registration.Caller, err error) error {
	key, _ := peerKey(c)
	now := time.Now()
	a.mu.Lock()
	p := a.peers[key]
	say := p == nil || now.Sub(p.told) >= tellEvery
	left := 0
	if p != nil {
		if say {
			p.told, left, p.untold = now, p.untold, 0
		} else {
			p.untold++
		}
	}
	a.mu.Unlock()
	if !say {
		return err
	}
	recorded := err
	if e, ok := refusal.From(err); ok && left > 0 {
		recorded = refusal.New(e.Reason, "%s; %d more were refused since the last line", e.Detail, left)
	}
	a.refused(c, recorded)
	return err
}

func (a *accounts) release(p *account, stranger bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p.open--
	if stranger {
		a.strangers--
	}
}

// spend charges a peer for the bytes of a call, and takes places for n CSRs until it is released.
func (a *accounts) spend(c registration.Caller, n, size int) (release func(), err error) {
	key, _ := peerKey(c)
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	p, err := a.peer(key, now)
	switch {
	case err != nil:
		return nil, err
	case p.requests+n > a.limits.OpenRequests:
		return nil, refusal.New(refusal.PeerLimit, "%d requests of this peer are in hand (openRequests)", p.requests).After(time.Second)
	case !p.bytes.AllowN(now, size):
		return nil, refusal.New(refusal.PeerLimit, "more than %d bytes a second (bytesPerSecond)", a.limits.BytesPerSecond).After(time.Second)
	}
	p.requests += n
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		p.requests -= n
	}, nil
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
		if p.open == 0 && p.requests == 0 && now.Sub(p.last) > time.Minute {
			delete(a.peers, key)
		}
	}
}

func peerKey(c registration.Caller) (key string, stranger bool) {
	if !c.ID.IsZero() {
		return c.ID.String(), false
	}
	return addressKey(c.Address), true
}

// addressKey is the address without its port; of IPv6 the /64, which is what one host is given.
func addressKey(address string) string {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return address
	}
	ip := at.Addr().Unmap()
	if ip.Is4() {
		return ip.String()
	}
	prefix, err := ip.WithZone("").Prefix(64)
	if err != nil {
		return ip.String()
	}
	return prefix.String()
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
