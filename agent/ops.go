package agent

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"

	"github.com/meshca/meshca/api/inbound"
)

// listenOps opens the ops address; nil where there is none.
func (a *Agent) listenOps() (net.Listener, error) {
	if a.config.OpsAddress == "" {
		return nil, nil
	}
	l, err := net.Listen("tcp", a.config.OpsAddress)
	if err != nil {
		return nil, fmt.Errorf("opsAddress: %w", err)
	}
	a.log.Info("serving /livez, /readyz and /metrics", "address", l.Addr().String())
	return l, nil
}

// serveOps answers probes and scrapes until ctx ends.
func (a *Agent) serveOps(ctx context.Context, l net.Listener) error {
	if l == nil {
		return nil
	}
	return inbound.ServeOps(ctx, l, inbound.OpsHandler(a.metrics.registry, func(w http.ResponseWriter, _ *http.Request) {
		if why := a.NotReady(); len(why) > 0 {
			http.Error(w, strings.Join(why, "\n"), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	}))
}

// NotReady says, a sentence each, why the agent cannot get SVIDs for its workloads now; none: it can. A workload that is
// broken by itself is its own matter and shows in status.
func (a *Agent) NotReady() []string {
	var why []string
	if len(a.trust.current.Value().X509Authorities()) == 0 {
		why = append(why, "no trust bundle is held: "+a.config.BundleFile+" must bring the first one")
	}
	if h := a.self.identity.Value(); h == nil || h.ended(a.config.now()) {
		reason := "the first attempt has not been answered"
		if err, _ := a.self.lastError(); err != nil {
			reason = err.Error()
		}
		why = append(why, "the agent has no SVID of its own: "+reason)
	}
	for _, s := range a.standings() {
		if s.NotReady != nil {
			why = append(why, s.Subject+": "+s.NotReady.Error())
		}
	}
	opening := 0
	for _, w := range a.roster.list() {
		if w.neverOpened() {
			opening++
		}
	}
	if opening > 0 {
		why = append(why, fmt.Sprintf("%d sockets are still to be opened for the first time", opening))
	}
	return why
}
