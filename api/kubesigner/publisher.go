package kubesigner

import (
	"cmp"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/meshca/meshca/ca/rollout"
)

const (
	// lookAgain is how often what is published is looked at where no watch says anything.
	lookAgain = 5 * time.Minute
	// settle gathers what watches tell at once, such as that of every namespace at the start.
	settle = 100 * time.Millisecond
	// restShare is how many times as long as the last look took the place is let be when others wake us again, up to
	// longestRest: who edits something without end costs the API server a tenth of its time for it at most.
	restShare   = 10
	longestRest = 10 * time.Second
)

// errNotServed is wrapped by the fault of what the cluster has no API for: nobody there can read it either.
var errNotServed = errors.New("the cluster does not serve it")

// PublisherOptions are what a Publisher is made of; all but Every and Now are needed.
type PublisherOptions struct {
	// Cluster is the name of the cluster.
	Cluster string
	Config  PublishConfig
	// Signer is the signer's name, to which a ClusterTrustBundle is linked.
	Signer     string
	Connection Connection
	// Bundle is the trust bundle and a channel that closes when it is stale.
	Bundle func() (*spiffebundle.Bundle, <-chan struct{})
	// Hold says why nothing may be published now: the bundle may be an old one.
	Hold func() error
	Log  *slog.Logger
	// Every is how often it is looked for an API that is not served. Default 30s.
	Every time.Duration
	// Now says since when a place holds a bundle, by the clock of those who wait for its readers: see rotation.Clock.
	// Default time.Now.
	Now func() time.Time
}

// Publisher keeps objects of one cluster equal to the trust bundle. It is safe for concurrent use.
type Publisher struct {
	o       PublisherOptions
	api     *api
	targets []*target
	writes  *prometheus.CounterVec
	current *prometheus.Desc
}

// Publication is how one of the places is.
type Publication struct {
	// Name is for people: cluster, kind, and name.
	Name string
	// Sequence is that of the bundle that it holds, as it was last looked at; 0: none, or nobody knows. Since is when that
	// was written or, after a start, found.
	Sequence uint64
	Since    time.Time
	// Refresh is how old a bundle its readers may use.
	Refresh time.Duration
	// NotServed: the cluster has no API for it.
	NotServed bool
	// Fault is why it could not be written, or looked at, the last time.
	Fault string
	// Apart: it is one namespace's part of a place in every namespace, with a fault that is that namespace's own affair. No
	// rollout waits for it.
	Apart bool
}

// NewPublisher checks the options and returns a Publisher. Run has it work.
func NewPublisher(o PublisherOptions) (*Publisher, error) {
	if o.Connection == nil || o.Bundle == nil || o.Hold == nil || o.Log == nil || o.Signer == "" {
		return nil, errors.New("kubesigner: incomplete options")
	}
	if err := o.Config.Complete(); err != nil {
		return nil, err
	}
	if o.Every <= 0 {
		o.Every = 30 * time.Second
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	o.Log = o.Log.With("cluster", o.Cluster)
	labels := prometheus.Labels{"cluster": o.Cluster}
	p := &Publisher{
		o: o, api: newAPI(o.Connection),
		current: prometheus.NewDesc("meshca_trust_published", "1 while the place holds the current trust bundle, as far as is known.", []string{"place"}, labels),
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_trust_writes_total", ConstLabels: labels,
			Help: "Writes of the trust bundle: written, restored (somebody else had changed it), failed.",
		}, []string{"place", "outcome"}),
	}
	c := o.Config
	if c.ClusterTrustBundle != nil {
		p.targets = append(p.targets, p.clusterTrustBundle(*c.ClusterTrustBundle))
	}
	if c.Agents != nil {
		agents := p.configMap(*c.Agents, material.spiffe)
		agents.refresh = c.AgentsRefresh.Duration
		p.targets = append(p.targets, agents)
	}
	if c.Linkerd != nil {
		p.targets = append(p.targets, p.configMap(*c.Linkerd, material.roots))
	}
	if c.Istio != nil {
		p.targets = append(p.targets, p.everyNamespace(*c.Istio))
	}
	return p, nil
}

// material is the trust bundle in its forms.
type material struct {
	domain    string
	sequence  uint64
	json, pem string
}

func (m material) spiffe() string { return m.json }
func (m material) roots() string  { return m.pem }

func materialOf(b *spiffebundle.Bundle) (material, error) {
	data, err := b.Marshal()
	if err != nil {
		return material{}, fmt.Errorf("encoding the trust bundle: %w", err)
	}
	m := material{domain: b.TrustDomain().Name(), json: string(data)}
	m.sequence, _ = b.SequenceNumber()
	for _, root := range b.X509Authorities() {
		m.pem += string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}))
	}
	return m, nil
}

// target is one place where the bundle is published.
type target struct {
	name    string
	refresh time.Duration // of its readers, where it is not that of all
	// put makes the place hold the bundle. had is the sequence that it held when it was last looked at; 0: nobody has looked
	// since the start.
	put func(ctx context.Context, m material, had uint64) (outcome, error)
	// follow watches the place until ctx ends or that breaks for good, and calls wake when somebody may have changed it.
	follow []func(ctx context.Context, wake func()) error

	mu       sync.Mutex
	sequence uint64
	since    time.Time
	fault    error
	// late: something was written of a bundle that has not come everywhere yet.
	late  bool
	apart []Publication
}

// outcome is what bringing a place up to date found and did.
type outcome struct {
	// changed: readers of the place may have read another bundle there until now. restored: because somebody else wrote it.
	// written counts objects that were made where nobody has read anything yet.
	changed, restored bool
	written           int
	// apart are parts of the place that have a fault of their own, which is nobody else's.
	apart []Publication
}

// Run publishes until ctx ends.
func (p *Publisher) Run(ctx context.Context) {
	var running sync.WaitGroup
	for _, t := range p.targets {
		wake := make(chan struct{}, 1)
		for _, follow := range t.follow {
			running.Go(func() { p.watch(ctx, t.name, follow, wake) })
		}
		running.Go(func() { p.keep(ctx, t, wake) })
	}
	running.Wait()
}

// watch wakes a place's loop for as long as it can. Without it, what others change is noticed when the place is looked at
// again.
func (p *Publisher) watch(ctx context.Context, place string, follow func(context.Context, func()) error, wake chan<- struct{}) {
	told := false
	for ctx.Err() == nil {
		err := follow(ctx, func() {
			select {
			case wake <- struct{}{}:
			default:
			}
		})
		if err != nil && ctx.Err() == nil && !told && !errors.Is(err, errNotServed) {
			told = true
			p.o.Log.Warn("what is published cannot be watched; it is looked at every few minutes", "place", place, "err", err)
		}
		pause(ctx, p.o.Every, nil, nil)
	}
}

// keep is the loop of one place.
func (p *Publisher) keep(ctx context.Context, t *target, wake <-chan struct{}) {
	failures := 0
	for ctx.Err() == nil {
		held := p.o.Hold() // before the bundle is looked at: what is told now has nothing of before that
		bundle, stale := p.o.Bundle()
		began := time.Now()
		err := p.publish(ctx, t, bundle, held)
		rest := time.Now().Add(min(restShare*time.Since(began), longestRest))
		wait := lookAgain
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, errNotServed):
			wait, failures = p.o.Every, 0
		case err != nil:
			failures++
			wait = backoff(failures)
		default:
			failures = 0
		}
		if pause(ctx, wait, stale, wake) {
			pause(ctx, max(settle, time.Until(rest)), stale, nil)
		}
	}
}

// pause waits for d at most, and reports whether it was woken.
func pause(ctx context.Context, d time.Duration, stale, wake <-chan struct{}) (woken bool) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-stale:
	case <-wake:
		return true
	}
	return false
}

// publish brings one place up to date, unless that is held, and notes how that went.
func (p *Publisher) publish(ctx context.Context, t *target, b *spiffebundle.Bundle, held error) error {
	m, err := materialOf(b)
	if err == nil {
		err = held
	}
	t.mu.Lock()
	had, fault := t.sequence, t.fault
	t.mu.Unlock()
	var did outcome
	if err == nil {
		did, err = t.put(ctx, m, had)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	p.tell(t, m.sequence, did, fault, err)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.late = t.late || did.changed
	if t.fault = err; err != nil {
		return err
	}
	if t.late || had == 0 { // what was found, readers may have since now for all that is known
		t.since = p.o.Now()
	}
	t.sequence, t.late, t.apart = m.sequence, false, did.apart
	return nil
}

// tell logs and counts how bringing a place up to date went. fault is the one before.
func (p *Publisher) tell(t *target, sequence uint64, did outcome, fault, err error) {
	log := p.o.Log.With("place", t.name)
	switch {
	case err != nil && (fault == nil || errors.Is(err, errNotServed) != errors.Is(fault, errNotServed)):
		log.Warn("the trust bundle cannot be published; it is tried again", "sequence", sequence, "err", err)
	case err == nil && did.restored && did.apart == nil: // else it is told below, not at each edit
		log.Warn("somebody else changed what was published; it was put back", "sequence", sequence)
	case err == nil && (did.changed || fault != nil):
		log.Info("the trust bundle is published", "sequence", sequence)
	}
	for _, x := range did.apart { // few, and each is told once for as long as it lasts
		if !slices.ContainsFunc(t.apart, func(before Publication) bool { return before.Name == x.Name }) {
			log.Warn("a namespace has trouble of its own with what is published there; nobody else waits for it", "at", x.Name, "err", x.Fault)
		}
	}
	switch {
	case err != nil:
		p.writes.WithLabelValues(t.name, "failed").Inc()
	case did.restored:
		p.writes.WithLabelValues(t.name, "restored").Inc()
	case did.changed || did.written > 0:
		p.writes.WithLabelValues(t.name, "written").Inc()
	}
}

// Status is how each place is, and after it those parts of it that have trouble of their own.
func (p *Publisher) Status() []Publication {
	var all []Publication
	for _, t := range p.targets {
		t.mu.Lock()
		s := Publication{Name: t.name, Refresh: cmp.Or(t.refresh, p.o.Config.Refresh.Duration), Sequence: t.sequence, Since: t.since, NotServed: errors.Is(t.fault, errNotServed)}
		if t.fault != nil {
			s.Fault = t.fault.Error()
		}
		all = append(append(all, s), t.apart...)
		t.mu.Unlock()
	}
	return all
}

// Published tells a rollout since when each place holds a bundle of this sequence or a later one. What the cluster does
// not serve is left out: there is nobody to wait for.
func (p *Publisher) Published(set uint64) []rollout.Publication {
	var all []rollout.Publication
	for _, s := range p.Status() {
		if s.NotServed || s.Apart {
			continue
		}
		r := rollout.Publication{Reader: rollout.Reader{Name: s.Name, Refresh: s.Refresh}, Fault: s.Fault}
		if s.Sequence >= set {
			r.Since = s.Since
		}
		all = append(all, r)
	}
	return all
}

var _ prometheus.Collector = (*Publisher)(nil)

// Describe sends the descriptions.
func (p *Publisher) Describe(ch chan<- *prometheus.Desc) {
	p.writes.Describe(ch)
	ch <- p.current
}

// Collect sends the values.
func (p *Publisher) Collect(ch chan<- prometheus.Metric) {
	p.writes.Collect(ch)
	bundle, _ := p.o.Bundle()
	sequence, _ := bundle.SequenceNumber()
	for _, s := range p.Status() {
		if s.Apart {
			continue // a label for each namespace would be without a bound
		}
		current := 0.0
		if s.Sequence >= sequence && s.Fault == "" {
			current = 1
		}
		ch <- prometheus.MustNewConstMetric(p.current, prometheus.GaugeValue, current, s.Name)
	}
}
