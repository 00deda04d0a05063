package inbound

import (
	"net"
	"net/netip"
	"sync"
)

// limited is the listener of Limit.
type limited struct {
	net.Listener
	places     chan struct{}
	perAddress int
	done       chan struct{}
	end        sync.Once

	mu   sync.Mutex
	open map[string]int
}

// Limit bounds the connections that are open at a time: of all peers by waiting, so that the kernel's backlog holds the rest, and
// of one address (Host) by closing what is over, so that one host cannot take all places.
func Limit(l net.Listener, all, perAddress int) net.Listener {
	return &limited{Listener: l, places: make(chan struct{}, all), perAddress: perAddress, done: make(chan struct{}), open: map[string]int{}}
}

// LimitOps is Limit for an address of /livez, /readyz and /metrics, at which a few ask now and then: all connections together take
// some 40 MiB at most, and one pod of many cannot keep kubelet and Prometheus from their places.
func LimitOps(l net.Listener) net.Listener { return Limit(l, 1024, 16) }

// Accept returns the next connection that is within the bounds.
func (l *limited) Accept() (net.Conn, error) {
	for {
		select {
		case l.places <- struct{}{}:
		case <-l.done:
			return nil, net.ErrClosed
		}
		conn, err := l.Listener.Accept()
		if err != nil {
			<-l.places
			return nil, err
		}
		key := Host(conn.RemoteAddr().String())
		if l.enter(key) {
			return &countedConn{Conn: conn, leave: sync.OnceFunc(func() { l.leave(key) })}, nil
		}
		<-l.places
		_ = conn.Close()
	}
}

// Close ends Accept, also where that waits for a place; connections stay.
func (l *limited) Close() error {
	l.end.Do(func() { close(l.done) })
	return l.Listener.Close()
}

func (l *limited) enter(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[key] >= l.perAddress {
		return false
	}
	l.open[key]++
	return true
}

func (l *limited) leave(key string) {
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

// Host is the address without its port; of IPv6 the /64, which is what one host is given.
func Host(address string) string {
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
