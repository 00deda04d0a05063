package issuance

import (
	"net"
	"sync"
)

// limitedListener bounds the connections that are open at a time: of all peers by waiting, so that the kernel's backlog
// holds the rest, and of one address by closing what is over, so that one host cannot take all places.
type limitedListener struct {
	net.Listener
	places     chan struct{}
	perAddress int

	mu   sync.Mutex
	open map[string]int
}

func limitConnections(l net.Listener, all, perAddress int) *limitedListener {
	return &limitedListener{Listener: l, places: make(chan struct{}, all), perAddress: perAddress, open: map[string]int{}}
}

// Accept returns the next connection that is within the bounds.
func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		l.places <- struct{}{}
		conn, err := l.Listener.Accept()
		if err != nil {
			<-l.places
			return nil, err
		}
		key := addressKey(conn.RemoteAddr().String())
		if l.enter(key) {
			return &countedConn{Conn: conn, leave: sync.OnceFunc(func() { l.leave(key) })}, nil
		}
		<-l.places
		_ = conn.Close()
	}
}

func (l *limitedListener) enter(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[key] >= l.perAddress {
		return false
	}
	l.open[key]++
	return true
}

func (l *limitedListener) leave(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[key]--; l.open[key] <= 0 {
		delete(l.open, key)
	}
	<-l.places
}

type countedConn struct {
	net.Conn
	leave func()
}

// Close gives the place back, once.
func (c *countedConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
