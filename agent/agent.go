package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/api/issuance/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/rotation"
)

// Agent is the agent of one node.
type Agent struct {
	config Config
	log    *slog.Logger

	trust    *trust
	client   *client.Client
	store    *store
	clock    clock
	self     *self
	batcher  *batcher
	follower *follower
	sds      *sds.Server
	metrics  *metrics

	roster   roster
	denials  *denials
	endings  endings
	renewals renewals
	stage    stage
	handed   *handed // connections that sources accepted
	places   *places
	readers  readers
	proxies  *proxies
	// policyReviewed is the moment that the CA's last state told; apply alone uses it.
	policyReviewed time.Time
	// distributed is the bundle sequence that every socket serves and that is on disk.
	distributed rotation.Current[uint64]
	started     time.Time
}

var _ home = (*Agent)(nil)

// New makes an agent of a configuration, to be run once. It touches no file and no network before Run.
func New(c Config) (*Agent, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	c = c.withDefaults()
	a := &Agent{config: c, log: c.Log, started: time.Now(), handed: newHanded(), places: newPlaces(), clock: clock{now: c.now}}
	a.denials = newDenials(filepath.Join(c.StateDir, "denied.json"), c.Log)
	a.trust = newTrust(c.TrustDomain, c.BundleFile, filepath.Join(c.StateDir, "bundle.json"), c.Log)
	a.store = &store{filepath.Join(c.RuntimeDir, "keys"), c.now}
	a.proxies = newProxies(filepath.Join(c.RuntimeDir, "streams"), a.openSince, c.Log)
	a.self = &self{
		domain: c.TrustDomain, cluster: c.Cluster, tokenFile: c.TokenFile, version: c.Version,
		trust: a.trust, store: a.store, clock: &a.clock, now: c.now, log: c.Log, gained: a.gained, uprooted: a.uprooted,
		wake: make(chan struct{}, 1), identity: rotation.NewCurrent[*held](nil),
	}
	a.self.orders.wake = a.self.renewNow
	var err error
	a.client, err = client.New(client.Config{
		Address: c.Server, TrustDomain: c.TrustDomain, Bundle: a.trust, Identity: a.self.certificate, Dial: c.Dial,
		UserAgent: "meshca-agent/" + c.Version,
		Rejected:  func(error) { _ = a.trust.readFile() }, // trust keeps the error for status and checks
	})
	if err != nil {
		return nil, err
	}
	a.self.client = a.client
	if a.sds, err = a.newSDS(); err != nil {
		return nil, err
	}
	for _, w := range c.Workloads {
		if err := a.roster.add(newWorkload(w, a, a.trust, &a.clock, c.Log)); err != nil {
			return nil, err
		}
	}
	a.metrics = newMetrics(a)
	a.batcher = newBatcher(c.Cluster, a.client, a.called)
	a.follower = &follower{
		client: a.client, self: a.self, clock: &a.clock, log: c.Log, apply: a.apply, taken: a.taken,
		hello: func() *meshcav1.SyncHello {
			return &meshcav1.SyncHello{Cluster: c.Cluster, Version: c.Version, HighestBundleSequence: a.trust.sequence(), Mark: a.trust.witnessed()}
		},
	}
	return a, nil
}

// Run serves until ctx ends, and returns nil then. It returns an error when the agent cannot do its work at all: another
// one runs in the same directory, or the admin socket or the ops address cannot be opened. Everything else it outlasts.
func (a *Agent) Run(ctx context.Context) error {
	defer a.client.Close()
	unlock, err := a.prepare()
	if err != nil {
		return err
	}
	defer unlock()
	admin, err := listen(a.config.AdminSocket, 0o600, nil, nil)
	if err != nil {
		return fmt.Errorf("the admin socket: %w", err)
	}
	ops, err := a.listenOps()
	if err != nil {
		_ = admin.Close()
		return err
	}
	a.trust.load()
	a.denials.load()
	own, err := a.restore()
	if err != nil {
		_, _ = admin.Close(), ops.Close()
		return err
	}

	g, ctx := errgroup.WithContext(ctx)
	transport := a.newSDSTransport()
	a.stage = stage{ctx, transport}
	g.Go(func() error { _ = transport.Serve(a.handed); return nil }) // until the transport stops
	g.Go(func() error { return a.serveAdmin(ctx, admin) })
	g.Go(func() error { return a.serveOps(ctx, ops) })
	g.Go(func() error { a.batcher.run(ctx); return nil })
	g.Go(func() error { a.distribute(ctx); return nil })
	g.Go(func() error { a.follower.run(ctx); return nil })
	g.Go(func() error { a.watchTokens(ctx); return nil })
	g.Go(func() error { a.watchClock(ctx); return nil })
	g.Go(func() error { a.proxies.run(ctx); return nil })
	g.Go(func() error {
		return stopped(rotation.Keep(ctx, a.self, rotation.KeepOptions{Have: own, Wake: a.self.wake, Observe: a.observeSelf}))
	})
	for _, w := range a.roster.list() {
		a.start(w)
	}
	var sources errgroup.Group
	for _, s := range a.config.Sources {
		sources.Go(func() error { return s.Run(ctx, a) })
	}
	g.Go(sources.Wait)
	g.Go(func() error {
		<-ctx.Done()
		a.self.orders.stop()
		_ = sources.Wait() // no workload comes any more
		for _, w := range a.roster.list() {
			w.stop()
		}
		stopGracefully(transport)
		for _, w := range a.roster.list() {
			w.running.Wait()
		}
		return nil
	})
	a.log.Info("agent started", "version", a.config.Version, "cluster", a.config.Cluster, "server", a.config.Server, "workloads", len(a.roster.list()))
	err = g.Wait()
	if err == nil {
		a.leave()
	}
	a.log.Info("agent stopped")
	return err
}

// stopped turns the end that was asked for into success.
func stopped(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}

// prepare makes the directories and sees that no second agent uses them.
func (a *Agent) prepare() (unlock func(), err error) {
	for _, dir := range []string{a.config.RuntimeDir, a.config.StateDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil { // sockets for others may lie in it; keys have a directory of their own
			return nil, err
		}
	}
	unlock, err = lockFile(a.lockPath(), 5*time.Second)
	if errors.Is(err, errLocked) {
		return nil, refusal.New(refusal.SocketInUse, "another meshca-agent uses %s: stop it, or set runtimeDir: %w", a.config.RuntimeDir, err)
	}
	if err != nil {
		return nil, err
	}
	for _, prepare := range []func() error{a.store.prepare, a.proxies.prepare} {
		if err := prepare(); err != nil {
			unlock()
			return nil, err
		}
	}
	return unlock, nil
}

func (a *Agent) keepWorkload(ctx context.Context, w *workload) {
	options := rotation.KeepOptions{Wake: w.wake, Observe: func(attempt rotation.Attempt) {
		w.observed(attempt)
		a.attempted(w, attempt.Err)
		a.metrics.renewed("workload", attempt)
	}}
	if h := w.holds(); h != nil {
		options.Have = &h.term
	}
	_ = rotation.Keep(ctx, w, options) // it ends with ctx
}

// attempted is told how a renewal went. What came is held to the orders that came before it, and nobody comes back to a
// workload that has ended.
func (a *Agent) attempted(w *workload, err error) {
	if err == nil {
		a.renewals.hold(&w.orders, w.holds, w.phase)
	}
	if isVerdict(err) && refusal.Of(err).EndsLife() {
		a.proxies.forget(w.Socket)
	}
}

func (a *Agent) observeSelf(attempt rotation.Attempt) {
	a.self.observed(attempt)
	a.metrics.renewed("self", attempt)
}

// issue asks the CA, together with whoever else asks at this moment.
func (a *Agent) issue(ctx context.Context, r *meshcav1.X509SVIDRequest) (*meshcav1.X509SVID, error) {
	if err := a.self.await(ctx); err != nil {
		return nil, err
	}
	return a.batcher.issue(ctx, r)
}

// called notes a call to the CA.
func (a *Agent) called(size int, took time.Duration, answer *meshcav1.IssueX509SVIDsResponse, err error) {
	a.metrics.called(size, took)
	if err != nil {
		a.self.distrust(err)
		return
	}
	a.clock.measure(answer.GetServerTime(), took)
	for _, r := range answer.GetResults() {
		if err := client.RefusalOf(r); err != nil {
			a.self.distrustCaller(err) // who calls is judged item by item, too
		}
	}
}

func (a *Agent) denied(id spiffeid.ID) bool { return a.denials.has(id) }

func (a *Agent) keep(w *workload, h *held) error {
	if h == nil {
		return a.store.remove(w.name)
	}
	skew, _ := a.clock.offset()
	return a.store.save(w.name, w.Workload, h, skew)
}

func (a *Agent) agentID() string { return a.self.id() }

// gained is told of each new SVID of the agent's own. Workloads that were refused for the one before need not wait: that
// is this agent's trouble, after an outage it is the fleet's.
func (a *Agent) gained(anew bool) {
	for _, w := range a.roster.list() {
		if anew {
			w.retryNow()
		} else {
			w.retrySoon()
		}
	}
}

// apply does what the CA's state says. The clock has heard its time.
func (a *Agent) apply(state *meshcav1.SyncResponse, first bool) {
	if err := a.trust.offer(state.GetBundle(), state.GetMark()); err != nil {
		a.log.Error("a bundle from the CA cannot be used; the one before stays", "error", err)
	}
	a.applyEndings(state.GetEnded())
	a.applyDenials(state.GetDeniedIds())
	a.renewals.set(state.GetRenew())
	for _, w := range a.roster.list() {
		w.heardClock()
		a.renewals.hold(&w.orders, w.holds, w.phase)
	}
	a.renewals.hold(&a.self.orders, a.self.identity.Value, a.self.id)
	reviewed := state.GetPolicyReviewedAt().AsTime()
	if first || !reviewed.Equal(a.policyReviewed) { // the CA is there again, or what it refused it may grant now
		for _, w := range a.roster.list() {
			w.retrySoon()
		}
	}
	a.policyReviewed = reviewed
}

// applyDenials drops what is denied before it writes the denials down: the write may wait on the disk.
func (a *Agent) applyDenials(list []string) {
	if a.denials.set(list) {
		for _, w := range a.roster.list() {
			w.denials()
		}
	}
	a.denials.keep()
}
