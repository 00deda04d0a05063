package issuance

import (
	"errors"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/meshca/meshca/api/inbound"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca/registration"
)

// sip is how much a stranger's connection may bring before any content comes of it, in bytes: a handshake, or one record of
// TLS, which has 16 KiB and a bit. A client certificate has some two KiB for each member of its chain.
const sip = 20 << 10

// handshakeTime is what a handshake takes when many agents come at once.
const handshakeTime = time.Second

// admitting are Credentials that know agents from strangers, and bound what the connections of the latter hold: anybody can open
// one. Until the handshake is over each is a stranger's; an agent has a place of ours from then on, by Limits.Connections.
type admitting struct {
	*Credentials
	// agent reports whether a caller is an agent as the CA knows it.
	agent     func(registration.Caller) bool
	accounts  *accounts
	strangers *inbound.Room
}

// ServerHandshake is called by grpc for each connection, and has ten seconds (grpc.ConnectionTimeout). Of strangers'
// connections the messages are watched as they arrive: held in crumbs, one takes many times its size. Agents' are not, for
// it costs.
func (c admitting) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	unknown := newParty(registration.Caller{Address: raw.RemoteAddr().String()}, false)
	leave, ok := c.strangers.Enter(unknown.Address, func() {
		_ = raw.Close()
		_ = c.accounts.tell(unknown, "", refusal.New(refusal.Overloaded, "as many connections without an agent's SVID are open as may be (connectionsWithoutSVID, %d): "+
			"one was closed for another that has come, of the address that had the most of them, or else the oldest", c.accounts.limits.ConnectionsWithoutSVID).After(time.Second))
	})
	if !ok {
		return nil, nil, c.accounts.tell(unknown, "", refusal.New(refusal.Overloaded, "as many connections without an agent's SVID have just been opened as may be "+
			"open (connectionsWithoutSVID, %d)", c.accounts.limits.ConnectionsWithoutSVID).After(time.Second))
	}
	sips := &sipping{Conn: raw, left: sip}
	conn, tlsInfo, caller, err := c.shake(sips)
	if err != nil {
		leave()
		return nil, nil, err
	}
	info := callerInfo{TLSInfo: tlsInfo, party: newParty(caller, c.agent(caller)), raw: raw}
	if info.party.agent {
		leave()
		sips.trusted = true
		return conn, info, nil
	}
	var open atomic.Int64
	return inbound.Watch(&strangersConn{conn, sips, leave}, inbound.Rules{
		Patience: c.accounts.patience,
		Opened:   func() bool { return open.Add(1) <= unendedCalls },
		Ended:    func(calls int) { open.Add(int64(-calls)) },
	}), info, nil
}

// unendedCalls is how many calls of a stranger's connection there may be whose end is not written yet. grpc forgets a call that it
// has answered, and keeps the answer for as long as the client does not read it.
const unendedCalls = 16

// Clone keeps the bounds, which the embedded Clone would lose.
func (c admitting) Clone() credentials.TransportCredentials { return c }

// strangersConn is a stranger's connection after its handshake.
type strangersConn struct {
	net.Conn
	sips  *sipping
	leave func()
}

// Read reads content.
func (c *strangersConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.sips.left = sip
	}
	return n, err
}

// Close gives the place back.
func (c *strangersConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

// sipping is what lies below a connection's TLS, which keeps messages of up to 256 KiB until they are whole. One goroutine at a
// time reads a connection.
type sipping struct {
	net.Conn
	left    int
	trusted bool
}

var errGulp = errors.New("the client sent more of a handshake than any needs: the connection is closed")

// Read reads what is left at most.
func (c *sipping) Read(p []byte) (int, error) {
	switch {
	case c.trusted:
		return c.Conn.Read(p)
	case c.left <= 0:
		return 0, errGulp
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}
