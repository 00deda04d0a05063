package inbound

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	// opsConnections of all who ask at an ops address take some 40 MiB at most.
	opsConnections = 1024
	// opsTime is what a probe takes.
	opsTime = 100 * time.Millisecond
	// opsDrain is how long what is being asked at the end may take.
	opsDrain = 5 * time.Second
)

// OpsHandler answers /livez, /readyz and /metrics.
func OpsHandler(metrics prometheus.Gatherer, ready http.HandlerFunc) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", ready)
	// With a time limit an answer is whole before any of it is written: who reads it slowly is in nobody's way.
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	return mux
}

// ServeOps answers at an ops address until ctx ends, and then what is being asked. A few ask there now and then: each
// request has a connection of its own. Those are bounded, and whoever opens many of them keeps nobody out: the kubelet ends
// what it cannot ask.
func ServeOps(ctx context.Context, l net.Listener, handler http.Handler) error {
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 15 * time.Second,
		MaxHeaderBytes: 16 << 10,
	}
	server.SetKeepAlivesEnabled(false)
	drained := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(drained)
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), opsDrain)
		defer cancel()
		_ = server.Shutdown(last)
		_ = server.Close()
	})
	err := server.Serve(roomy{l, NewRoom(opsConnections, opsTime)})
	if !stop() {
		<-drained
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("opsAddress %s: %w", l.Addr(), err)
}

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
