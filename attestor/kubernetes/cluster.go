package kubernetes

import (
	"context"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/rotation"
)

// Deps is what a Cluster is given beside its configuration. The zero Deps will do.
type Deps struct {
	// Log gets what changes: keys read, watches lost and found. Nil: nobody does.
	Log *slog.Logger
	// Now is the wall clock, with Go's monotonic reading. Nil: time.Now.
	Now func() time.Time
	// Observe is told of each call to the API server and to the source of keys; for metrics. It must not block.
	Observe func(Call)
}

// Call is one call to the API server or to the source of keys.
type Call struct {
	// What is "tokenreviews", "pods", "nodes", "serviceaccounts", "namespaces", "rights", "discovery", "jwks", or
	// "keys" for a whole reading of keys.
	What string
	Took time.Duration
	// Outcome is empty when it was answered (also: "no such pod"), else the reason that the caller was given.
	Outcome refusal.Reason
}

// Cluster attests the workloads of one cluster. All methods are safe for concurrent use.
type Cluster struct {
	settings
	log *slog.Logger
	now func() time.Time

	api     *api      // nil where the API server is never called
	keys    *keyring  // mode jwks
	watched []*mirror // liveness api, by kind: by them it is known at once what ends
	mirrors []*mirror // those of them that attestation goes by: all in mode jwks, none in mode tokenReview
	wells   wells     // what Ended found well although a watch says otherwise
	lists   lists     // of pods that agents name by their UIDs
	alive   *memo     // mode tokenReview
	wants   *rotation.Current[attestor.Wants]
	rights  lastError // of the last look at what the CA's account may do
}

// New makes a Cluster. It reads the files that the configuration names and calls nobody; Run does.
func New(cfg Config, deps Deps) (*Cluster, error) {
	s, err := cfg.parse()
	if err != nil {
		return nil, err
	}
	c := &Cluster{settings: s, log: deps.Log, now: deps.Now, wants: rotation.NewCurrent(attestor.Wants{})}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.now == nil {
		c.now = time.Now
	}
	observe := deps.Observe
	if observe == nil {
		observe = func(Call) {}
	}
	c.log = c.log.With("cluster", s.name)
	if s.needsAPI() {
		if c.api, err = newAPI(s, c.now, c.log, observe); err != nil {
			return nil, err
		}
	}
	c.rights.set(refusal.New(refusal.KubernetesUnavailable, "the API server was not asked yet"))
	if s.live {
		wants := c.wants
		if s.mode == TokenReview {
			wants = rotation.NewCurrent(attestor.Wants{}) // facts are read live
		}
		for k := range kinds {
			c.watched = append(c.watched, newMirror(k, wants, c.api, s, c.now, c.log))
		}
	}
	if s.mode == TokenReview {
		c.alive = newMemo(aliveFor, c.now)
		return c, nil
	}
	c.mirrors = c.watched
	source, err := newKeySource(s, c.api)
	if err != nil {
		return nil, err
	}
	c.keys = newKeyring(source, s, c.now, c.log, observe)
	return c, nil
}

// Want says which labels and annotations are to be gathered with a workload's identity from now on. What is wanted newly
// may cost a read of the pod until the watches have it, and then about a kilobyte of memory a pod.
func (c *Cluster) Want(w attestor.Wants) {
	if c.wants.Value() != w {
		c.wants.Set(w)
	}
}

// Name is the cluster's name.
func (c *Cluster) Name() string { return c.name }

// Run keeps keys and watches current until ctx ends, and then returns its error. What fails is tried again, so nothing
// but ctx ends it. Without Run, a Cluster attests by live reads alone.
func (c *Cluster) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	if c.keys != nil {
		g.Go(func() error { return c.keys.run(ctx) })
	}
	for _, m := range c.watched {
		g.Go(func() error { return m.run(ctx) })
	}
	if c.api != nil && c.live {
		g.Go(func() error { return c.watchRights(ctx) })
	}
	g.Go(func() error { <-ctx.Done(); return ctx.Err() })
	return g.Wait()
}

// Ready says why the cluster's workloads cannot all be attested now, or nil.
func (c *Cluster) Ready() error {
	if c.keys != nil {
		if err := c.keys.ready(); err != nil {
			return err
		}
	}
	for _, m := range c.mirrors {
		if err := m.ready(); err != nil {
			return err
		}
	}
	if c.api != nil && c.live {
		if err := c.rights.get(); err != nil {
			return err
		}
		return c.api.last.get()
	}
	return nil
}

// Status is a Cluster as an operator wants to see it.
type Status struct {
	Name     string
	Mode     Mode
	Liveness Liveness
	// Issuer is what tokens must carry as `iss`; empty where the API server alone knows.
	Issuer string
	// Healthy is Ready() == nil; LastError is why not.
	Healthy   bool
	LastError string
	// WatchFault is why it is not known at once what of the cluster ends; empty where it is, and where liveness is none.
	WatchFault string
	// KeyIDs are those of the keys that verify tokens (mode jwks), sorted; KeysRead is when they were last read.
	KeyIDs   []string
	KeysRead time.Time
	// ClockSkew is the API server's clock minus ours, to about a second, as its answer at SkewMeasured showed; a zero
	// SkewMeasured: never measured.
	ClockSkew    time.Duration
	SkewMeasured time.Time
}

// Watched tells whether it is known at once what of the cluster ends.
func (s Status) Watched() bool { return s.Liveness == LivenessAPI && s.WatchFault == "" }

// Status tells how the cluster is.
func (c *Cluster) Status() Status {
	s := Status{Name: c.name, Mode: c.mode, Liveness: LivenessNone, Issuer: c.issuer}
	if c.live {
		s.Liveness = LivenessAPI
	}
	if err := c.Ready(); err != nil {
		s.LastError = err.Error()
	}
	s.Healthy = s.LastError == ""
	for _, m := range c.watched {
		if err := m.ready(); err != nil {
			s.WatchFault = err.Error()
			break
		}
	}
	if c.keys != nil {
		set := c.keys.current()
		s.KeyIDs, s.KeysRead = set.ids(), set.readAt
		if s.Issuer == "" {
			s.Issuer = set.issuer
		}
	}
	if c.api != nil {
		s.ClockSkew, s.SkewMeasured = c.api.skew.get()
	}
	return s
}
