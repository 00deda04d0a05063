package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/meshca/meshca/api/inbound"
)

// opsHandler answers /livez, /readyz and /metrics. notReady returns why the CA cannot sign now, a sentence each; none when
// it can. degraded returns what is wrong though it can.
func opsHandler(metrics *prometheus.Registry, notReady, degraded func() []string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if why := notReady(); len(why) > 0 {
			http.Error(w, "not ready: "+strings.Join(why, "; "), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
		for _, what := range degraded() {
			fmt.Fprintln(w, "degraded:", what)
		}
	})
	// With a time limit an answer is whole before any of it is written: who reads it slowly is in nobody's way.
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	return mux
}

// serveOps answers at the listener until ctx ends.
func serveOps(ctx context.Context, l net.Listener, handler http.Handler) error {
	server := inbound.OpsServer(handler)
	stop := context.AfterFunc(ctx, func() {
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = server.Shutdown(last)
	})
	defer stop()
	if err := server.Serve(inbound.LimitOps(l)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("opsAddress %s: %w", l.Addr(), err)
	}
	return nil
}
