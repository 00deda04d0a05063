package inbound

import (
	"net"
	"net/netip"
	"slices"
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

// networkShare is the part of all connections that an IPv6 /64 may have: it may be one machine at home that has any address
// of it, but also the pods of a node, the nodes of a zone, or a whole cluster.
const networkShare = 2

// Limit bounds the connections that are open at a time: of all peers by waiting, so that the kernel's backlog holds the rest, and
// by closing what is over of one address (Host) and of an IPv6 /64, which may have half of all.
func Limit(l net.Listener, all, perAddress int) net.Listener {
	return &limited{Listener: l, places: make(chan struct{}, all), perAddress: perAddress, done: make(chan struct{}), open: map[string]int{}}
}

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
		address := conn.RemoteAddr().String()
		host, network := Host(address), Network(address)
		if l.enter(host, network) {
			return &countedConn{Conn: conn, leave: sync.OnceFunc(func() { l.leave(host, network) })}, nil
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

func (l *limited) enter(host, network string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[host] >= l.perAddress || network != host && l.open[network] >= max(1, cap(l.places)/networkShare) {
		return false
	}
	l.open[host]++
	if network != host {
		l.open[network]++
	}
	return true
}

func (l *limited) leave(host, network string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, key := range slices.Compact([]string{host, network}) {
		if l.open[key]--; l.open[key] <= 0 {
			delete(l.open, key)
		}
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

// Host is the address without its port.
func Host(address string) string {
	ip, err := ipOf(address)
	if err != nil {
		return address
	}
	return ip.String()
}

// Network is the /64 of an IPv6 address, and Host of all others.
func Network(address string) string {
	ip, err := ipOf(address)
	if err != nil || ip.Is4() {
		return Host(address)
	}
	prefix, err := ip.Prefix(64)
	if err != nil {
		return ip.String()
	}
	return prefix.String()
}

func ipOf(address string) (netip.Addr, error) {
	at, err := netip.ParseAddrPort(address)
	return at.Addr().Unmap().WithZone(""), err
}
