package issuance

import (
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/meshca/meshca/api/refusal"
)

// admitting are Credentials that bound the connections of callers who show no SVID: each costs some 50 KiB for as long as it is
// open, and anybody can open one. Who shows an SVID has a place of ours, by Limits.Connections.
type admitting struct {
	*Credentials
	accounts  *accounts
	strangers *places
}

// ServerHandshake is called by grpc for each connection.
func (c admitting) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.Credentials.shake(raw)
	if err != nil {
		return nil, nil, err
	}
	key, stranger := peerKey(info.caller)
	if !stranger {
		return conn, info, nil
	}
	leave, err := c.strangers.take(key)
	if err != nil {
		_ = conn.Close()
		return nil, nil, c.accounts.tell(info.caller, "", err)
	}
	return &placedConn{Conn: conn, leave: leave}, info, nil
}

// Clone keeps the bounds, which the embedded Clone would lose.
func (c admitting) Clone() credentials.TransportCredentials {
	return admitting{c.clone(), c.accounts, c.strangers}
}

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
