package agent

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"

	"github.com/meshca/meshca/api/refusal"
)

// Source tells the agent of workloads that come and go, as a node's pods do.
type Source interface {
	// Known are the workloads that an earlier run of the agent had and that still stand. It is asked once, before Run:
	// what is kept of them is served at once, and what is kept of others is removed.
	Known() ([]Workload, error)
	// Run adds and removes workloads until ctx ends, with Agent.Add, Agent.Find and Kept.Remove. When it returns an error
	// the agent stops: it could not do this part of its work at all.
	Run(ctx context.Context, a *Agent) error
}

// Reporter is a Source that has a standing of its own, for readiness, status and checks.
type Reporter interface {
	// Standing is how the source is now. It does not wait.
	Standing() Standing
}

// Standing is how a source is.
type Standing struct {
	// Subject names the source to operators, and Well says in a sentence that nothing is wrong.
	Subject, Well string
	// NotReady is why workloads cannot come by this source now; nil: they can.
	NotReady error
	// Faults are further things that want looking at, the agent being ready nevertheless.
	Faults []error
}

// Entrance is a Source by which the peers of workloads come that have no socket of their own: see Kept.Serve.
type Entrance interface {
	// OpenSince is since when they can come in, and false while they cannot. It does not wait.
	OpenSince() (since time.Time, open bool)
}

// openSince is the same for the peers of any workload.
func (a *Agent) openSince(socket string) (since time.Time, open bool) {
	w := a.roster.at(socket)
	switch {
	case w == nil:
		return time.Time{}, true // it is about to be forgotten
	case w.shared == nil:
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.state.opened, w.state.listening == nil
	}
	for _, s := range a.config.Sources {
		e, ok := s.(Entrance)
		if !ok {
			continue
		}
		at, open := e.OpenSince()
		if !open {
			return time.Time{}, false
		}
		if at.After(since) {
			since = at
		}
	}
	return since, true
}

// standings asks the sources that have one.
func (a *Agent) standings() (all []Standing) {
	for _, s := range a.config.Sources {
		if r, ok := s.(Reporter); ok {
			all = append(all, r.Standing())
		}
	}
	return all
}

// NodeName is the node's name as the agent's own token has it, unverified; empty where it has none.
func (a *Agent) NodeName() string {
	t, err := readToken(a.config.TokenFile)
	if err != nil {
		return ""
	}
	c, _ := t.claims()
	return c.Kubernetes.Node.Name
}

// Kept is one workload while the agent keeps it. Its methods are safe for concurrent use.
type Kept struct {
	agent *Agent
	w     *workload
}

// Materials are what a workload has now. They are shared and must not be changed.
type Materials struct {
	// SVID is nil while there is none to serve.
	SVID *x509svid.SVID
	// Bearer is whose the token was that the SVID was given for, and Refused whose it was when the CA last refused it for
	// good: what is left of an SVID of somebody else's has to go then. Nobody: there is none, or the token does not say.
	Bearer, Refused Bearer
	// Withdrawn: SVID is nil because what there was has ended, was denied, or belonged to somebody who is gone. Where
	// neither is set the first one is still awaited.
	Withdrawn bool
	// Bundle of the trust domain; without authorities while none is known.
	Bundle *spiffebundle.Bundle
	// End is why nothing is served any more: the workload is gone, or the agent stops. Nil: it goes on.
	End error
}

// Add keeps and serves one more workload, until it is removed or the agent stops. Call it from a Source's Run alone. What
// an earlier run kept for the very same workload is taken up.
func (a *Agent) Add(c Workload) (*Kept, error) {
	c = c.withDefaults()
	if err := c.check("the workload"); err != nil {
		return nil, err
	}
	w := newWorkload(c, a, a.trust, &a.clock, a.log)
	if err := a.roster.add(w); err != nil {
		return nil, err
	}
	a.restoreWorkload(w)
	w.refresh()
	a.start(w)
	return &Kept{a, w}, nil
}

// Find returns the workload at a socket, or nil when there is none.
func (a *Agent) Find(socket string) *Kept {
	w := a.roster.at(socket)
	if w == nil {
		return nil
	}
	return &Kept{a, w}
}

// stage is what workloads need of a running agent. Run sets it before anything is started on it.
type stage struct {
	ctx       context.Context //nolint:containedctx // that of Run: workloads that come later end with it, too
	transport *grpc.Server
}

// start begins to serve and to renew a workload.
func (a *Agent) start(w *workload) {
	ctx, cancel := context.WithCancel(a.stage.ctx)
	w.cancel = cancel
	if w.shared == nil {
		w.running.Go(func() { w.serve(ctx, a.stage.transport, a.door(w)) })
	}
	w.running.Go(func() { a.keepWorkload(ctx, w) })
}

// Remove ends the workload: its streams, its socket, its connections, and what is kept of its key. It returns when all of
// that is gone.
func (k *Kept) Remove() error {
	k.w.finish(refusal.New(refusal.PodGone, "the workload was removed from this node"))
	k.w.cancel()
	k.w.running.Wait()
	if k.w.shared != nil {
		k.w.shared.cut(parting)
	}
	k.agent.roster.remove(k.w)
	k.agent.proxies.forget(k.w.Socket)
	return k.agent.store.remove(k.w.name) // also what a renewal kept that was in hand
}

// Serve serves a connection of the workload's, one that has no socket of its own. It belongs to the agent then, also where an
// error says that it was closed: the workload is gone, or has too many.
func (k *Kept) Serve(conn net.Conn) error {
	d := k.agent.door(k.w)
	leave, ok := d.enter()
	if !ok {
		_ = conn.Close()
		return refusal.New(refusal.PeerLimit, "the pod has %d connections open, as many as it may (sds.connectionsPerPod)", d.connections)
	}
	bound, err := k.w.shared.take(conn, leave)
	if err != nil {
		leave()
		_ = conn.Close()
		return err
	}
	return k.agent.handed.put(bound)
}

// Open is how many connections are open that were handed over by Serve.
func (k *Kept) Open() int { return k.w.shared.count() }

// Ready waits for the first SVID, with the socket open. It returns nil then; the CA's refusal, when asking again would
// not help (refusal.Reason.Passing); and when ctx ends before, why there is none yet.
func (k *Kept) Ready(ctx context.Context) error {
	for {
		_, news := k.w.news.Get()
		ready, why := k.w.readiness()
		if ready {
			return nil
		}
		if e, ok := refusal.From(why); ok && isVerdict(why) && !e.Reason.Passing() {
			return why
		}
		select {
		case <-news:
		case <-ctx.Done():
			if err, _ := k.agent.self.lastError(); err != nil && refusal.Of(why) == refusal.SVIDPending {
				why = refusal.New(refusal.SVIDPending, "the agent has no SVID of its own to ask with: %w", err)
			}
			return errors.Join(why, ctx.Err())
		}
	}
}

// Listening waits until the socket is open. When ctx ends before, it returns why it is not.
func (k *Kept) Listening(ctx context.Context) error {
	for {
		_, news := k.w.news.Get()
		k.w.mu.Lock()
		why := k.w.state.listening
		k.w.mu.Unlock()
		if why == nil {
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return errors.Join(why, ctx.Err())
		}
	}
}

// readiness is whether an SVID is served, and else why not.
func (w *workload) readiness() (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	st := &w.state
	switch {
	case st.refused != nil && (st.held == nil || st.condemned()):
		return false, st.refused
	case st.held == nil || st.withheld:
		return false, refusal.New(refusal.SVIDPending, "the CA has not answered yet")
	case st.listening != nil:
		return false, st.listening
	}
	return true, nil
}

// Materials are what the workload has now; the channel closes when that is stale.
func (k *Kept) Materials() (Materials, <-chan struct{}) {
	_, _ = k.w.served()           // what has ended is withdrawn
	_, stale := k.w.changed.Get() // first: what changes meanwhile closes it
	k.w.mu.Lock()
	defer k.w.mu.Unlock()
	st := &k.w.state
	m := Materials{Bundle: k.w.roots.current.Value(), End: st.gone, Refused: st.turnedAway}
	if st.held != nil && !st.withheld {
		m.SVID, m.Bearer = st.held.svid, st.held.bearer
	}
	m.Withdrawn = m.SVID == nil && (st.had || st.denied || st.expired || st.gone != nil)
	if st.stopped && m.End == nil {
		m.End = refusal.New(refusal.Stopping, "the agent is stopping").After(time.Second)
	}
	return m, stale
}

// NewReader is Agent.NewReader.
func (k *Kept) NewReader(name string) *Reader { return k.agent.NewReader(name) }

// TokenChanged makes the agent look at the workload's token file now, rather than in a few seconds.
func (k *Kept) TokenChanged() {
	k.w.lookAtToken(nil)
	k.w.retryNow()
}

// Workload is what was added.
func (k *Kept) Workload() Workload { return k.w.Workload }
