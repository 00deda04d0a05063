package registration

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/api/refusal"
)

// Metrics counts decisions. Labels are bounded: events, doors, and the enum of reasons; never an identity or a peer.
type Metrics struct {
	decisions   *prometheus.CounterVec
	duration    prometheus.Observer
	inFlight    prometheus.Gauge
	auditErrors prometheus.Counter
	ended       *prometheus.CounterVec

	issued, refused, endings atomic.Uint64
}

// Counts are the decisions since the start, those that issued and those that refused, and what ended with its cause.
func (m *Metrics) Counts() (issued, refused, ended uint64) {
	return m.issued.Load(), m.refused.Load(), m.endings.Load()
}

// end counts what ended with its cause.
func (m *Metrics) end(reason refusal.Reason) {
	m.endings.Add(1)
	m.ended.WithLabelValues(string(reason)).Inc()
}

// NewMetrics registers the metrics.
func NewMetrics(r prometheus.Registerer) *Metrics {
	duration := prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "meshca_decision_duration_seconds",
		Help:    "From a request's arrival at the registration authority to its decision, audit line included.",
		Buckets: []float64{.0005, .001, .002, .004, .008, .016, .032, .064, .128, .256, .512, 1, 2, 4, 8},
	})
	m := &Metrics{
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_decisions_total",
			Help: "Decisions of the registration authority; outcome is `issued` or the reason of the refusal.",
		}, []string{"event", "door", "outcome"}),
		duration: duration,
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "meshca_issue_in_flight", Help: "Requests that the registration authority has in hand.",
		}),
		auditErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "meshca_audit_errors_total", Help: "Audit lines that could not be written.",
		}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_identities_ended_total",
			Help: "Identities that ended with their pod, service account, namespace or node, unasked and before their SVIDs' time.",
		}, []string{"reason"}),
	}
	r.MustRegister(m.decisions, duration, m.inFlight, m.auditErrors, m.ended)
	return m
}

func (m *Metrics) observe(d *Decision) {
	outcome := d.Outcome
	if outcome == OutcomeIssued {
		m.issued.Add(1)
	} else {
		m.refused.Add(1)
	}
	if outcome != OutcomeIssued && !refusal.Reason(outcome).Known() {
		outcome = string(refusal.Internal)
	}
	m.decisions.WithLabelValues(d.Event, d.Door, outcome).Inc()
	m.duration.Observe(time.Since(d.Time).Seconds())
}
