package files

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/api/refusal"
)

// Identity is what files are made of; agent.Kept is one.
type Identity interface {
	// Materials are what there is now; the channel closes when that is stale.
	Materials() (agent.Materials, <-chan struct{})
}

// Reader is told what arrived; agent.Reader is one.
type Reader interface {
	Took(sequence uint64)
	Failed(why error)
	Show(agent.Delivery)
	Close()
}

var (
	_ Identity = (*agent.Kept)(nil)
	_ Reader   = (*agent.Reader)(nil)
)

// linger is how long the generation before stays, for who has found its directory and not yet read all of it.
const linger = 10 * time.Second

// Keep keeps a directory as the identity is, until ctx ends or the agent stops; what lies there then stays. It closes the
// reader. It returns an error when the configuration is wrong; all else is tried again, and shown.
//
// While there is no SVID the files of trust alone are kept. What an earlier run left stays until the first SVID comes or
// what there was is withdrawn, no longer than its own life.
func Keep(ctx context.Context, id Identity, reader Reader, c Config) error {
	return keep(ctx, id, reader, c, nil)
}

// keep is Keep; report, where it is not nil, is told what comes of each write, until one had an SVID.
func keep(ctx context.Context, id Identity, reader Reader, c Config, report func(error)) error {
	if err := c.Check(); err != nil {
		reader.Close()
		return err
	}
	c = c.withDefaults()
	k := newKeeper(id, reader, c, c.After.teller(c.Dir))
	k.report = report
	k.keep(ctx)
	return nil
}

// keeper is the state of one Keep; only its goroutine touches it.
type keeper struct {
	config Config
	id     Identity
	reader Reader
	hook   teller // nil: nobody is told
	log    *slog.Logger
	report func(error) // nil: nobody waits

	// held is the generation that is there, files what it is of, and sequence that of the bundle in it.
	held     string
	files    map[string]file
	sequence uint64
	// whose is the bearer of the SVID in it.
	whose agent.Bearer
	// old is when generations before the held one are removed; zero: there are none.
	old time.Time
	// left is what an earlier run left; nil: nothing that may be used.
	left   *x509svid.SVID
	began  bool
	writes retry

	// told: those who read the held generation know of it, or need not.
	told    bool
	telling chan error // nil: nobody is being told
	about   string     // the generation of which somebody is being told
	tells   retry
	absent  int       // how often in a row nobody was there to be told
	settled time.Time // nobody is told before

	shown                 agent.Delivery
	writeFault, tellFault string // what is wrong with writing, and with telling
	taken                 uint64 // the sequence that the reader was told of
}

// retry says when something that failed is tried again. The zero retry has nothing to try.
type retry struct {
	pause *backoff.ExponentialBackOff
	at    time.Time
}

func (r *retry) failed() {
	if r.pause == nil {
		r.pause = &backoff.ExponentialBackOff{InitialInterval: time.Second, Multiplier: 2, MaxInterval: time.Minute, RandomizationFactor: 0.3}
		r.pause.Reset()
	}
	r.at = time.Now().Add(r.pause.NextBackOff())
}

func newKeeper(id Identity, reader Reader, c Config, hook teller) *keeper {
	k := &keeper{config: c, id: id, reader: reader, hook: hook, log: c.Log.With("dir", c.Dir)}
	if hook != nil {
		k.shown.After = hook.String()
	}
	return k
}

func (k *keeper) keep(ctx context.Context) {
	defer k.reader.Close()
	defer func() {
		if k.telling != nil {
			<-k.telling //nolint:errcheck // it ends with ctx; what came of it the next run asks anew
		}
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	k.reader.Show(k.shown)
	for {
		m, stale := k.id.Materials()
		if refusal.Of(m.End) == refusal.Stopping {
			return // what is there is as good as before
		}
		k.write(m)
		k.tell(ctx)
		timer := time.NewTimer(k.rest())
		select {
		case <-stale:
			k.writes = retry{} // there is something new to try
		case err := <-k.telling:
			k.toldIt(err)
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// rest is how long nothing has to be done.
func (k *keeper) rest() time.Duration {
	next := time.Now().Add(time.Hour)
	soonest := func(at time.Time) {
		if !at.IsZero() && at.Before(next) {
			next = at
		}
	}
	if !k.told && k.telling == nil {
		soonest(later(k.tells.at, k.settled))
	}
	switch {
	case !k.writes.at.IsZero():
		soonest(k.writes.at) // nothing else is done before
	case k.left != nil:
		soonest(k.left.Certificates[0].NotAfter)
		fallthrough
	default:
		soonest(k.old)
	}
	return max(0, time.Until(next))
}

// write makes the files be what the materials are.
func (k *keeper) write(m agent.Materials) {
	now := time.Now()
	if k.writes.at.After(now) || len(m.Bundle.X509Authorities()) == 0 {
		return
	}
	svid := k.present(m, now)
	want, err := render(k.config.Names, svid, m.Bundle)
	if err == nil && !same(want, k.files) {
		err = k.put(want, svid == nil, now)
	}
	if err == nil && !k.old.IsZero() && (svid == nil || !now.Before(k.old)) {
		err = k.sweep()
	}
	if err != nil {
		k.writes.failed()
		if k.report != nil {
			k.report(err)
		}
		if k.failed(&k.writeFault, err) {
			k.log.Error("files cannot be written; it is tried again", "error", err)
		}
		if svid == nil {
			k.strip()
		}
		return
	}
	k.writes, k.writeFault = retry{}, ""
	if k.report != nil && svid != nil {
		k.report(nil)
		k.report = nil
	}
	k.sequence, _ = m.Bundle.SequenceNumber()
	k.took()
}

// present is the SVID to write; nil: none.
func (k *keeper) present(m agent.Materials, now time.Time) *x509svid.SVID {
	if !k.began {
		k.began = true
		k.left, k.whose = k.inherit(m)
	}
	switch {
	case m.SVID != nil:
		k.left, k.whose = nil, m.Bearer
		return m.SVID
	case k.left != nil && k.whose.Other(m.Refused):
		k.log.Warn("the token file names somebody else than the one whose identity an earlier run left here, and the CA refuses that one: it is removed",
			"spiffe_id", k.left.ID.String())
		k.left = nil
	case m.Withdrawn, k.left != nil && !now.Before(k.left.Certificates[0].NotAfter):
		k.left = nil
	}
	return k.left
}

// inherit reads what an earlier run left, and whose it was. It serves until the CA is there to give something newer: a
// machine that starts while the CA is gone has its identity as long as that lasts.
func (k *keeper) inherit(m agent.Materials) (svid *x509svid.SVID, whose agent.Bearer) {
	d, err := openDirectory(k.config.Dir)
	if err != nil {
		return nil, agent.Bearer{} // writing says so
	}
	defer d.close()
	held, err := d.read(d.current())
	if err != nil {
		return nil, agent.Bearer{}
	}
	svid, err = parseIdentity(held)
	if err != nil || !svid.ID.MemberOf(m.Bundle.TrustDomain()) {
		return nil, agent.Bearer{}
	}
	return svid, d.bearer(d.current())
}

func (k *keeper) put(want map[string]file, withdrawn bool, now time.Time) error {
	generation, was, err := put(k.config, want, k.bearer(withdrawn), now)
	if err != nil {
		return err
	}
	first := k.held == ""
	k.held, k.files = generation, want
	k.old = now.Add(linger)
	if first {
		k.old = now // what a crash left goes at once
	}
	k.told = k.hook == nil || withdrawn || was && k.wasTold()
	k.tells, k.absent, k.tellFault = retry{}, 0, ""
	k.shown.WrittenAt, _ = time.Parse(nameForm, generation)
	if !was {
		k.log.Info("files written", "generation", generation, "files", len(want), "identity", !withdrawn)
	}
	return nil
}

// bearer is whose identity is to be written.
func (k *keeper) bearer(withdrawn bool) agent.Bearer {
	if withdrawn {
		return agent.Bearer{}
	}
	return k.whose
}

// strip removes the files of an identity that is no more from where they are, when they cannot be replaced: that takes no
// space on the disk.
func (k *keeper) strip() {
	k.files = nil
	d, err := openDirectory(k.config.Dir)
	if err == nil {
		err = errors.Join(d.sweep(d.current()), d.strip(d.current(), k.config.Names))
		d.close()
	}
	if err != nil {
		k.log.Error("the files of an identity that is no more cannot be removed; it is tried again", "error", err)
	}
}

func (k *keeper) sweep() error {
	d, err := openDirectory(k.config.Dir)
	if err != nil {
		return err
	}
	defer d.close()
	if err := d.sweep(k.held); err != nil {
		return err
	}
	k.old = time.Time{}
	return nil
}

// took says that the bundle arrived: it is written, and who reads it was told. Who did not run when it was looked for a
// second time has read nothing older either.
func (k *keeper) took() {
	if (k.told || k.absent >= 2) && k.taken != k.sequence {
		k.taken = k.sequence
		k.reader.Took(k.sequence)
	}
	k.show()
}

// failed notes what is wrong now, and reports whether that is news.
func (k *keeper) failed(what *string, err error) bool {
	k.shown.Failures++
	before := *what
	*what = refusal.Clip(err.Error(), 1024)
	k.reader.Failed(err)
	k.show()
	return *what != before
}

func (k *keeper) show() {
	k.shown.Fault = cmp.Or(k.writeFault, k.tellFault)
	k.reader.Show(k.shown)
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func same(a, b map[string]file) bool {
	if len(a) != len(b) {
		return false
	}
	for name, f := range a {
		if g, ok := b[name]; !ok || string(f.data) != string(g.data) {
			return false
		}
	}
	return true
}
