package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/issuance"
	"github.com/meshca/meshca/api/kubesigner"
	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/keyring"
	"github.com/meshca/meshca/ca/lint"
	"github.com/meshca/meshca/ca/pkcs11"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/rotation"
)

// daemon is the CA put together. Its parts stand in the order in which they were made; close goes back through them.
type daemon struct {
	config       *Config
	log          *slog.Logger
	started      time.Time
	clock        *rotation.Clock // says what has ended
	registry     *prometheus.Registry
	metrics      *metrics
	store        *bolt.Store
	trust        *ca.Trust
	named        []*x509.Certificate // the roots that the configuration wants trusted, whoever signs
	heard        bool                // the upstream has told of its issuers. owner: the start, then trustFound
	tokens       *pkcs11.Modules
	keys         *keyring.Ring // nil: the intermediates' keys stay in memory
	upstream     ca.Upstream
	health       *upstreamHealth
	authority    *ca.Authority
	roller       *rotation.Roller
	operator     *rollout.Operator
	bundleFile   *bundleFile // nil: none is configured
	servingWake  chan struct{}
	ledger       *ca.Sequencer
	issuer       *ca.Issuer
	serving      *ca.Serving
	attempts     attempts // at the CA's own credentials
	policy       *policyFile
	policyText   []byte
	clusters     map[string]*kubernetes.Cluster
	orders       *registration.Orders
	agents       *registration.AgentBook
	endings      *registration.Endings
	continuity   *registration.Continuity
	audit        *auditFile // nil: stderr
	decisions    *registration.Metrics
	journal      *registration.Journal
	registration *registration.Authority
	door         *issuance.Server
	signers      map[string]*kubesigner.Signer
	publishers   map[string]*kubesigner.Publisher

	closers []func() error
}

// serve runs the CA until ctx ends.
func serve(ctx context.Context, c *Config, stderr io.Writer) (err error) {
	tuneRuntime()
	log, err := newLog(stderr, c.LogLevel)
	if err != nil {
		return err
	}
	d, err := open(ctx, c, log, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	return d.run(ctx)
}

// open puts the CA together with the upstream that the configuration names.
func open(ctx context.Context, c *Config, log *slog.Logger, stderr io.Writer) (*daemon, error) {
	return openOn(ctx, c, log, stderr, openUpstream)
}

// openOn puts the CA together with an upstream, on the machine's clocks.
func openOn(ctx context.Context, c *Config, log *slog.Logger, stderr io.Writer, upstream openUpstreamFunc) (*daemon, error) {
	return openBy(ctx, rotation.NewClock(rotation.ClockOptions{}), c, log, stderr, upstream)
}

// openBy puts the CA together, in a straight line. What it opened is closed again when it fails.
func openBy(ctx context.Context, clock *rotation.Clock, c *Config, log *slog.Logger, stderr io.Writer, upstream openUpstreamFunc) (_ *daemon, err error) {
	d := &daemon{config: c, log: log, started: time.Now(), clock: clock, registry: prometheus.NewRegistry(), health: newUpstreamHealth(),
		servingWake: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	d.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	d.metrics = newMetrics(d)
	if err := d.openUpstream(ctx, upstream); err != nil {
		return nil, err
	}
	if err := d.openIssuer(); err != nil {
		return nil, err
	}
	members, err := d.openClusters()
	if err != nil {
		return nil, err
	}
	if err := d.openAgents(ctx); err != nil {
		return nil, err
	}
	if err := d.openPublishers(); err != nil {
		return nil, err
	}
	if err := d.openRoller(ctx); err != nil {
		return nil, err
	}
	if err := d.openDoor(members, stderr); err != nil {
		return nil, err
	}
	if err := d.openSigners(); err != nil {
		return nil, err
	}
	return d, nil
}

// openUpstream opens the store, with what it already knows of trust, and who signs.
func (d *daemon) openUpstream(ctx context.Context, upstream openUpstreamFunc) (err error) {
	if err := rootFirst(d.config); err != nil {
		return err
	}
	if err := os.MkdirAll(d.config.StateDir, 0o700); err != nil {
		return fmt.Errorf("stateDir: %w", err)
	}
	if d.store, err = bolt.Open(d.storePath()); err != nil {
		return err
	}
	d.onClose(d.store.Close)
	for _, notice := range d.store.Notices() {
		d.log.Warn("opening the store", slog.String("notice", notice))
	}
	d.tokens = pkcs11.New()
	d.onClose(d.tokens.Close)
	if d.keys, err = openKeys(d.config, d.tokens, d.log); err != nil {
		return err
	}
	if d.upstream, err = upstream(d.config, d.tokens, d.log, d.upstreamCalled); err != nil {
		return d.withoutUpstream(ctx, err)
	}
	if u, ok := d.upstream.(interface{ Close() error }); ok {
		d.onClose(u.Close)
	}
	return d.openRoots(ctx)
}

// openIssuer puts together what records and signs.
func (d *daemon) openIssuer() (err error) {
	if d.ledger, err = ca.NewSequencer(ca.SequencerConfig{Store: d.store, Observe: d.metrics.commit}); err != nil {
		return err
	}
	d.onClose(func() error { d.ledger.Close(); return nil })
	linter, err := lint.New(lint.Options{})
	if err != nil {
		return err
	}
	d.issuer, err = ca.NewIssuer(ca.IssuerConfig{
		Authority: d.authority, Ledger: d.ledger, Linter: linter, Profiles: ca.Profiles(d.config.SVID.TTL.Duration),
	})
	if err != nil {
		return err
	}
	d.serving, err = ca.NewServing(d.issuer)
	return err
}

// openClusters opens policy, and those whom it is for.
func (d *daemon) openClusters() (members map[string]registration.Member, err error) {
	if d.policy, d.policyText, err = openPolicy(d.config, d.log); err != nil {
		return nil, err
	}
	members = make(map[string]registration.Member, len(d.config.Clusters))
	d.clusters = make(map[string]*kubernetes.Cluster, len(d.config.Clusters))
	for _, k := range d.config.Clusters {
		cluster, err := kubernetes.New(k.Config, kubernetes.Deps{Log: d.log, Observe: d.metrics.clusterCall(k.Name)})
		if err != nil {
			return nil, fmt.Errorf("cluster %s: %w. Put that right, or take the cluster out of the configuration until it is: "+
				"at its start the CA opens all of its clusters or none", k.Name, err)
		}
		d.clusters[k.Name], members[k.Name] = cluster, registration.Member{Cluster: cluster, Agents: k.Agents}
	}
	d.policy.prepare = d.want
	d.want(d.policy.current.Value())
	return members, nil
}

// openAgents opens what is known of agents, and what was ordered.
func (d *daemon) openAgents(ctx context.Context) (err error) {
	if d.orders, err = registration.OpenOrders(ctx, d.store, d.store.ScanLiving); err != nil {
		return err
	}
	if d.agents, err = registration.OpenAgentBook(ctx, d.store); err != nil {
		return err
	}
	d.endings = registration.NewEndings()
	d.onClose(d.flushAgents)
	if err := d.agents.Recall(ctx, d.store.ScanLedger); err != nil {
		return err
	}
	d.continuity, err = registration.OpenContinuity(ctx, d.store, d.trust, d.agents, d.log)
	return err
}

// openDoor puts together the one procedure, and its door. Decisions are told to stderr, where the configuration names no file.
func (d *daemon) openDoor(members map[string]registration.Member, stderr io.Writer) (err error) {
	c := d.config
	if c.Audit.File != "" {
		if d.audit, err = openAuditFile(c.Audit.File); err != nil {
			return err
		}
		d.onClose(d.audit.close)
		stderr = d.audit
	}
	d.decisions = registration.NewMetrics(d.registry)
	d.journal = registration.NewJournal(stderr, registration.NewRing(c.RememberedDecisions), d.decisions, d.log)
	pace, err := registration.NewPace(c.Limits.SVIDsPerPod)
	if err != nil {
		return fmt.Errorf("limits.%w", err)
	}
	d.registration, err = registration.New(registration.Config{
		TrustDomain: c.trustDomain, Clusters: members, Policy: d.policy.current, Issuer: d.issuer,
		Agents: d.agents, Orders: d.orders, Endings: d.endings, Continuity: d.continuity, AgentTTL: c.SVID.TTL.Duration, Pace: pace, Journal: d.journal,
	})
	if err != nil {
		return err
	}
	d.door = issuance.New(issuance.Config{
		Registration: d.registration, Bundle: d.trust.Bundle, Hold: d.mayTell, Limits: c.Limits.Limits, Log: d.log,
		Credentials: issuance.NewCredentials(func() (*tls.Certificate, error) { return d.serving.Certificate(nil) }, bundleSource{d.trust}),
	})
	return nil
}

// flushAgents stores the agents' last news, after the last call.
func (d *daemon) flushAgents() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return d.agents.Flush(ctx)
}

func (d *daemon) storePath() string { return d.config.storePath() }

func (d *daemon) onClose(f func() error) { d.closers = append(d.closers, f) }

func (d *daemon) close() error {
	var errs []error
	for _, f := range slices.Backward(d.closers) {
		errs = append(errs, f())
	}
	d.closers = nil
	return errors.Join(errs...)
}

// bundleSource is the trust bundle as go-spiffe asks for it.
type bundleSource struct{ trust *ca.Trust }

var _ x509bundle.Source = bundleSource{}

// GetX509BundleForTrustDomain returns the trust domain's bundle; no other is known.
func (b bundleSource) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	bundle, _ := b.trust.Bundle()
	return bundle.GetX509BundleForTrustDomain(td)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// ballast counts as live for the collector, and takes no memory, since nothing touches it: see tuneRuntime.
var ballast []byte

// tuneRuntime sets what the Go runtime does not know of this work. GOGC in the environment still decides where it is set.
func tuneRuntime() {
	// The heap may grow to five times what is live before it is collected: issuance makes much short-lived garbage, and at the
	// usual factor of two collecting it costs a tenth of the CA's throughput. What is live is some ten MiB in a CA that is not
	// large; so that this is not collected several times a second, the heap grows by 64 MiB more.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
		ballast = make([]byte, 16<<20)
	}
}
