package agent

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/api/sds"
)

// A proxy that refuses and asks amiss without end is logged a few times a minute, with what was left out; its neighbour
// has lines of its own, and everything is counted.
func TestPeersCannotFillTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		a := &Agent{log: slog.New(slog.NewTextHandler(&log, nil))}
		a.metrics = newMetrics(a)
		for _, socket := range []string{"/a", "/b"} {
			must(t, a.roster.add(newWorkload(Workload{Socket: socket}, a, nil, &clock{now: machineClocks()}, a.log)))
		}
		const times = 1000
		for range times {
			a.nacked(sds.Stream{Peer: "/a"}, sds.Nack{Detail: "unusable"})
			a.unknown(sds.Stream{Peer: "/a"}, []string{"x", "y"})
		}
		if n := strings.Count(log.String(), "\n"); n != notesBurst {
			t.Errorf("%d lines at once, want %d", n, notesBurst)
		}
		a.nacked(sds.Stream{Peer: "/b"}, sds.Nack{Detail: "unusable"})
		if !strings.Contains(log.String(), "socket=/b") {
			t.Error("one socket's lines take another's")
		}
		log.Reset()
		time.Sleep(notesEvery)
		a.unknown(sds.Stream{Peer: "/a"}, []string{"x"})
		if want := "omitted=1995"; !strings.Contains(log.String(), want) {
			t.Errorf("the next line is %q, want %q in it", log.String(), want)
		}
		if got := counted(t, a.metrics.nacks); got != times+1 {
			t.Errorf("%v refusals counted", got)
		}
		if got := counted(t, a.metrics.unknown); got != 2*times+1 {
			t.Errorf("%v unknown names counted", got)
		}
		if got := a.roster.at("/a").state.nacks; got != times {
			t.Errorf("status shows %d refusals", got)
		}
	})
}

func counted(t *testing.T, c prometheus.Counter) float64 {
	t.Helper()
	all := prometheus.NewPedanticRegistry()
	must(t, all.Register(c))
	families, err := all.Gather()
	must(t, err)
	return families[0].GetMetric()[0].GetCounter().GetValue()
}
