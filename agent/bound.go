package agent

import (
	"net"
	"sync"
	"time"
)

// bound is a workload's listener. Its connections belong to that workload for as long as they are open, whatever becomes
// of the path: a connection of a pod that is gone must not be served what the next one at the same path gets.
type bound struct {
	net.Listener
	w *workload

	mu     sync.Mutex
	open   map[*boundConn]struct{}
	closed bool
}

// boundConn is a connection that came through a workload's socket.
type boundConn struct {
	net.Conn
	of *bound
}

// boundAddr is the local address of a boundConn: that is where a gRPC handler finds whose the call is.
type boundAddr struct {
	net.Addr
	w *workload
}

func newBound(l net.Listener, w *workload) *bound {
	return &bound{Listener: l, w: w, open: make(map[*boundConn]struct{})}
}

// Accept waits for the next connection.
func (b *bound) Accept() (net.Conn, error) {
	c, err := b.Listener.Accept()
	if err != nil {
		return nil, err
	}
	conn := &boundConn{c, b}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		_ = c.Close()
		return nil, net.ErrClosed
	}
	b.open[conn] = struct{}{}
	return conn, nil
}

// cut closes the connections that are still open after grace, in which streams are told that they end.
func (b *bound) cut(grace time.Duration) {
	b.mu.Lock()
	b.closed = true
	idle := len(b.open) == 0
	b.mu.Unlock()
	if idle {
		return
	}
	time.Sleep(grace)
	b.mu.Lock()
	defer b.mu.Unlock()
	for c := range b.open {
		_ = c.Conn.Close()
	}
	clear(b.open)
}

// LocalAddr names the workload.
func (c *boundConn) LocalAddr() net.Addr { return boundAddr{c.Conn.LocalAddr(), c.of.w} }

// Close ends the connection.
func (c *boundConn) Close() error {
	c.of.mu.Lock()
	delete(c.of.open, c)
	c.of.mu.Unlock()
	return c.Conn.Close()
}
