package issuance

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/tap"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca/registration"
)

// Limits bound what one peer may cost. An agent that the CA knows is a peer by its SVID; everybody else, whatever SVID he shows, is one by his address, and
// all of those together are bounded too. The zero value of a field takes its default.
type Limits struct {
	// CallsPerSecond of one peer, with bursts of four times as many. Default 50.
	CallsPerSecond float64 `json:"callsPerSecond"`
	// CallsPerSecondWithoutSVID of one address, with bursts of four times as many: an agent needs one such call when it
	// starts, and a workload that calls by itself (policy: direct) one for each renewal. Each leaves an audit line. Default 5; raise it where many agents come from behind one address.
	CallsPerSecondWithoutSVID float64 `json:"callsPerSecondWithoutSVID"`
	// BytesPerSecond of messages of one peer, with bursts of eight times as many. Default 4 MiB.
	BytesPerSecond int `json:"bytesPerSecond"`
	// RequestsPerSecond is the number of CSRs of one peer, with bursts of eight times as many. Each may leave an audit
	// line. Default 250.
	RequestsPerSecond int `json:"requestsPerSecond"`
	// OpenCalls of one peer, streams among them. Default 32.
	OpenCalls int `json:"openCalls"`
	// OpenCallsWithoutSVID of all callers together that are no agents; one address may have a sixteenth of them. Default 32: each
	// may leave 4 MiB half sent, for ten seconds.
	OpenCallsWithoutSVID int `json:"openCallsWithoutSVID"`
	// ConnectionsWithoutSVID that are open at a time, of all callers together that are no agents, and of agents that still shake
	// hands. When all are taken, who comes gets the place of the oldest connection of the address that has the most. Default 1024.
	ConnectionsWithoutSVID int `json:"connectionsWithoutSVID"`
	// OpenMessages is the number of calls of all agents together whose message is still arriving; it may be 4 MiB long, and has
	// ten seconds. Default 96.
	OpenMessages int `json:"openMessages"`
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
	for _, f := range []struct {
		key   string
		value float64
	}{
		{"callsPerSecond", l.CallsPerSecond}, {"callsPerSecondWithoutSVID", l.CallsPerSecondWithoutSVID},
		{"bytesPerSecond", float64(l.BytesPerSecond)}, {"requestsPerSecond", float64(l.RequestsPerSecond)},
		{"openCalls", float64(l.OpenCalls)}, {"openCallsWithoutSVID", float64(l.OpenCallsWithoutSVID)},
		{"openMessages", float64(l.OpenMessages)}, {"openRequests", float64(l.OpenRequests)}, {"requestsInFlight", float64(l.RequestsInFlight)},
		{"connectionsWithoutSVID", float64(l.ConnectionsWithoutSVID)},
		{"connections", float64(l.Connections)}, {"connectionsPerAddress", float64(l.ConnectionsPerAddress)},
	} {
		if !(f.value >= 0 && f.value <= maxLimit) { // NaN lies nowhere
			return fmt.Errorf("%s: %g does not lie between 0 (the default) and %d", f.key, f.value, maxLimit)
		}
	}
	return nil
}

const (
	// addressShare is the part of the calls without an SVID that one address may have open.
	addressShare = 16
	// maxStreams bounds the Sync streams of one peer: an agent has one, for a moment two, and each can hold a message.
	maxStreams = 4
)

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
	if l.CallsPerSecondWithoutSVID <= 0 {
		l.CallsPerSecondWithoutSVID = 5
	}
	set(&l.BytesPerSecond, 4<<20)
	set(&l.RequestsPerSecond, 250)
	set(&l.OpenCalls, 32)
	set(&l.OpenCallsWithoutSVID, 32)
	set(&l.ConnectionsWithoutSVID, 1024)
	set(&l.OpenMessages, 96)
	set(&l.OpenRequests, 1024)
	set(&l.RequestsInFlight, 4096)
	set(&l.Connections, 16384)
	set(&l.ConnectionsPerAddress, 256)
	return l
}

// accounts hold what each peer has used.
type accounts struct {
	limits Limits
	// record writes the audit line of a call that was refused as a whole.
	record func(c registration.Caller, cluster string, err error)
	// patience is how long a call's message may take to arrive.
	patience time.Duration
	// arriving are the agents' calls whose message has not.
	arriving atomic.Int64

	mu        sync.Mutex
	peers     map[string]*account
	strangers int  // open calls of callers without an SVID
	crowd     told // for peers that there is no account for
}

type account struct {
	calls, bytes, requests *rate.Limiter
	open                   int // calls
	streams                int // of the open calls
	inHand                 int // CSRs
	last                   time.Time
	told                   told
}

func newAccounts(l Limits, record func(registration.Caller, string, error)) *accounts {
	return &accounts{limits: l.withDefaults(), record: record, patience: 10 * time.Second, peers: make(map[string]*account), crowd: told{}}
}

// admit is grpc's tap: it runs when a call's headers have come, before anything is read or kept for it. The call is
// over when ctx is.
func (a *accounts) admit(ctx context.Context, info *tap.Info) (context.Context, error) {
	caller, err := callerOf(ctx)
	if err != nil {
		return nil, refusal.Status(err)
	}
	if caller.agent {
		err = a.expect()
	}
	var release func()
	if err == nil {
		// Last of all that can refuse: grpc does not end the context of a call that it refuses here.
		if release, err = a.open(caller, info.FullMethodName == meshcav1.IssuanceService_Sync_FullMethodName); err != nil && caller.agent {
			a.arriving.Add(-1)
		}
	}
	if err != nil {
		return nil, refusal.Status(a.tell(caller, "", err))
	}
	arrived := a.await(ctx, caller)
	context.AfterFunc(ctx, func() {
		arrived()
		release()
	})
	return context.WithValue(ctx, arrivedKey{}, arrived), nil
}

// expect counts an agent's message that is to arrive.
func (a *accounts) expect() error {
	if n := a.arriving.Add(1); n > int64(a.limits.OpenMessages) {
		a.arriving.Add(-1)
		return refusal.New(refusal.Overloaded, "the messages of %d calls are arriving (openMessages)", n-1).After(time.Second)
	}
	return nil
}

// await gives a call its time for its message to arrive, and returns what ends the wait. What has come of it by then is kept in
// memory, so whoever lets the time pass has no use for the connection: it is closed.
func (a *accounts) await(ctx context.Context, caller *party) (arrived func()) {
	late := time.AfterFunc(a.patience, func() {
		_ = a.tell(caller, "", refusal.New(refusal.PeerLimit, "a call's message did not arrive within %v; its connection is closed", a.patience))
		hangUp(ctx)
	})
	return sync.OnceFunc(func() {
		late.Stop()
		if caller.agent {
			a.arriving.Add(-1)
		}
	})
}

// arrivedKey is where a call's context has what is to be told of its message.
type arrivedKey struct{}

// arrived is told that a call's message has arrived.
func arrived(ctx context.Context) {
	if tell, ok := ctx.Value(arrivedKey{}).(func()); ok {
		tell()
	}
}

// open takes a place for a call, until it is released.
func (a *accounts) open(caller *party, stream bool) (release func(), err error) {
	stranger, now := !caller.agent, time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	p, err := a.peer(caller, now)
	switch {
	case err != nil:
		return nil, err
	case stranger && a.strangers >= a.limits.OpenCallsWithoutSVID:
		return nil, refusal.New(refusal.Overloaded, "%d calls without an SVID are open (openCallsWithoutSVID)", a.strangers).After(time.Second)
	case stranger && p.open >= max(1, a.limits.OpenCallsWithoutSVID/addressShare):
		return nil, refusal.New(refusal.PeerLimit, "%d calls without an SVID are open from this address (a sixteenth of openCallsWithoutSVID)", p.open).After(time.Second)
	case stream && p.streams >= maxStreams:
		return nil, refusal.New(refusal.PeerLimit, "%d streams of this peer are open: an agent needs one", p.streams).After(time.Second)
	case p.open >= a.limits.OpenCalls:
		return nil, refusal.New(refusal.PeerLimit, "%d calls of this peer are open (openCalls)", p.open).After(time.Second)
	case !p.calls.AllowN(now, 1):
		return nil, refusal.New(refusal.PeerLimit, "more than %g calls a second (%s)", p.calls.Limit(), callsKey(stranger)).After(time.Second)
	}
	p.open++
	if stream {
		p.streams++
	}
	if stranger {
		a.strangers++
	}
	return func() { a.release(p, stranger, stream) }, nil
}

func (a *accounts) release(p *account, stranger, stream bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p.open--
	if stream {
		p.streams--
	}
	if stranger {
		a.strangers--
	}
}

// spend charges a peer for the bytes of a call, and takes places for n CSRs until it is released.
func (a *accounts) spend(c *party, n, size int) (release func(), err error) {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	p, err := a.peer(c, now)
	switch {
	case err != nil:
		return nil, err
	case p.inHand+n > a.limits.OpenRequests:
		return nil, refusal.New(refusal.PeerLimit, "%d requests of this peer are in hand (openRequests)", p.inHand).After(time.Second)
	case !p.bytes.AllowN(now, size):
		return nil, refusal.New(refusal.PeerLimit, "more than %d bytes a second (bytesPerSecond)", a.limits.BytesPerSecond).After(time.Second)
	case !p.requests.AllowN(now, n):
		return nil, refusal.New(refusal.PeerLimit, "more than %d requests a second (requestsPerSecond)", a.limits.RequestsPerSecond).After(time.Second)
	}
	p.inHand += n
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		p.inHand -= n
	}, nil
}

// peer finds or opens an account; a.mu is held.
func (a *accounts) peer(c *party, now time.Time) (*account, error) {
	if p := a.peers[c.account]; p != nil {
		p.last = now
		return p, nil
	}
	if len(a.peers) >= maxPeers {
		a.forgetIdle(now)
		if len(a.peers) >= maxPeers {
			return nil, refusal.New(refusal.Overloaded, "%d peers have calls open or had them within a minute", len(a.peers)).After(5 * time.Second)
		}
	}
	calls := a.limits.CallsPerSecond
	if !c.agent {
		calls = a.limits.CallsPerSecondWithoutSVID
	}
	p := &account{
		calls:    rate.NewLimiter(rate.Limit(calls), max(1, int(4*calls))),
		bytes:    rate.NewLimiter(rate.Limit(a.limits.BytesPerSecond), max(maxMessage, 8*a.limits.BytesPerSecond)),
		requests: rate.NewLimiter(rate.Limit(a.limits.RequestsPerSecond), max(MaxBatch, 8*a.limits.RequestsPerSecond)),
		last:     now,
		told:     told{},
	}
	a.peers[c.account] = p
	return p, nil
}

// callsKey is the setting that bounds a peer's calls.
func callsKey(stranger bool) string {
	if stranger {
		return "callsPerSecondWithoutSVID"
	}
	return "callsPerSecond"
}

func (a *accounts) forgetIdle(now time.Time) {
	for key, p := range a.peers {
		if p.open == 0 && p.inHand == 0 && now.Sub(p.last) > time.Minute {
			delete(a.peers, key)
		}
	}
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
