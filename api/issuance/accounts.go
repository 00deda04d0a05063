package issuance

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/tap"

	"github.com/meshca/meshca/api/inbound"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca/registration"
)

const (
	// addressShare is the part of strangers' calls that one address may have open.
	addressShare = 16
	// halfShare is the part of strangers' calls whose message may be on its way: those who let it be so keep nobody else out.
	halfShare = 2
	// messageTime is what a message takes that comes whole, right behind its headers.
	messageTime = 100 * time.Millisecond
	// networkCalls is how many times what an address may call an IPv6 /64 may. It can be a cluster, or one machine that has any
	// number of addresses.
	networkCalls = 64
	// maxStreams bounds the Sync streams of one peer: an agent has one, for a moment two, and each can hold a message.
	maxStreams = 4
	// maxPeers bounds the memory of accounts, agents' and strangers' each; idle ones are forgotten first.
	maxPeers = 65_536
	// agentsIdle and strangersIdle are when: a stranger's has nothing by then that a new one would not have.
	agentsIdle    = time.Minute
	strangersIdle = 10 * time.Second
)

// accounts hold what each peer has used.
type accounts struct {
	limits Limits
	// record writes the audit line of a call that was refused as a whole.
	record func(c registration.Caller, cluster string, err error)
	// patience is how long a call's message may take to arrive.
	patience time.Duration
	// arriving are the agents' calls whose message has not.
	arriving atomic.Int64
	// halfSent are the strangers'.
	halfSent *inbound.Room

	mu        sync.Mutex
	agents    book
	addresses book // strangers', and those of their IPv6 networks
	strangers int  // open calls of theirs
	crowd     told // for peers that there is no account for
}

// book holds accounts by name.
type book map[string]*account

type account struct {
	calls, bytes, requests *rate.Limiter
	open                   int // calls
	streams                int // of the open calls
	inHand                 int // CSRs
	last                   time.Time
	told                   told
}

func newAccounts(l Limits, record func(registration.Caller, string, error)) *accounts {
	l = l.withDefaults()
	return &accounts{
		limits: l, record: record, patience: 10 * time.Second, halfSent: inbound.NewRoom(l.OpenCallsWithoutSVID/halfShare, messageTime),
		agents: book{}, addresses: book{}, crowd: told{},
	}
}

// admit is grpc's tap: it runs when a call's headers have come, before anything is read or kept for it. The call is
// over when ctx is.
func (a *accounts) admit(ctx context.Context, info *tap.Info) (context.Context, error) {
	caller, err := callerOf(ctx)
	if err != nil {
		return nil, refusal.Status(err)
	}
	release, err := a.open(caller, info.FullMethodName == meshcav1.IssuanceService_Sync_FullMethodName)
	if err != nil {
		return nil, refusal.Status(a.tell(caller, "", err))
	}
	arrived, err := a.expect(ctx, caller)
	if err != nil {
		release() // grpc does not end the context of a call that it refuses here
		return nil, refusal.Status(a.tell(caller, "", err))
	}
	context.AfterFunc(ctx, func() {
		arrived()
		release()
	})
	return context.WithValue(ctx, arrivedKey{}, arrived), nil
}

// expect takes a place for a call's message until it has arrived, and gives it its time for that. What has come of it is kept in
// memory, so whoever lets the time pass has no use for the connection: it is closed.
func (a *accounts) expect(ctx context.Context, caller *party) (arrived func(), err error) {
	leave, err := a.placeFor(ctx, caller)
	if err != nil {
		return nil, err
	}
	late := time.AfterFunc(a.patience, func() {
		_ = a.tell(caller, "", refusal.New(refusal.PeerLimit, "a call's message did not arrive within %v; its connection is closed", a.patience))
		hangUp(ctx)
	})
	return sync.OnceFunc(func() {
		late.Stop()
		leave()
	}), nil
}

// placeFor takes a place for a message that is to arrive.
func (a *accounts) placeFor(ctx context.Context, caller *party) (leave func(), err error) {
	if caller.agent {
		if n := a.arriving.Add(1); n > int64(a.limits.OpenMessages) {
			a.arriving.Add(-1)
			return nil, refusal.New(refusal.Overloaded, "the messages of %d calls are arriving (openMessages)", n-1).After(time.Second)
		}
		return func() { a.arriving.Add(-1) }, nil
	}
	leave, ok := a.halfSent.Enter(caller.Address, func() {
		_ = a.tell(caller, "", refusal.New(refusal.Overloaded, "the messages of too many calls without an agent's SVID are arriving (half of openCallsWithoutSVID): "+
			"one was ended, with its connection, of the address that had the most of them, or else the oldest").After(time.Second))
		hangUp(ctx)
	})
	if !ok {
		return nil, refusal.New(refusal.Overloaded, "the messages of too many calls without an agent's SVID are arriving (half of openCallsWithoutSVID)").After(time.Second)
	}
	return leave, nil
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
	p, err := a.account(caller, now)
	switch {
	case err != nil:
		return nil, err
	case stranger && a.strangers >= a.limits.OpenCallsWithoutSVID:
		return nil, refusal.New(refusal.Overloaded, "%d calls without an agent's SVID are open (openCallsWithoutSVID)", a.strangers).After(time.Second)
	case stranger && p.open >= max(1, a.limits.OpenCallsWithoutSVID/addressShare):
		return nil, refusal.New(refusal.PeerLimit, "%d calls without an agent's SVID are open from this address (a sixteenth of openCallsWithoutSVID)", p.open).After(time.Second)
	case stream && p.streams >= maxStreams:
		return nil, refusal.New(refusal.PeerLimit, "%d streams of this peer are open: an agent needs one", p.streams).After(time.Second)
	case p.open >= a.limits.OpenCalls:
		return nil, refusal.New(refusal.PeerLimit, "%d calls of this peer are open (openCalls)", p.open).After(time.Second)
	case !p.calls.AllowN(now, 1):
		return nil, refusal.New(refusal.PeerLimit, "more than %g calls a second (%s)", p.calls.Limit(), callsKey(stranger)).After(time.Second)
	case caller.network != "" && !a.networkCalls(caller.network, now):
		return nil, refusal.New(refusal.PeerLimit, "%s has called more often than %d addresses may (callsPerSecondWithoutSVID)", caller.network, networkCalls).After(time.Second)
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
	p, err := a.account(c, now)
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

// account finds or opens a caller's account; a.mu is held here and below.
func (a *accounts) account(c *party, now time.Time) (*account, error) {
	if c.agent {
		return a.find(a.agents, c.account, a.limits.CallsPerSecond, agentsIdle, now)
	}
	return a.find(a.addresses, c.account, a.limits.CallsPerSecondWithoutSVID, strangersIdle, now)
}

// networkCalls reports whether a stranger's IPv6 network may have called once more.
func (a *accounts) networkCalls(network string, now time.Time) bool {
	p, err := a.find(a.addresses, network, networkCalls*a.limits.CallsPerSecondWithoutSVID, strangersIdle, now)
	return err == nil && p.calls.AllowN(now, 1)
}

func (a *accounts) find(in book, name string, calls float64, idle time.Duration, now time.Time) (*account, error) {
	if p := in[name]; p != nil {
		p.last = now
		return p, nil
	}
	if len(in) >= maxPeers {
		in.forgetIdle(now, idle)
		if len(in) >= maxPeers {
			return nil, refusal.New(refusal.Overloaded, "%d peers have calls open or had them within %v", len(in), idle).After(5 * time.Second)
		}
	}
	p := &account{
		calls:    rate.NewLimiter(rate.Limit(calls), max(1, int(4*calls))),
		bytes:    rate.NewLimiter(rate.Limit(a.limits.BytesPerSecond), max(maxMessage, 8*a.limits.BytesPerSecond)),
		requests: rate.NewLimiter(rate.Limit(a.limits.RequestsPerSecond), max(MaxBatch, 8*a.limits.RequestsPerSecond)),
		last:     now,
		told:     told{},
	}
	in[name] = p
	return p, nil
}

// callsKey is the setting that bounds a peer's calls.
func callsKey(stranger bool) string {
	if stranger {
		return "callsPerSecondWithoutSVID"
	}
	return "callsPerSecond"
}

func (b book) forgetIdle(now time.Time, idle time.Duration) {
	for name, p := range b {
		if p.open == 0 && p.inHand == 0 && now.Sub(p.last) > idle {
			delete(b, name)
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
