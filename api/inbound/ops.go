package inbound

import (
	"net"
	"net/http"
	"time"
)

const (
	// opsConnections of all who ask at an ops address take some 40 MiB at most.
	opsConnections = 1024
	// opsTime is what a probe takes.
	opsTime = 100 * time.Millisecond
)

// OpsServer answers /livez, /readyz and /metrics, at which a few ask now and then: each request over a connection of its own.
func OpsServer(handler http.Handler) *http.Server {
	s := &http.Server{
		Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 15 * time.Second,
		MaxHeaderBytes: 16 << 10,
	}
	s.SetKeepAlivesEnabled(false)
	return s
}

// LimitOps bounds the connections to an OpsServer, and lets whoever opens many of them keep nobody out: the kubelet ends what it
// cannot ask.
func LimitOps(l net.Listener) net.Listener { return roomy{l, NewRoom(opsConnections, opsTime)} }

type roomy struct {
	net.Listener
	room *Room
}

// Accept returns the next connection that there is room for.
func (l roomy) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if leave, ok := l.room.Enter(conn.RemoteAddr().String(), func() { _ = conn.Close() }); ok {
			return &countedConn{Conn: conn, leave: leave}, nil
		}
		_ = conn.Close()
	}
}
