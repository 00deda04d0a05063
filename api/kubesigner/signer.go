package kubesigner

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
)

// Registration is where every request ends: ca/registration.Authority.
type Registration interface {
	// AdmitObjects admits the objects of a cluster.
	AdmitObjects(cluster string) (*registration.Admitted, error)
	// Issue decides and signs.
	Issue(ctx context.Context, by *registration.Admitted, r registration.Request) (ca.SVID, error)
	// Stands reports whether what was issued for a request would be granted now too.
	Stands(ctx context.Context, by *registration.Admitted, r registration.Request, svid ca.SVID) error
	// Refuse records what this door refused itself, and returns err.
	Refuse(by *registration.Admitted, r registration.Request, err error) error
}

var _ Registration = (*registration.Authority)(nil)

// SignerOptions are what a Signer is made of; all but Every are needed.
type SignerOptions struct {
	// Cluster is the name of the cluster.
	Cluster    string
	Config     Config
	Connection Connection
	// Registration decides.
	Registration Registration
	// Replica tells this CA from others that serve the same cluster; it is the same after a restart.
	Replica string
	Log     *slog.Logger
	// Every is how often it is looked for an API that is not served, or may not be used. Default 30s.
	Every time.Duration
}

// Signer answers one cluster's requests for certificates. It is safe for concurrent use.
type Signer struct {
	doors            []*door
	answers          *prometheus.CounterVec
	serving, pending *prometheus.Desc
}

// NewSigner checks the options and returns a Signer. Run has it work.
func NewSigner(o SignerOptions) (*Signer, error) {
	if o.Connection == nil || o.Registration == nil || o.Log == nil || o.Replica == "" {
		return nil, errors.New("kubesigner: incomplete options")
	}
	if err := o.Config.Complete(); err != nil {
		return nil, err
	}
	if o.Every <= 0 {
		o.Every = 30 * time.Second
	}
	o.Log = o.Log.With("cluster", o.Cluster)
	by, err := o.Registration.AdmitObjects(o.Cluster)
	if err != nil {
		return nil, err
	}
	labels := prometheus.Labels{"cluster": o.Cluster}
	s := &Signer{
		serving: prometheus.NewDesc("meshca_signer_serving", "1 while requests of this kind are answered.", []string{"api"}, labels),
		pending: prometheus.NewDesc("meshca_signer_pending", "Open requests of this kind.", []string{"api"}, labels),
		answers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "meshca_signer_answers_total", ConstLabels: labels,
			Help: "Requests of Kubernetes' certificates API that were answered (issued, denied), and answers that the API server did not take (rejected).",
		}, []string{"api", "outcome"}),
	}
	var protocols []protocol
	if o.Config.PodCertificateRequests {
		protocols = append(protocols, podCertificates(o.Cluster, o.Config.Name))
	}
	if o.Config.CertificateSigningRequests {
		protocols = append(protocols, signingRequests(o.Cluster, o.Config.Name))
	}
	a := newAPI(o.Connection)
	for _, p := range protocols {
		s.doors = append(s.doors, newDoor(o, a, p, by, func(outcome string) { s.answers.WithLabelValues(p.plural, outcome).Inc() }))
	}
	return s, nil
}

// Run answers until ctx ends, and returns when what was in hand is finished.
func (s *Signer) Run(ctx context.Context) {
	var running sync.WaitGroup
	for _, d := range s.doors {
		running.Go(func() { d.run(ctx) })
	}
	running.Wait()
}

// Status is how each kind of request is served.
func (s *Signer) Status() []DoorStatus {
	var all []DoorStatus
	for _, d := range s.doors {
		all = append(all, d.status())
	}
	return all
}

var _ prometheus.Collector = (*Signer)(nil)

// Describe sends the descriptions.
func (s *Signer) Describe(ch chan<- *prometheus.Desc) {
	s.answers.Describe(ch)
	ch <- s.serving
	ch <- s.pending
}

// Collect sends the values.
func (s *Signer) Collect(ch chan<- prometheus.Metric) {
	s.answers.Collect(ch)
	for _, d := range s.Status() {
		serving := 0.0
		if d.State == StateServing {
			serving = 1
		}
		ch <- prometheus.MustNewConstMetric(s.serving, prometheus.GaugeValue, serving, d.API)
		ch <- prometheus.MustNewConstMetric(s.pending, prometheus.GaugeValue, float64(d.Pending), d.API)
	}
}
