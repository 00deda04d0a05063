package main

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/api/inbound"
)

// opsHandler answers /livez, /readyz and /metrics. notReady returns why the CA cannot sign now, a sentence each; none when
// it can. degraded returns what is wrong though it can.
func opsHandler(metrics *prometheus.Registry, notReady, degraded func() []string) http.Handler {
	return inbound.OpsHandler(metrics, func(w http.ResponseWriter, _ *http.Request) {
		if why := notReady(); len(why) > 0 {
			http.Error(w, "not ready: "+strings.Join(why, "; "), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
		for _, what := range degraded() {
			fmt.Fprintln(w, "degraded:", what)
		}
	})
}
