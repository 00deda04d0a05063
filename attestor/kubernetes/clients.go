package kubernetes

import (
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	// kubeconfigPeriod is how often the kubeconfig is looked at while calls go well, kubeconfigPause how long at least
	// lies between two looks while they fail.
	kubeconfigPeriod = time.Minute
	kubeconfigPause  = 5 * time.Second
)

// clients are what one reading of the kubeconfig made.
type clients struct {
	core, authentication, authorization *rest.RESTClient

	conf   *rest.Config
	shared *http.Client
}

// connection is the clients, made anew when the kubeconfig's content has changed: whoever replaces the token or the
// certificate in it need not restart the CA. What the kubeconfig names by path (tokenFile, client-certificate,
// certificate-authority), and all that a pod is given, client-go itself reads again.
type connection struct {
	kubeconfig string // empty: as the pod that we run in
	wrap       func(http.RoundTripper) http.RoundTripper
	now        func() time.Time
	log        *slog.Logger

	current atomic.Pointer[clients]

	mu     sync.Mutex
	digest [sha256.Size]byte // of the file that current was made of
	looked time.Time
	last   lastError // of the last look
}

func newConnection(kubeconfig string, wrap func(http.RoundTripper) http.RoundTripper, now func() time.Time, log *slog.Logger) (*connection, error) {
	c := &connection{kubeconfig: kubeconfig, wrap: wrap, now: now, log: log, looked: now()}
	if kubeconfig != "" {
		if err := c.read(); err != nil {
			return nil, err
		}
		return c, nil
	}
	conf, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: not set, and this is no pod of a cluster (%w): name a kubeconfig file", err)
	}
	made, err := newClients(conf, wrap)
	if err != nil {
		return nil, fmt.Errorf("the pod's own account: %w", err)
	}
	c.current.Store(made)
	return c, nil
}

// clients returns those to make the next call with.
func (c *connection) clients() *clients {
	c.look(kubeconfigPeriod)
	return c.current.Load()
}

// doubt is told that a call failed: credentials that were replaced in the file are a usual reason.
func (c *connection) doubt() { c.look(kubeconfigPause) }

// look reads the kubeconfig again unless the last look was less than pause ago. A file that cannot be used leaves the
// last good one in use. Nobody waits for another's look.
func (c *connection) look(pause time.Duration) {
	if c.kubeconfig == "" || !c.mu.TryLock() {
		return
	}
	defer c.mu.Unlock()
	now := c.now()
	if now.Sub(c.looked) < pause {
		return
	}
	c.looked = now
	err := c.read()
	if c.last.set(err) && err != nil {
		c.log.Warn("the kubeconfig cannot be read again; what it said last stays in use", "error", err)
	}
}

// read makes new clients if the file is not the one that the current ones were made of.
func (c *connection) read() error {
	raw, err := os.ReadFile(c.kubeconfig)
	if err != nil {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	digest := sha256.Sum256(raw)
	if digest == c.digest {
		return nil
	}
	// Another reading, which gives paths in it their meaning. If the file changed since, its digest tells at the next look.
	conf, err := fileConfig(c.kubeconfig)
	if err != nil {
		return fmt.Errorf("kubeconfig: %s: %w", c.kubeconfig, err)
	}
	made, err := newClients(conf, c.wrap)
	if err != nil {
		return fmt.Errorf("kubeconfig: %s: %w", c.kubeconfig, err)
	}
	c.digest = digest
	if c.current.Swap(made) != nil {
		c.log.Info("the kubeconfig changed; calls are made as it says now")
	}
	return nil
}

func fileConfig(kubeconfig string) (*rest.Config, error) {
	file, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		return nil, err
	}
	if err := clientcmd.ResolveLocalPaths(file); err != nil {
		return nil, err
	}
	return clientcmd.NewDefaultClientConfig(*file, nil).ClientConfig()
}

func newClients(conf *rest.Config, wrap func(http.RoundTripper) http.RoundTripper) (*clients, error) {
	conf.QPS = -1 // no rate limit: zero would be client-go's own, five calls a second
	conf.UserAgent = "meshca"
	conf.ContentType = runtime.ContentTypeProtobuf
	conf.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	conf.Wrap(wrap)
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
		return nil, err
	}
	made := &clients{conf: conf, shared: shared}
	for _, c := range []struct {
		client **rest.RESTClient
		path   string
		group  schema.GroupVersion
	}{
		{&made.core, "/api", corev1.SchemeGroupVersion},
		{&made.authentication, "/apis", authenticationv1.SchemeGroupVersion},
		{&made.authorization, "/apis", authorizationv1.SchemeGroupVersion},
	} {
		one := rest.CopyConfig(conf)
		one.APIPath, one.GroupVersion, one.NegotiatedSerializer = c.path, &c.group, codecs
		if *c.client, err = rest.RESTClientForConfigAndClient(one, shared); err != nil {
			return nil, err
		}
	}
	return made, nil
}
