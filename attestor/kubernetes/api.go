package kubernetes

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/meshca/meshca/api/refusal"
)

// api is the API server, with the bounds that calls to it keep. client-go's own rate limit is off: what bounds the calls
// is how many are under way.
type api struct {
	core, authentication, authorization *rest.RESTClient

	slots   *semaphore.Weighted
	wait    time.Duration // for a slot
	timeout time.Duration // of a call
	now     func() time.Time
	observe func(Call)

	skew skew
	last lastError // of the last call
}

func newAPI(s settings, now func() time.Time, observe func(Call)) (*api, error) {
	conf, err := restConfig(s.kubeconfig)
	if err != nil {
		return nil, err
	}
	a := &api{
		slots: semaphore.NewWeighted(int64(s.maxCalls)), wait: s.callTimeout, timeout: s.callTimeout, now: now, observe: observe,
	}
	conf.QPS = -1
	conf.UserAgent = "meshca"
	conf.ContentType = runtime.ContentTypeProtobuf
	conf.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	conf.Wrap(func(next http.RoundTripper) http.RoundTripper { return dated{next, &a.skew, now} })
	conf.WarningHandler = rest.NoWarnings{}

	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, authenticationv1.AddToScheme, authorizationv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	codecs := serializer.NewCodecFactory(scheme).WithoutConversion()
	shared, err := rest.HTTPClientFor(conf)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	for _, c := range []struct {
		client **rest.RESTClient
		path   string
		group  schema.GroupVersion
	}{
		{&a.core, "/api", corev1.SchemeGroupVersion},
		{&a.authentication, "/apis", authenticationv1.SchemeGroupVersion},
		{&a.authorization, "/apis", authorizationv1.SchemeGroupVersion},
	} {
		one := rest.CopyConfig(conf)
		one.APIPath, one.GroupVersion, one.NegotiatedSerializer = c.path, &c.group, codecs
		if *c.client, err = rest.RESTClientForConfigAndClient(one, shared); err != nil {
			return nil, fmt.Errorf("kubeconfig: %w", err)
		}
	}
	return a, nil
}

func restConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		conf, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("kubeconfig: not set, and this is no pod of a cluster (%w): name a kubeconfig file", err)
		}
		return conf, nil
	}
	file, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	if err := clientcmd.ResolveLocalPaths(file); err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	conf, err := clientcmd.NewDefaultClientConfig(*file, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %s: %w", kubeconfig, err)
	}
	return conf, nil
}

// call makes one call within the bounds: it waits for a slot, and gives the call its time. What fails comes back as a
// refusal, except that the caller's own end of patience comes back as it is, and "not found" is an answer.
func (a *api) call(ctx context.Context, what string, do func(context.Context) error) error {
	waiting, stop := context.WithTimeout(ctx, a.wait)
	err := a.slots.Acquire(waiting, 1)
	stop()
	if err != nil {
		return a.crowded(ctx)
	}
	defer a.slots.Release(1)
	timed, cancel := context.WithTimeout(klog.NewContext(ctx, klog.New(nil)), a.timeout) // the error tells all that client-go would log
	defer cancel()
	start := a.now()
	err = do(timed)
	took := a.now().Sub(start)
	if err == nil || isNotFound(err) {
		a.last.set(nil)
		a.observe(Call{What: what, Took: took})
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	refused := fault(what, err)
	a.last.set(refused)
	a.observe(Call{What: what, Took: took, Outcome: refused.Reason})
	return refused
}

// crowded says why no slot came: too much work, or an API server that holds the slots without an answer.
func (a *api) crowded(ctx context.Context) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := a.last.get(); err != nil {
		return err
	}
	return refusal.New(refusal.Overloaded, "too many calls to the cluster's API server are under way").After(time.Second)
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
	err = a.call(ctx, what, func(ctx context.Context) error {
		body, err := a.core.Get().AbsPath(path).SetHeader("Accept", "application/jwk-set+json, application/json").MaxRetries(0).Stream(ctx)
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
