package kubesigner

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/ca"
)

const (
	// attemptTimeout bounds one try. It does not end with the CA: what is in hand then is finished.
	attemptTimeout = 30 * time.Second
	// A try that failed is made again after firstRetry at first and lastRetry at last, both jittered: somebody waits.
	firstRetry, lastRetry = 500 * time.Millisecond, 30 * time.Second
	// rejectedRetry follows an answer that the API server found wrong: each further try signs a certificate.
	rejectedRetry = 10 * time.Minute

	// claimAnnotation is on a request which replica answers it.
	claimAnnotation = "meshca.io/answered-by"
	// deliverable is how long after its issue a certificate is handed out. NotBefore lies a minute before the issue, and the API
	// wants that of a PodCertificateRequest within podCertificateNear of its own now, so the skew of clocks has room too.
	deliverable = 90 * time.Second

	// claimPatience is how long another replica's claim is respected from when it was first seen here.
	claimPatience = 30 * time.Second
)

// made is a certificate that was signed for a request.
type made struct {
	svid ca.SVID
	at   time.Time
}

// Errors of a try that are no refusal.
var (
	errChanged  = errors.New("the request changed while it was answered")
	errClaimed  = errors.New("another replica answers the request")
	errRejected = errors.New("the API server does not take the answer")
)

// work takes requests from the queue until it is shut down.
func (d *door) work(ctx context.Context) {
	for {
		key, shutdown := d.queue.Get()
		if shutdown {
			return
		}
		if ctx.Err() == nil {
			d.tryAndTell(ctx, key)
		}
		d.queue.Done(key)
	}
}

func (d *door) tryAndTell(ctx context.Context, key objectKey) {
	it := d.up(key)
	if it == nil {
		return
	}
	err := d.try(ctx, key, it)
	if err == nil {
		d.done(key)
		return
	}
	if !d.limited(key, it, refusal.Of(err) == refusal.PodLimit) {
		return
	}
	it.failures++
	delay := backoff(it.failures)
	switch refused, ok := refusal.From(err); {
	case errors.Is(err, errChanged):
		delay = time.Duration(it.failures) * 10 * time.Millisecond
	case errors.Is(err, errClaimed):
		delay = max(time.Until(it.since.Add(claimPatience)), 0) + rand.N(time.Second)
	case errors.Is(err, errRejected):
		delay = rejectedRetry
	case ok && refused.RetryAfter > delay:
		delay = refused.RetryAfter
	}
	if ctx.Err() == nil && !errors.Is(err, errClaimed) && !errors.Is(err, errChanged) {
		d.o.Log.Warn("a request is not answered yet; it is tried again", "api", d.plural, "request", key.String(), "failures", it.failures,
			"in", delay.Round(time.Millisecond), "err", err)
	}
	d.queue.AddAfter(key, delay)
}

// backoff doubles with each failure, and is jittered by half.
func backoff(failures int) time.Duration {
	d := min(firstRetry<<min(failures-1, 10), lastRetry)
	return d/2 + rand.N(d)
}

// try answers one request, as it is now. nil: there is nothing more to do for it.
func (d *door) try(parent context.Context, key objectKey, it *item) (err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(parent), attemptTimeout)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			d.o.Log.Error("answering a request panicked; the door goes on", "api", d.plural, "request", key.String(), "panic", refusal.Panicked(p), "stack", string(debug.Stack()))
			err = refusal.New(refusal.Internal, "an internal fault").After(lastRetry)
		}
	}()
	r := d.resource.Load()
	if r == nil {
		return fmt.Errorf("%s cannot be answered now", d.plural)
	}
	// 1. The request, as it is now. It may have been answered, or be gone.
	obj := d.empty()
	if err := d.api.get(ctx, *r, key, obj); err != nil {
		return gone(err)
	}
	if !d.open(obj) {
		return nil
	}
	if it.uid != string(obj.GetUID()) { // another one of that name
		it.uid, it.failures, it.made, it.claimedBy = string(obj.GetUID()), 0, nil, ""
	}
	// 2. It is ours alone to answer.
	if obj, err = d.claim(ctx, *r, key, it, obj); err != nil {
		return gone(err)
	}
	// 3. The decision: the procedure's that all doors end in, or what an earlier try got from it and could not deliver, if
	// that still stands.
	if err := d.keep(ctx, obj, it); err != nil {
		return err
	}
	if it.made == nil {
		svid, err := d.decide(ctx, obj)
		if no, final := finally(err); final {
			return gone(d.deliver(ctx, *r, key, obj, d.deny(obj, no), "denied"))
		} else if err != nil {
			return err
		}
		it.made = &made{svid: svid, at: time.Now()}
	}
	// 4. The answer. What could not be delivered is kept for the next try, but for what will not be taken.
	err = d.deliver(ctx, *r, key, obj, d.grant(obj, it.made.svid), "issued")
	if errors.Is(err, errRejected) {
		it.made = nil
	}
	return gone(err)
}

// keep drops what an earlier try could not deliver, if it is too old, or would not be granted any more: somebody may have
// denied the identity since, and its pod or its policy may have changed. An error says that nobody knows now.
func (d *door) keep(ctx context.Context, obj object, it *item) error {
	if it.made == nil {
		return nil
	}
	if time.Since(it.made.at) > deliverable || !time.Now().Before(it.made.svid.NotAfter) {
		it.made = nil
		return nil
	}
	ask, err := d.ask(obj)
	if err == nil {
		err = d.o.Registration.Stands(ctx, d.by, ask, it.made.svid)
	}
	switch no, final := finally(err); {
	case final:
		d.o.Log.Info("what was signed for a request and could not be delivered is not granted any more; it is decided anew", "api", d.plural,
			"request", it.uid, "serial", serial.String(it.made.svid.Chain[0].SerialNumber), "reason", string(no.Reason))
		it.made = nil
		return nil
	default:
		return err
	}
}

// gone takes a request that is there no more for an answered one.
func gone(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// claim writes this replica's name on the request, if nobody changed it since it was read. Another's name there is
// respected for a while.
func (d *door) claim(ctx context.Context, r resource, key objectKey, it *item, obj object) (object, error) {
	switch by := obj.GetAnnotations()[claimAnnotation]; {
	case by == d.o.Replica:
		return obj, nil
	case by != "" && by != it.claimedBy:
		it.claimedBy, it.since = by, time.Now()
		return nil, errClaimed
	case by != "" && time.Since(it.since) < claimPatience:
		return nil, errClaimed
	}
	claimed := d.empty()
	err := d.api.patch(ctx, r, key, "", map[string]any{"metadata": map[string]any{
		"resourceVersion": obj.GetResourceVersion(), "uid": obj.GetUID(), "annotations": map[string]string{claimAnnotation: d.o.Replica},
	}}, claimed)
	switch {
	case apierrors.IsConflict(err):
		return nil, errChanged
	case apierrors.IsForbidden(err):
		d.refused()
	}
	return claimed, err
}

// decide asks the registration authority, unless the door's own protocol refuses already.
func (d *door) decide(ctx context.Context, obj object) (ca.SVID, error) {
	ask, err := d.ask(obj)
	if err == nil && d.maxSkew > 0 {
		if skew := d.api.conn.ClockSkew(); skew.Abs() > d.maxSkew {
			err = refusal.New(refusal.ClockSkew, "the API server's clock is %s ahead of the CA's, and at most %s either way are allowed", skew.Round(time.Second), d.maxSkew)
		}
	}
	if err != nil {
		return ca.SVID{}, d.o.Registration.Refuse(d.by, ask, err)
	}
	return d.o.Registration.Issue(ctx, d.by, ask)
}

// finally sorts out the refusals that are an answer: those that the same request would meet again, whatever time passes. A
// fault inside the CA is none of them.
func finally(err error) (*refusal.Error, bool) {
	no, ok := refusal.From(err)
	return no, ok && !no.Reason.Passing() && no.Reason.Code() != refusal.Internal.Code()
}

// deliver writes the answer, each part on the condition that nobody changed the request since the part before.
func (d *door) deliver(ctx context.Context, r resource, key objectKey, obj object, parts []answer, outcome string) error {
	meta := metav1.ObjectMeta{ResourceVersion: obj.GetResourceVersion(), UID: obj.GetUID()}
	for _, part := range parts {
		after := d.empty()
		err := d.api.patch(ctx, r, key, part.subresource, map[string]any{
			"metadata": map[string]any{"resourceVersion": meta.ResourceVersion, "uid": meta.UID}, "status": part.status,
		}, after)
		switch {
		case apierrors.IsConflict(err):
			return errChanged
		case apierrors.IsForbidden(err), apierrors.HasStatusCause(err, metav1.CauseType(field.ErrorTypeForbidden)):
			d.refused()
			return err
		case apierrors.IsInvalid(err):
			d.tell("rejected")
			return fmt.Errorf("%w: %w", errRejected, err)
		case err != nil:
			return err
		}
		meta.ResourceVersion = after.GetResourceVersion()
	}
	d.tell(outcome)
	return nil
}
