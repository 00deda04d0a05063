package issuance

import (
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/meshca/meshca/api/inbound"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca/registration"
)

// admitting are Credentials that know agents from strangers, and bound the connections of the latter: each costs some 50 KiB for as
// long as it is open, and anybody can open one. An agent has a place of ours, by Limits.Connections.
type admitting struct {
	*Credentials
	// agent reports whether a caller is an agent as the CA knows it.
	agent     func(registration.Caller) bool
	accounts  *accounts
	strangers *places
}

// ServerHandshake is called by grpc for each connection. Of strangers' connections the messages are watched as they arrive: held in
// crumbs, one takes many times its size. Agents' are not, for it costs.
func (c admitting) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, tlsInfo, caller, err := c.shake(raw)
	if err != nil {
		return nil, nil, err
	}
	info := callerInfo{TLSInfo: tlsInfo, party: newParty(caller, c.agent(caller)), raw: raw}
	if info.party.agent {
		return conn, info, nil
	}
	leave, err := c.strangers.take(info.party.account)
	if err != nil {
		_ = conn.Close()
		return nil, nil, c.accounts.tell(info.party, "", err)
	}
	return &placedConn{Conn: inbound.Watch(conn, c.accounts.patience), leave: leave}, info, nil
}

// Clone keeps all of it: nothing in it is changed by being used.
func (c admitting) Clone() credentials.TransportCredentials { return c }

// placedConn gives its place back when it is closed.
type placedConn struct {
	net.Conn
	leave func()
}

func (c *placedConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

// places are for connections; one address may have a share of them.
type places struct {
	all int

	mu    sync.Mutex
	taken int
	by    map[string]int
}

// take takes a place, which leave gives back, once.
func (p *places) take(key string) (leave func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.taken >= p.all:
		return nil, refusal.New(refusal.Overloaded, "%d connections without an SVID are open (connectionsWithoutSVID)", p.taken).After(time.Second)
	case p.by[key] >= max(1, p.all/addressShare):
		return nil, refusal.New(refusal.PeerLimit, "%d connections without an SVID are open from this address (an eighth of connectionsWithoutSVID)", p.by[key]).
			After(time.Second)
	}
	p.taken++
	p.by[key]++
	return sync.OnceFunc(func() { p.leave(key) }), nil
}

func (p *places) leave(key string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken--
	if p.by[key]--; p.by[key] == 0 {
		delete(p.by, key)
	}
}
