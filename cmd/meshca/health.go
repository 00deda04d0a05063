package main

import (
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca/upstream/vault"
)

// upstreamHealth is what the upstream does not do, since when, and why. Each thing that it is asked for is for itself: one
// that works does not hide another that does not. It is safe for concurrent use.
type upstreamHealth struct {
	mu      sync.Mutex
	failing map[string]outage
}

// outage is one thing that fails since, and how it failed last.
type outage struct {
	since time.Time
	err   error
}

func newUpstreamHealth() *upstreamHealth { return &upstreamHealth{failing: map[string]outage{}} }

// answered is told how the upstream answered to something.
func (h *upstreamHealth) answered(what string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil {
		delete(h.failing, what)
		return
	}
	o := h.failing[what]
	if o.since.IsZero() {
		o.since = time.Now()
	}
	o.err = err
	h.failing[what] = o
}

// forget is for what is not asked for any more.
func (h *upstreamHealth) forget(what string) { h.answered(what, nil) }

// longest is what fails for the longest time; zero when nothing does.
func (h *upstreamHealth) longest() outage {
	h.mu.Lock()
	defer h.mu.Unlock()
	var longest outage
	for _, o := range h.failing {
		if longest.since.IsZero() || o.since.Before(longest.since) {
			longest = o
		}
	}
	return longest
}

// upstreamCalled is told of each call to an upstream that is elsewhere.
func (d *daemon) upstreamCalled(c vault.Call) {
	if c.Operation != vault.OpRely {
		d.metrics.upstreamCall(c)
	}
	switch kind := vault.KindOf(c.Err); {
	case c.Operation == vault.OpSign: // the line that asked for it tells, and stops to when it is needed no more
	case kind == vault.KindCanceled, c.Operation == vault.OpRead && (kind == vault.KindMissing || kind == vault.KindMalformed): // an issuer's own
	case c.Candidate && kind == vault.KindDenied: // the policy is for others
	default:
		d.health.answered(string(c.Operation), c.Err)
		if c.Operation == vault.OpLogin && c.Err == nil {
			d.health.forget(string(vault.OpRenew))
		}
	}
}

// degraded says what is wrong though the CA can sign, a sentence each, with how long that can go on.
func (d *daemon) degraded() []string {
	var why []string
	o := d.health.longest()
	if until := d.authority.IssuesUntil(); o.err != nil && !until.IsZero() {
		why = append(why, fmt.Sprintf("the upstream does not do what it is asked since %s: issuance goes on until %s, for the next %s; the last error: %v",
			o.since.UTC().Format(time.RFC3339), until.UTC().Format(time.RFC3339), time.Until(until).Round(time.Second), o.err))
	}
	if d.bundleFile != nil {
		if s := d.bundleFile.degraded(); s != "" {
			why = append(why, s)
		}
	}
	return why
}

// upstreamCollector reads how long the CA can go on when Prometheus asks.
type upstreamCollector struct{ d *daemon }

var (
	upstreamUp      = prometheus.NewDesc("meshca_upstream_up", "1 while the upstream does what it was asked last, 0 while it does not.", nil, nil)
	upstreamFailing = prometheus.NewDesc("meshca_upstream_failing_since_seconds", "Unix time since when the upstream does not; 0 while it does.", nil, nil)
	issuesUntil     = prometheus.NewDesc("meshca_issuance_until_seconds",
		"Unix time until when the CA can issue if the upstream signs no further intermediate; 0 while it cannot.", nil, nil)
	lineEnds = prometheus.NewDesc("meshca_intermediate_not_after_seconds",
		"Unix time of the earliest end in the chain of the intermediate below a root, by the first twelve digits of the root's SHA-256.", []string{"root"}, nil)
)

// Describe sends the descriptions.
func (upstreamCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{upstreamUp, upstreamFailing, issuesUntil, lineEnds} {
		ch <- d
	}
}

// Collect sends the values; an intermediate that there is not has none.
func (c upstreamCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	o := c.d.health.longest()
	gauge(upstreamUp, truth(o.err == nil))
	gauge(upstreamFailing, unixSeconds(o.since))
	gauge(issuesUntil, unixSeconds(c.d.authority.IssuesUntil()))
	lines, _ := c.d.authority.Lines()
	ends := map[string]time.Time{} // two issuers may stand below one root
	for _, l := range lines {
		name, end := fmt.Sprintf("%.12s", l.Root().ID), l.Status().NotAfter
		if have, known := ends[name]; !end.IsZero() && (!known || end.Before(have)) {
			ends[name] = end
		}
	}
	for name, end := range ends {
		gauge(lineEnds, unixSeconds(end), name)
	}
}

func unixSeconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.Unix())
}
