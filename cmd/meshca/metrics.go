package main

import (
	"maps"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/ca/upstream/vault"
)

// metrics are the CA's, beside the registration authority's own. No label is an identity or a peer.
type metrics struct {
	commits      *prometheus.HistogramVec
	groups       prometheus.Histogram
	renewals     *prometheus.CounterVec
	clusterCalls *prometheus.HistogramVec
	upstream     *prometheus.HistogramVec

	ledger fault
}

func newMetrics(d *daemon) *metrics {
	m := &metrics{
		commits: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "meshca_ledger_commit_seconds", Help: "Durable commits of ledger groups.", Buckets: prometheus.ExponentialBuckets(.0001, 2, 16),
		}, []string{"outcome"}),
		groups: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "meshca_ledger_group_entries", Help: "Entries that shared a commit.", Buckets: prometheus.ExponentialBuckets(1, 2, 10),
		}),
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_own_renewals_total", Help: "Renewals of the CA's own credentials (intermediate, server).",
		}, []string{"credential", "outcome"}),
		clusterCalls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "meshca_cluster_call_seconds", Help: "Calls to clusters' API servers and key sources.", Buckets: prometheus.ExponentialBuckets(.001, 2, 14),
		}, []string{"cluster", "call", "outcome"}),
		upstream: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "meshca_upstream_call_seconds", Help: "Calls to an upstream that is elsewhere (Vault).", Buckets: prometheus.ExponentialBuckets(.001, 2, 16),
		}, []string{"operation", "outcome"}),
	}
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
	}
	d.registry.MustRegister(m.commits, m.groups, m.renewals, m.clusterCalls, m.upstream,
		gauge("meshca_ready", "1 when the CA can sign now.", func() float64 { return truth(len(d.notReady()) == 0) }),
		gauge("meshca_bundle_sequence", "Sequence of the trust bundle.", func() float64 {
			b, _ := d.trust.Bundle()
			n, _ := b.SequenceNumber()
			return float64(n)
		}),
		gauge("meshca_rolled_back", "1 when agents have shown that the store is an old one, and nobody has accepted that.", func() float64 {
			return truth(d.continuity.Loss() != nil)
		}),
		gauge("meshca_intermediate_remaining_seconds", "Until the earliest end in the intermediate's chain; 0 without one.", func() float64 {
			return max(0, untilOrZero(d.authority.NotAfter()).Seconds())
		}),
		gauge("meshca_policy_in_force", "1 when the policy file as it is now is in force, 0 when it was refused.", func() float64 {
			return truth(d.policy.status.Value().err == nil)
		}),
		gauge("meshca_agents_connected", "Agents with an open Sync stream.", func() float64 { return float64(d.connected()) }),
		gauge("meshca_holders", "Pods by agent and identity that hold a live SVID through an agent.", func() float64 { held, _ := d.endings.Count(); return float64(held) }),
		gauge("meshca_endings_told", "Identities that ended with their cause, and whose SVIDs would still live: agents are told of them.", func() float64 {
			_, told := d.endings.Count()
			return float64(told)
		}),
		clusterCollector{d}, upstreamCollector{d})
	return m
}

// commit is told of each group that the ledger commits.
func (m *metrics) commit(entries int, took time.Duration, err error) {
	outcome := "ok"
	if err != nil {
		outcome = "failed"
	}
	m.commits.WithLabelValues(outcome).Observe(took.Seconds())
	m.groups.Observe(float64(entries))
	m.ledger.committed(err)
}

func (m *metrics) renewed(credential string, err error) {
	outcome := "ok"
	if err != nil {
		outcome = string(refusal.Of(err))
	}
	m.renewals.WithLabelValues(credential, outcome).Inc()
}

func (m *metrics) clusterCall(cluster string) func(kubernetes.Call) {
	return func(c kubernetes.Call) {
		outcome := "ok"
		if c.Outcome != "" {
			outcome = string(c.Outcome)
		}
		m.clusterCalls.WithLabelValues(cluster, c.What, outcome).Observe(c.Took.Seconds())
	}
}

func (m *metrics) upstreamCall(c vault.Call) {
	outcome := "ok"
	if c.Err != nil {
		outcome = string(vault.KindOf(c.Err))
	}
	m.upstream.WithLabelValues(string(c.Operation), outcome).Observe(c.Took.Seconds())
}

// clusterCollector reads the clusters' states when Prometheus asks.
type clusterCollector struct{ d *daemon }

var (
	clusterReady = prometheus.NewDesc("meshca_cluster_ready", "1 when the cluster's workloads can be attested.", []string{"cluster"}, nil)
	clusterWatch = prometheus.NewDesc("meshca_cluster_watched", "1 when it is known at once what of the cluster ends, 0 when at renewals alone.", []string{"cluster"}, nil)
	clusterSkew  = prometheus.NewDesc("meshca_cluster_clock_skew_seconds", "The API server's clock minus the CA's.", []string{"cluster"}, nil)
)

// Describe sends the descriptions.
func (clusterCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{clusterReady, clusterWatch, clusterSkew} {
		ch <- d
	}
}

// Collect sends the values of each cluster.
func (c clusterCollector) Collect(ch chan<- prometheus.Metric) {
	for name, cluster := range c.d.clusters {
		s := cluster.Status()
		ch <- prometheus.MustNewConstMetric(clusterReady, prometheus.GaugeValue, truth(s.Healthy), name)
		ch <- prometheus.MustNewConstMetric(clusterWatch, prometheus.GaugeValue, truth(s.Watched()), name)
		if !s.SkewMeasured.IsZero() {
			ch <- prometheus.MustNewConstMetric(clusterSkew, prometheus.GaugeValue, s.ClockSkew.Seconds(), name)
		}
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func untilOrZero(t time.Time) time.Duration {
	if t.IsZero() {
		return 0
	}
	return time.Until(t)
}

func sortedNames[T any](m map[string]T) []string { return slices.Sorted(maps.Keys(m)) }
