package kubernetes

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// api is the API server, with the bounds that calls to it keep. client-go's own rate limit is off: what bounds the calls
// is how many are under way.
type api struct {
	*connection

	slots     *semaphore.Weighted
	strangers *semaphore.Weighted // those of the slots that strangers' calls may take
	wait      time.Duration       // for a slot
	timeout   time.Duration       // of a call
	observe   func(Call)

	skew skew
	last lastError // of the last call
}

// lane is on whose behalf a call is made.
type lane int

const (
	laneKnown     lane = iota // an agent that attested itself before, or the CA itself
	laneStrangers             // whoever wants to be taken for an agent, or for a workload that calls itself: anybody can ask for that
)

// laneOf goes by what a token is to prove: whoever brings a workload's token has proven itself an agent before, but for
// AttestDirect's.
func laneOf(audience string) lane {
	if audience == attestor.AgentAudience {
		return laneStrangers
	}
	return laneKnown
}

func newAPI(s settings, now func() time.Time, log *slog.Logger, observe func(Call)) (*api, error) {
	a := &api{
		slots: semaphore.NewWeighted(int64(s.maxCalls)), strangers: semaphore.NewWeighted(int64(max(1, s.maxCalls/4))),
		wait: s.callTimeout, timeout: s.callTimeout, observe: observe,
	}
	var err error
	a.connection, err = newConnection(s.kubeconfig, func(next http.RoundTripper) http.RoundTripper { return dated{next, &a.skew, now} }, now, log)
	if err != nil {
		return nil, err
	}
	return a, nil
}

// call makes one call within the bounds: it waits for a slot, and gives the call its time. What fails comes back as a
// refusal, except that the caller's own end of patience comes back as it is, and "not found" is an answer.
func (a *api) call(ctx context.Context, l lane, what string, do func(context.Context, *clients) error) error {
	leave, err := a.enter(ctx, l)
	if err != nil {
		return err
	}
	defer leave()
	timed, cancel := context.WithTimeout(klog.NewContext(ctx, klog.New(nil)), a.timeout) // the error tells all that client-go would log
	defer cancel()
	start := a.now()
	err = do(timed, a.clients())
	took := a.now().Sub(start)
	if err == nil || isNotFound(err) {
		a.last.set(nil)
		a.observe(Call{What: what, Took: took})
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	a.doubt()
	refused := fault(what, err)
	a.last.set(refused)
	a.observe(Call{What: what, Took: took, Outcome: refused.Reason})
	return refused
}

// enter waits for a slot. A stranger's call waits for one of the strangers' first, so that never more of them than these
// stand before the others: a flood of strangers leaves the rest to the agents that are known.
func (a *api) enter(ctx context.Context, l lane) (leave func(), err error) {
	waiting, stop := context.WithTimeout(ctx, a.wait)
	defer stop()
	leave = func() { a.slots.Release(1) }
	if l == laneStrangers {
		if a.strangers.Acquire(waiting, 1) != nil {
			return nil, a.crowded(ctx, "too many callers that proved nothing before attest themselves at once")
		}
		leave = func() { a.slots.Release(1); a.strangers.Release(1) }
	}
	if a.slots.Acquire(waiting, 1) != nil {
		if l == laneStrangers {
			a.strangers.Release(1)
		}
		return nil, a.crowded(ctx, "too many calls to the cluster's API server are under way")
	}
	return leave, nil
}

// crowded says why no slot came: too much work, or an API server that holds the slots without an answer.
func (a *api) crowded(ctx context.Context, why string) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := a.last.get(); err != nil {
		return err
	}
	return refusal.New(refusal.Overloaded, "%s", why).After(time.Second)
}

// fault names what went wrong with a call: we may not make it, or it did not get through.
func fault(what string, err error) *refusal.Error {
	if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
		return refusal.New(refusal.KubernetesForbidden, "the API server refuses our call (%s): %w", what, err)
	}
	e := refusal.New(refusal.KubernetesUnavailable, "calling the API server (%s): %w", what, err)
	if s, ok := apierrors.SuggestsClientDelay(err); ok && s > 0 {
		return e.After(time.Duration(s) * time.Second)
	}
	return e
}

// isNotFound tells that the API server itself says that there is no such object. A bare 404 is no such word: any server
// gives it, for a path that it does not know.
func isNotFound(err error) bool {
	return apierrors.IsNotFound(err) && !apierrors.HasStatusCause(err, metav1.CauseTypeUnexpectedServerResponse)
}

// raw gets a document that is no API object.
func (a *api) raw(ctx context.Context, what, path string) (doc []byte, err error) {
	err = a.call(ctx, laneKnown, what, func(ctx context.Context, c *clients) error {
		body, err := c.core.Get().AbsPath(path).SetHeader("Accept", "application/jwk-set+json, application/json").MaxRetries(0).Stream(ctx)
		if err != nil {
			return err
		}
		defer body.Close()
		doc, err = io.ReadAll(io.LimitReader(body, maxKeySet+1))
		return err
	})
	return doc, err
}

// lastError is how something went the last time; nil is well.
type lastError struct {
	mu  sync.Mutex
	err error
}

func (l *lastError) get() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// set notes err, and tells whether that is a turn from well to ill or back.
func (l *lastError) set(err error) (turned bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	turned = (l.err == nil) != (err == nil)
	l.err = err
	return turned
}

// skew is the API server's clock against ours.
type skew struct {
	mu       sync.Mutex
	ahead    time.Duration
	measured time.Time
}

func (s *skew) get() (ahead time.Duration, measured time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ahead, s.measured
}

// note takes the Date of an answer to a request that left at sent and was answered at came. Date has whole seconds, and
// the answer was made somewhere between the two: what lies within that much of zero is no skew.
func (s *skew) note(date, sent, came time.Time) {
	low, high := date.Sub(came), date.Add(time.Second).Sub(sent) // bounds of the true difference
	ahead := (low + high) / 2
	if low <= 0 && high >= 0 {
		ahead = 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead, s.measured = ahead, came
}

// dated measures the skew at every answer.
type dated struct {
	next http.RoundTripper
	skew *skew
	now  func() time.Time
}

func (d dated) RoundTrip(r *http.Request) (*http.Response, error) {
	sent := d.now()
	resp, err := d.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		d.skew.note(date, sent.Round(0), d.now().Round(0)) // wall clocks, not Go's monotonic one
	}
	return resp, nil
}

// WrappedRoundTripper lets client-go reach the transport below.
func (d dated) WrappedRoundTripper() http.RoundTripper { return d.next }
