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
	w     *workload
	door  door // of connections that Accept returns
	done  chan struct{}
	ended sync.Once

	mu     sync.Mutex
	open   map[*boundConn]struct{}
	closed bool
}

// boundConn is a connection that came through a workload's socket.
type boundConn struct {
	net.Conn
	of    *bound
	leave func()
}

// boundAddr is the local address of a boundConn: that is where a gRPC handler finds whose the call is.
type boundAddr struct {
	net.Addr
	w *workload
}

func newBound(l net.Listener, w *workload, d door) *bound {
	return &bound{Listener: l, w: w, door: d, done: make(chan struct{}), open: make(map[*boundConn]struct{})}
}

// Accept waits for the next connection, and for its place. Close ends both.
func (b *bound) Accept() (net.Conn, error) {
	c, err := b.Listener.Accept()
	if err != nil {
		return nil, err
	}
	leave, err := b.door.await(b.done)
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	conn, err := b.take(c, leave)
	if err != nil {
		leave()
		_ = c.Close()
		return nil, err
	}
	return conn, nil
}

// Close ends Accept; connections stay.
func (b *bound) Close() error {
	b.ended.Do(func() { close(b.done) })
	return b.Listener.Close()
}

// take binds a connection to the workload. leave gives its place back, when it is closed.
func (b *bound) take(c net.Conn, leave func()) (net.Conn, error) {
	conn := &boundConn{c, b, leave}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, net.ErrClosed
	}
	b.open[conn] = struct{}{}
	return conn, nil
}

func (b *bound) count() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.open)
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
		c.leave()
	}
	clear(b.open)
}

// LocalAddr names the workload.
func (c *boundConn) LocalAddr() net.Addr { return boundAddr{c.Conn.LocalAddr(), c.of.w} }

// handed is a listener whose connections somebody else accepted.
type handed struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newHanded() *handed { return &handed{conns: make(chan net.Conn), done: make(chan struct{})} }

// put hands a connection over.
func (h *handed) put(c net.Conn) error {
	select {
	case h.conns <- c:
		return nil
	case <-h.done:
		_ = c.Close() // it is bound already
		return net.ErrClosed
	}
}

// Accept waits for the next one.
func (h *handed) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (h *handed) Close() error { h.once.Do(func() { close(h.done) }); return nil }

// Addr names no place: there are several.
func (h *handed) Addr() net.Addr { return &net.UnixAddr{Name: "handed over", Net: "unix"} }

// Close ends the connection.
func (c *boundConn) Close() error {
	c.of.mu.Lock()
	delete(c.of.open, c)
	c.of.mu.Unlock()
	defer c.leave()
	return c.Conn.Close()
}
