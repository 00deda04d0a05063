package vault

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// Options are what the configuration's piece does not say.
type Options struct {
	// Life is that of the intermediates that will be asked for; ca.DefaultIntermediateLife by default. Issuers and Check
	// measure by it.
	Life time.Duration
	// Log gets what people should know; nil: nobody.
	Log *slog.Logger
	// Observe is told of each call to Vault; it returns at once.
	Observe func(Call)
}

// Upstream has the issuers of a PKI mount sign. It is safe for concurrent use.
type Upstream struct {
	c     Config
	o     Options
	skew  *skew
	state *state
	login *login
	// named is the issuer_id of the configuration's issuer, once it was looked up.
	named atomic.Pointer[string]
	known rotation.Current[[]ca.UpstreamIssuer]

	mu       sync.Mutex
	included []string        // see Include
	signing  func() []string // see Rely; nil: nobody said
}

var _ ca.Upstream = (*Upstream)(nil)

// New checks the configuration. It opens no file and calls nobody.
func New(c Config, o Options) (*Upstream, error) {
	c, err := c.complete()
	if err != nil {
		return nil, err
	}
	if o.Life == 0 {
		o.Life = ca.DefaultIntermediateLife
	}
	if o.Life < 0 {
		return nil, errors.New("vault: intermediates cannot have a negative life")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	u := &Upstream{c: c, o: o, skew: new(skew), state: newState()}
	u.login = newLogin(c, u.skew, u.state, u.observe)
	return u, nil
}

func (u *Upstream) observe(c Call) {
	if u.o.Observe != nil {
		u.o.Observe(c)
	}
}

// Run keeps the login, and looks at the issuers every so often, until ctx ends. It is to run once.
func (u *Upstream) Run(ctx context.Context) error {
	polled := make(chan struct{})
	go func() {
		defer close(polled)
		u.poll(ctx)
	}()
	err := rotation.Keep(ctx, u.login, rotation.KeepOptions{
		Wake:  u.login.wake,
		Retry: rotation.Retry{Max: 30 * time.Second, Timeout: u.c.Timeout.Duration},
		Observe: func(a rotation.Attempt) {
			if a.Err != nil {
				u.o.Log.Warn("the login at Vault was not renewed", "by", u.c.Auth.kind(), "failures", a.Failures, "next", a.Next.UTC(), "err", a.Err)
			}
		},
	})
	u.login.watched.stop()
	<-polled
	return err
}

// poll publishes the issuers when they change.
func (u *Upstream) poll(ctx context.Context) {
	tick := time.NewTicker(u.c.Poll.Duration)
	defer tick.Stop()
	var told string
	for {
		u.login.follow()
		issuers, err := u.Issuers(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			if text := err.Error(); text != told {
				u.o.Log.Warn("the issuers in Vault could not be read", "err", err)
				told = text
			}
		default:
			if notice := u.Status().Notice; notice != told {
				if notice != "" {
					u.o.Log.Warn("an issuer in Vault has moved", "what", notice)
				}
				told = notice
			}
			if !slices.EqualFunc(issuers, u.known.Value(), sameIssuer) {
				u.known.Set(issuers)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func sameIssuer(a, b ca.UpstreamIssuer) bool {
	fault := func(x ca.UpstreamIssuer) string {
		if x.Fault == nil {
			return ""
		}
		return x.Fault.Error()
	}
	return a.Ref == b.Ref && a.Name == b.Name && a.Named == b.Named && a.NotAfter.Equal(b.NotAfter) && a.Root.Equal(b.Root) && fault(a) == fault(b)
}

// Known returns the issuers as Run last saw them, nil before it has, and a channel that closes when they are others.
func (u *Upstream) Known() ([]ca.UpstreamIssuer, <-chan struct{}) { return u.known.Get() }

// Status tells how we stand with Vault. It calls nobody.
func (u *Upstream) Status() Status {
	st := Status{Address: u.c.Address, Namespace: u.c.Namespace, Mount: u.c.Mount, ClockAhead: u.skew.ahead()}
	if id := u.named.Load(); id != nil {
		st.IssuerID = *id
	}
	u.login.shown(&st)
	u.state.show(&st)
	return st
}

// Close gives the login back, where it is ours to give back, after Run has returned.
func (u *Upstream) Close() error {
	u.login.leave()
	return nil
}
