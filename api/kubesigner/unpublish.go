package kubesigner

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	// lookTwice is the pause before it is looked again: a CA that is still ending may have put back what was deleted.
	lookTwice = 3 * time.Second
	maxLooks  = 10
)

// UnpublishOptions say what is to be taken away of what a CA published in a cluster. Objects that do not carry the mark of
// the trust domain are left alone, whatever they are called.
type UnpublishOptions struct {
	// Kubeconfig leads to the cluster; empty: as the pod's own service account.
	Kubeconfig  string
	TrustDomain string
	// ClusterTrustBundle is the object's name; empty: none.
	ClusterTrustBundle string
	// ConfigMaps are single ones, NAMESPACE/NAME; Everywhere are names of ConfigMaps that are looked for in every namespace.
	ConfigMaps, Everywhere []string
	// Deleted is told of each object that was deleted.
	Deleted func(object string)
}

// Unpublish deletes what a CA published, which must have been ended before: it would put it back.
func Unpublish(ctx context.Context, o UnpublishOptions) error {
	td, err := spiffeid.TrustDomainFromString(o.TrustDomain)
	if err != nil {
		return fmt.Errorf("trust domain %.255q: %w", o.TrustDomain, err)
	}
	conn, err := dial(o.Kubeconfig)
	if err != nil {
		return err
	}
	r := &remover{api: newAPI(conn), domain: td.Name(), told: o.Deleted}
	for range maxLooks {
		before := r.deleted
		if err := r.look(ctx, o); err != nil {
			return err
		}
		if r.deleted == before {
			return nil
		}
		if pause(ctx, lookTwice, nil, nil); ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return errors.New("what is deleted comes back: the CA still runs, or another one of the same trust domain publishes here too")
}

// cluster is the connection of somebody who has one thing to do.
type cluster struct {
	conf   *rest.Config
	client *http.Client
}

var _ Connection = cluster{}

func (c cluster) REST() (*rest.Config, *http.Client) { return c.conf, c.client }
func (c cluster) Doubt()                             {}
func (c cluster) ClockSkew() time.Duration           { return 0 }

func dial(kubeconfig string) (c cluster, err error) {
	if kubeconfig == "" {
		c.conf, err = rest.InClusterConfig()
	} else {
		c.conf, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return c, fmt.Errorf("finding the cluster: %w", err)
	}
	c.client, err = rest.HTTPClientFor(c.conf)
	return c, err
}

// remover deletes objects that are marked as a trust domain's.
type remover struct {
	api     *api
	domain  string
	told    func(string)
	deleted int
}

// look deletes what is there now. It tries all, and returns all that failed.
func (r *remover) look(ctx context.Context, o UnpublishOptions) error {
	var faults []error
	if o.ClusterTrustBundle != "" {
		bundles, found, err := r.api.served(ctx, trustBundles, "v1", "v1beta1", "v1alpha1")
		if err == nil && found {
			err = r.one(ctx, bundles, objectKey{name: o.ClusterTrustBundle}, &certificatesv1beta1.ClusterTrustBundle{})
		}
		faults = append(faults, err)
	}
	for _, name := range o.ConfigMaps {
		namespace, name, _ := strings.Cut(name, "/")
		faults = append(faults, r.one(ctx, configMaps, objectKey{namespace, name}, &corev1.ConfigMap{}))
	}
	for _, name := range o.Everywhere {
		faults = append(faults, r.everywhere(ctx, name))
	}
	return errors.Join(faults...)
}

func (r *remover) one(ctx context.Context, in resource, key objectKey, has object) error {
	err := r.api.get(ctx, in, key, has)
	if err == nil {
		return r.remove(ctx, in, key, has)
	}
	if apierrors.IsNotFound(err) {
		return nil
	}
	return fmt.Errorf("%s %s: %w", in.plural, key, err)
}

// everywhere deletes them page by page: there may be as many as namespaces, and others may have filled them.
func (r *remover) everywhere(ctx context.Context, name string) error {
	var faults []error
	o := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String(), Limit: 50}
	for {
		var page corev1.ConfigMapList
		if err := r.api.list(ctx, configMaps, o, &page); err != nil {
			return errors.Join(append(faults, fmt.Errorf("looking for configmaps %s: %w", name, err))...)
		}
		for i := range page.Items {
			faults = append(faults, r.remove(ctx, configMaps, objectKey{page.Items[i].Namespace, name}, &page.Items[i]))
		}
		if o.Continue = page.Continue; o.Continue == "" {
			return errors.Join(faults...)
		}
	}
}

// remove deletes an object as it was read, if it is ours.
func (r *remover) remove(ctx context.Context, in resource, key objectKey, has object) error {
	if has.GetAnnotations()[domainAnnotation] != r.domain || has.GetDeletionTimestamp() != nil {
		return nil
	}
	err := r.api.remove(ctx, in, key, has)
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case apierrors.IsConflict(err): // somebody changed it: it is read again at the next look
		r.deleted++
		return nil
	case err != nil:
		return fmt.Errorf("deleting %s %s: %w", in.plural, key, err)
	}
	r.deleted++
	r.told(in.plural + " " + key.String())
	return nil
}
