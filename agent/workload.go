package agent

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/types/known/durationpb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/rotation"
)

// workload is one identity on this node: a token file, a socket, and the SVID that goes from the one to the other.
type workload struct {
	Workload
	name  string // in the store
	home  home
	roots *trust
	now   func() instant
	// theirs is the CA's clock, by ours that now tells.
	theirs *clock
	log    *slog.Logger

	wake    chan struct{}
	orders  orders
	retries spread
	mend    spread // renews what the bundle refuses
	secrets rotation.Current[*sds.Secrets]
	changed rotation.Current[struct{}] // stale when Materials may be; set under mu

	shared  *bound // of connections that are handed over; nil where it has a socket of its own
	note    note
	news    rotation.Current[struct{}] // stale when an attempt was made, or the socket opened
	cancel  context.CancelFunc         // ends serving and renewing; set by Agent.start
	running sync.WaitGroup

	mu    sync.Mutex
	state state
}

// home is what a workload has of its agent. Its methods are safe for concurrent use and, but for issue, do not wait.
type home interface {
	// issue asks the CA for one SVID, once the agent can ask. What the CA says of this one request is a verdict; other
	// errors say nothing of the workload.
	issue(ctx context.Context, r *meshcav1.X509SVIDRequest) (*meshcav1.X509SVID, error)
	// denied reports whether an operator denied the ID.
	denied(id spiffeid.ID) bool
	// ended is why an SVID has ended with its cause before its time, or nil.
	ended(h *held) error
	// keep makes h outlive a restart; nil: nothing does.
	keep(w *workload, h *held) error
	// agentID is empty while the agent has none.
	agentID() string
}

// state is what is known of a workload; workload.mu guards it.
type state struct {
	held *held // nil: nothing is served but bundles
	// withheld: held comes from an earlier run, and is not served before it is known what is denied.
	withheld bool
	lastID   spiffeid.ID  // of what is or was held, or was denied
	had      bool         // something was served once
	denied   bool         // what was held, or would be, is denied: by an operator, or by policy
	parting  *sds.Parting // of the streams that had what was last dropped
	gone     error        // why there is nobody any more to serve: the end of the streams
	expired  bool
	// untrusted is why the bundle that is served with held refuses it; nil: it does not.
	untrusted *refusal.Error
	stopped   bool
	rotations uint64

	refused   error // of the last attempt, until the next success; what took what was held, until the next one that lasts
	refusedAt time.Time
	next      time.Time
	failing   bool
	// trying: an attempt is under way. again: it was to begin when it did already, so another one follows if it fails.
	trying, again bool
	// listening is why the socket is not open; nil when it is. tried: it is known by now.
	listening error
	tried     bool
	opened    time.Time // when it was opened last
	// bearer is whose the token was when it was read last; former, whose it was in an earlier run, while nothing is held.
	bearer, former Bearer
	// turnedAway is whose the token was when the CA last refused it for good, for reasons that may not meet everybody.
	turnedAway Bearer
	nacks      uint64
	// limits counts the calls and connections of proxies that were refused or ended for a limit, and limit is why the last one was.
	limits  uint64
	limit   error
	limitAt time.Time
}

var _ rotation.Subject = (*workload)(nil)

func newWorkload(c Workload, h home, roots *trust, theirs *clock, log *slog.Logger) *workload {
	log = log.With("socket", c.Socket)
	if c.Pod != (Pod{}) {
		log = log.With("pod", c.Pod.String())
	}
	w := &workload{
		Workload: c, name: nameOf(c), home: h, roots: roots, now: theirs.now, theirs: theirs, log: log, wake: make(chan struct{}, 1),
		note: note{pace: rate.NewLimiter(rate.Every(notesEvery), notesBurst)},
	}
	w.orders.wake = w.renewNow
	if c.PodUID != "" {
		w.shared, w.state.tried = newBound(nil, w, door{}), true
		return w
	}
	w.state.listening = refusal.New(refusal.SocketPath, "the socket is not open yet")
	return w
}

// Renew asks for a new SVID: a new key, the token as it is now.
func (w *workload) Renew(ctx context.Context) (rotation.Term, error) {
	w.mu.Lock()
	w.state.trying, w.state.again = true, false
	w.mu.Unlock()
	request, whose, err := w.proof()
	if err != nil {
		return rotation.Term{}, err
	}
	w.mu.Lock()
	w.state.bearer = whose
	w.mu.Unlock()
	key, csr, err := newCSR()
	if err != nil {
		return rotation.Term{}, err
	}
	request.Csr = csr
	if w.TTL > 0 {
		request.Ttl = durationpb.New(w.TTL)
	}
	answer, err := w.home.issue(ctx, request)
	if err != nil {
		w.judge(whose, err)
		return rotation.Term{}, err
	}
	h, err := receive(answer, key, w.roots, w.now())
	if err != nil {
		return rotation.Term{}, err
	}
	if strings.HasPrefix(h.svid.ID.Path(), "/meshca/") {
		return rotation.Term{}, fmt.Errorf("the CA answered with %s, which is no workload's", h.svid.ID)
	}
	h.bearer = whose
	return h.term, w.install(h)
}

// proof is a request with what proves whose it is: the token as it is now, or the pod that the agent vouches for.
func (w *workload) proof() (*meshcav1.X509SVIDRequest, Bearer, error) {
	if w.PodUID != "" {
		return &meshcav1.X509SVIDRequest{Pod: &meshcav1.PodReference{Uid: w.PodUID}}, Bearer{PodUID: w.PodUID}, nil
	}
	token, err := readToken(w.TokenFile)
	if err != nil {
		return nil, Bearer{}, err
	}
	return &meshcav1.X509SVIDRequest{Token: token.secret}, token.bearer(), nil
}

// install keeps an SVID and serves it.
func (w *workload) install(h *held) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	// Asked under the lock: a denial that comes now finds either nothing held or this.
	if w.state.stopped {
		return refusal.New(refusal.Stopping, "the workload is served no longer")
	}
	w.state.lastID = h.svid.ID
	if w.home.denied(h.svid.ID) {
		err := refusal.New(refusal.IdentityDenied, "an operator denied %s", h.svid.ID)
		w.state.denied, w.state.refused, w.state.refusedAt = true, err, time.Now()
		return err
	}
	if why := w.home.ended(h); why != nil { // while its answer was on the way
		return why
	}
	if err := w.home.keep(w, h); err != nil {
		w.log.Error("an SVID cannot be kept; it is served, but a restart has to ask for a new one", "error", err)
	}
	if w.state.had {
		w.state.rotations++
	}
	w.state.held, w.state.had, w.state.withheld, w.state.former = h, true, false, Bearer{}
	w.state.denied, w.state.gone, w.state.expired = false, nil, false
	w.publish()
	return nil
}

// restore takes up what an earlier run kept. It is not served before denials releases it.
func (w *workload) restore(h *held) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state.held, w.state.withheld, w.state.lastID, w.state.bearer = h, true, h.svid.ID, h.bearer
}

// formerly notes whose the SVID was that an earlier run held. It is not served; the bundle is, once the bearer of now is
// refused: see handedOver.
func (w *workload) formerly(whose Bearer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state.former = whose
}

// Due spreads by the node, the identity and the place where it is served.
func (w *workload) Due(t rotation.Term) time.Time { return rotation.Phased(w.phase())(t) }

func (w *workload) phase() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.place()
}

// place is the phase; w.mu is held.
func (w *workload) place() string {
	id := ""
	if w.state.held != nil {
		id = w.state.held.svid.ID.String()
	}
	return w.home.agentID() + "|" + id + "|" + w.Socket
}

// refresh serves the bundle of now.
func (w *workload) refresh() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.publish()
}

// heardClock holds what is held against the CA's clock and the node's, one of which was set.
func (w *workload) heardClock() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state.held != nil && !w.state.withheld && !w.state.stopped {
		w.verify(w.roots.current.Value())
	}
}

// served is what SDS has for the workload's proxies. It is asked at each send: a machine that was suspended may wake up
// long after the end of what is held, and before any timer says so.
func (w *workload) served() (*sds.Secrets, <-chan struct{}) {
	w.mu.Lock()
	if h := w.state.held; h != nil && h.ended(w.now()) {
		w.expire()
	}
	w.mu.Unlock()
	return w.secrets.Get()
}

// publish gives SDS what is held now; w.mu is held. Before the first SVID streams wait; after the last one is gone they
// are told.
func (w *workload) publish() {
	w.changed.Set(struct{}{})
	switch {
	case w.state.stopped:
		return
	case w.state.gone != nil:
		w.secrets.Set(sds.End(w.state.gone))
		return
	case (w.state.held == nil || w.state.withheld) && !w.state.had && !w.state.denied:
		return
	}
	b := w.roots.current.Value()
	w.verify(b)
	c := sds.SecretsConfig{Parting: w.state.parting}
	if w.state.held != nil {
		c.SVIDs = []*x509svid.SVID{w.state.held.svid}
	}
	if len(b.X509Authorities()) > 0 {
		c.Bundles = []*spiffebundle.Bundle{b}
	}
	secrets, err := sds.NewSecrets(c)
	if err != nil {
		w.log.Error("what is held cannot be served", "error", err)
		return
	}
	w.secrets.Set(secrets)
}

// stop ends the streams and the timers; what is held is kept for the next run.
func (w *workload) stop() {
	w.orders.stop()
	w.retries.stop()
	w.mend.stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.state.stopped {
		w.state.stopped = true
		w.changed.Set(struct{}{})
		w.secrets.Set(sds.End(refusal.New(refusal.Stopping, "the agent is stopping").After(time.Second)))
	}
}

// finish ends the streams and the timers for good, and forgets what is held.
func (w *workload) finish(why error) {
	w.orders.stop()
	w.retries.stop()
	w.mend.stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state.gone, w.state.stopped = why, true
	w.withdraw()
	w.secrets.Set(sds.End(why))
}

// finished reports whether the workload is gone for good, while the agent goes on.
func (w *workload) finished() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state.stopped && w.state.gone != nil
}

func (w *workload) renewNow() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// retrySoon ends the backoff of a workload whose renewals fail, at its place among all that come back with it: after an
// outage that is the whole fleet, and who holds an SVID has time. At once, for who has nothing or another's.
func (w *workload) retrySoon() {
	phase := w.phase()
	w.mu.Lock()
	failing, h, now := w.state.failing, w.state.held, w.state.bearer
	w.mu.Unlock()
	if !failing {
		return
	}
	if h == nil || h.bearer.Other(now) {
		w.retryNow()
		return
	}
	within := min(h.term.Life/100, h.left(w.now())/4)
	w.retries.after(placeIn(within, phase), w.retryNow)
}

// retryNow ends the backoff of a workload whose renewals fail. An attempt that is under way may yet succeed.
func (w *workload) retryNow() {
	w.mu.Lock()
	failing, trying := w.state.failing, w.state.trying
	w.state.again = w.state.again || trying
	w.mu.Unlock()
	if failing && !trying {
		w.renewNow()
	}
}

// holds returns what is held, or nil.
func (w *workload) holds() *held {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state.held
}

// observed notes an attempt of Keep.
func (w *workload) observed(a rotation.Attempt) {
	w.mu.Lock()
	before := w.state.refused
	again := w.state.again && a.Err != nil
	w.state.failing, w.state.next = a.Err != nil, a.Next
	w.state.trying, w.state.again = false, false
	if a.Err == nil || !w.state.condemned() || isVerdict(a.Err) && !refusal.Of(a.Err).Passing() {
		w.state.refused, w.state.refusedAt = a.Err, time.Now()
	}
	h := w.state.held
	w.mu.Unlock()
	w.news.Set(struct{}{})
	if again {
		w.renewNow()
	}
	switch {
	case a.Err != nil && refusal.Of(before) != refusal.Of(a.Err):
		w.log.Warn("no new SVID", "error", a.Err, "next", a.Next)
	case a.Err == nil && h != nil:
		w.log.Info("new SVID", "spiffe_id", h.svid.ID.String(), "serial", h.serial(), "cause", string(a.Cause), "next", a.Next)
	}
}
