package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/rotation"
)

// metrics are what an agent counts. Labels are bounded: states, reasons, protocols; never an identity or a path.
type metrics struct {
	registry *prometheus.Registry

	renewals, ended               *prometheus.CounterVec
	callSeconds                   prometheus.Histogram
	callSize                      prometheus.Histogram
	acks, nacks, unknown, refused prometheus.Counter
}

func newMetrics(a *Agent) *metrics {
	const namespace = "meshca_agent"
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help})
	}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Name: "renewals_total",
			Help: "Renewals by whose SVID (workload, self) and outcome: ok, or the reason of the refusal.",
		}, []string{"credential", "outcome"}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Name: "ended_total",
			Help: "SVIDs that were dropped, and their streams ended, because the CA said that their pod, service account, namespace or node is gone.",
		}, []string{"reason"}),
		callSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Name: "issue_call_seconds", Help: "How long calls for SVIDs took.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2.5, 12),
		}),
		callSize: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Name: "issue_call_requests", Help: "How many requests shared a call.",
			Buckets: []float64{1, 2, 5, 10, 20, 50, 100, 200, 500},
		}),
		acks:    counter("sds_acks_total", "Answers that proxies took."),
		nacks:   counter("sds_nacks_total", "Answers that proxies refused."),
		refused: counter("sds_refused_total", "SDS streams and fetches that were refused or ended, and connections that were closed, for a limit under sds in the configuration."),
		unknown: counter("sds_unknown_names_total", "Names that proxies asked for and that are not served to them."),
	}
	m.registry.MustRegister(
		m.renewals, m.ended, m.callSeconds, m.callSize, m.acks, m.nacks, m.unknown, m.refused, &standing{a},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return m
}

func (m *metrics) renewed(credential string, a rotation.Attempt) {
	m.renewals.WithLabelValues(credential, outcome(a.Err)).Inc()
}

func (m *metrics) called(size int, took time.Duration) {
	m.callSeconds.Observe(took.Seconds())
	m.callSize.Observe(float64(size))
}

// outcome is a bounded label: a newer CA may refuse with reasons that this build does not know.
func outcome(err error) string {
	if err == nil {
		return "ok"
	}
	if r := refusal.Of(err); r.Known() {
		return string(r)
	}
	return "other"
}

// standing are the gauges, read from the agent when they are asked for.
type standing struct{ agent *Agent }

var _ prometheus.Collector = (*standing)(nil)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("meshca_agent_"+name, help, labels, nil)
}

// Describe sends nothing, which makes this an unchecked collector: its gauges depend on what there is.
func (*standing) Describe(chan<- *prometheus.Desc) {}

// Collect reads the gauges.
func (s *standing) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	a := s.agent
	counts := make(map[condition]int, len(conditions))
	soonest, any := time.Duration(0), false
	for _, w := range a.roster.list() {
		counts[w.condition()]++
		if h := w.holds(); h != nil {
			if left := h.left(a.config.now()); !any || left < soonest {
				soonest, any = left, true
			}
		}
	}
	byState := desc("workloads", "Workloads by state.", "state")
	for _, c := range conditions {
		gauge(byState, float64(counts[c]), string(c))
	}
	if any {
		gauge(desc("svid_remaining_seconds_min", "What is left of the workload SVID that ends first."), soonest.Seconds())
	}
	own := 0.0
	if h := a.self.identity.Value(); h != nil {
		own = h.left(a.config.now()).Seconds()
	}
	gauge(desc("self_remaining_seconds", "What is left of the agent's own SVID; 0 while it has none."), own)
	deliveries := map[string]int{"ok": 0, "failing": 0}
	for _, d := range a.readers.list() {
		if d.Fault == "" {
			deliveries["ok"]++
		} else {
			deliveries["failing"]++
		}
	}
	byFault := desc("deliveries", "Places other than sockets that take what workloads are served, by state.", "state")
	for state, n := range deliveries {
		gauge(byFault, float64(n), state)
	}
	connected, _, _, acked := a.follower.standing()
	gauge(desc("connected", "Whether the stream from the CA is open."), number(connected))
	gauge(desc("ready", "Whether the agent is ready."), number(len(a.NotReady()) == 0))
	gauge(desc("bundle_sequence", "Sequence of the trust bundle in use."), float64(a.trust.sequence()))
	gauge(desc("bundle_acknowledged_sequence", "Highest bundle sequence that was acknowledged to the CA."), float64(acked))
	if skew, measured := a.clock.offset(); measured {
		gauge(desc("clock_skew_seconds", "The CA's clock minus this node's."), skew.Seconds())
	}
	streams := map[sds.Protocol]int{sds.SotW: 0, sds.Delta: 0}
	for _, st := range a.sds.Streams() {
		streams[st.Protocol]++
	}
	open := desc("sds_streams", "Open SDS streams.", "protocol")
	for p, n := range streams {
		gauge(open, float64(n), string(p))
	}
	gauge(desc("info", "The agent's version.", "version"), 1, a.config.Version)
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
