package kubesigner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
)

// callTimeout bounds each call to the API server.
const callTimeout = 10 * time.Second

// Connection leads to a cluster's API server.
type Connection interface {
	// REST is the account's configuration and its HTTP client, as they are now; others once its credentials were replaced.
	REST() (*rest.Config, *http.Client)
	// Doubt is told that a call failed: credentials that were replaced are a usual reason.
	Doubt()
	// ClockSkew is the API server's clock minus ours.
	ClockSkew() time.Duration
}

// resource is a kind of object in the version that is spoken.
type resource struct {
	schema.GroupVersion
	plural string
}

func (r resource) String() string { return r.plural + " " + r.GroupVersion.String() }

const certificatesGroup = "certificates.k8s.io"

var (
	configMaps = resource{corev1.SchemeGroupVersion, "configmaps"}
	namespaces = resource{corev1.SchemeGroupVersion, "namespaces"}
)

// objectKey is the name of an object.
type objectKey struct{ namespace, name string }

func (k objectKey) String() string {
	if k.namespace == "" {
		return k.name
	}
	return k.namespace + "/" + k.name
}

// api makes calls to one cluster's API server.
type api struct {
	conn   Connection
	codecs runtime.NegotiatedSerializer

	mu      sync.Mutex
	conf    *rest.Config // that clients were made of
	clients map[schema.GroupVersion]*rest.RESTClient
}

func newAPI(conn Connection) *api {
	return &api{conn: conn, codecs: serializer.NewCodecFactory(known()).WithoutConversion()}
}

// known are the types that are spoken of. The versions of PodCertificateRequest and ClusterTrustBundle have the same JSON,
// but that v1 lacks two deprecated fields, so one Go type reads them all.
func known() *runtime.Scheme {
	s := runtime.NewScheme()
	v1 := certificatesv1.SchemeGroupVersion
	s.AddKnownTypes(corev1.SchemeGroupVersion, &corev1.ConfigMap{}, &corev1.ConfigMapList{}, &corev1.Namespace{}, &corev1.NamespaceList{})
	s.AddKnownTypes(v1, &certificatesv1.CertificateSigningRequest{}, &certificatesv1.CertificateSigningRequestList{})
	metav1.AddToGroupVersion(s, corev1.SchemeGroupVersion)
	for _, version := range []string{"v1", "v1beta1", "v1alpha1"} {
		gv := schema.GroupVersion{Group: certificatesGroup, Version: version}
		s.AddKnownTypeWithName(gv.WithKind("PodCertificateRequest"), &certificatesv1beta1.PodCertificateRequest{})
		s.AddKnownTypeWithName(gv.WithKind("PodCertificateRequestList"), &certificatesv1beta1.PodCertificateRequestList{})
		s.AddKnownTypeWithName(gv.WithKind("ClusterTrustBundle"), &certificatesv1beta1.ClusterTrustBundle{})
		s.AddKnownTypeWithName(gv.WithKind("ClusterTrustBundleList"), &certificatesv1beta1.ClusterTrustBundleList{})
		metav1.AddToGroupVersion(s, gv)
	}
	return s
}

// at is the client of a group and version.
func (a *api) at(gv schema.GroupVersion) (*rest.RESTClient, error) {
	conf, shared := a.conn.REST()
	if conf == nil {
		return nil, errors.New("the cluster's configuration leads to no API server")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if conf != a.conf {
		a.conf, a.clients = conf, map[schema.GroupVersion]*rest.RESTClient{}
	}
	if c := a.clients[gv]; c != nil {
		return c, nil
	}
	one := rest.CopyConfig(conf)
	one.APIPath, one.GroupVersion, one.NegotiatedSerializer = "/apis", &gv, a.codecs
	one.ContentType, one.AcceptContentTypes = runtime.ContentTypeJSON, runtime.ContentTypeJSON
	if gv.Group == "" {
		one.APIPath = "/api"
	}
	c, err := rest.RESTClientForConfigAndClient(one, shared)
	if err != nil {
		return nil, err
	}
	a.clients[gv] = c
	return c, nil
}

// call makes one call within its time.
func (a *api) call(ctx context.Context, gv schema.GroupVersion, do func(context.Context, *rest.RESTClient) error) error {
	client, err := a.at(gv)
	if err != nil {
		return err
	}
	timed, cancel := context.WithTimeout(klog.NewContext(ctx, klog.New(nil)), callTimeout)
	defer cancel()
	err = do(timed, client)
	if err != nil && ctx.Err() == nil && !answered(err) {
		a.conn.Doubt()
	}
	return err
}

// answered reports whether an error is the API server's considered answer: another reading of the credentials does not
// change it.
func answered(err error) bool {
	return apierrors.IsNotFound(err) || apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) || apierrors.IsInvalid(err)
}

func (a *api) get(ctx context.Context, r resource, k objectKey, into runtime.Object) error {
	return a.call(ctx, r.GroupVersion, func(ctx context.Context, c *rest.RESTClient) error {
		return c.Get().Resource(r.plural).NamespaceIfScoped(k.namespace, k.namespace != "").Name(k.name).MaxRetries(0).Do(ctx).Into(into)
	})
}

func (a *api) list(ctx context.Context, r resource, o metav1.ListOptions, into runtime.Object) error {
	return a.call(ctx, r.GroupVersion, func(ctx context.Context, c *rest.RESTClient) error {
		return c.Get().Resource(r.plural).VersionedParams(&o, metav1.ParameterCodec).MaxRetries(0).Do(ctx).Into(into)
	})
}

// patch merges body (RFC 7386) into an object, or into a subresource of it, and reads the result. A resourceVersion in the
// body makes it a compare-and-swap.
func (a *api) patch(ctx context.Context, r resource, k objectKey, subresource string, body any, into runtime.Object) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	return a.call(ctx, r.GroupVersion, func(ctx context.Context, c *rest.RESTClient) error {
		p := c.Patch(types.MergePatchType).Resource(r.plural).NamespaceIfScoped(k.namespace, k.namespace != "").Name(k.name)
		if subresource != "" {
			p = p.SubResource(subresource)
		}
		return p.Body(data).MaxRetries(0).Do(ctx).Into(into)
	})
}

func (a *api) create(ctx context.Context, r resource, namespace string, body any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	return a.call(ctx, r.GroupVersion, func(ctx context.Context, c *rest.RESTClient) error {
		return c.Post().Resource(r.plural).NamespaceIfScoped(namespace, namespace != "").
			SetHeader("Content-Type", runtime.ContentTypeJSON).Body(data).MaxRetries(0).Do(ctx).Error()
	})
}

// remove deletes an object as it was read: one that was changed, or made anew, meets a conflict.
func (a *api) remove(ctx context.Context, r resource, k objectKey, has object) error {
	uid, version := has.GetUID(), has.GetResourceVersion()
	data, err := json.Marshal(metav1.DeleteOptions{
		TypeMeta:      metav1.TypeMeta{APIVersion: "v1", Kind: "DeleteOptions"},
		Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &version},
	})
	if err != nil {
		return err
	}
	return a.call(ctx, r.GroupVersion, func(ctx context.Context, c *rest.RESTClient) error {
		return c.Delete().Resource(r.plural).NamespaceIfScoped(k.namespace, k.namespace != "").Name(k.name).
			SetHeader("Content-Type", runtime.ContentTypeJSON).Body(data).MaxRetries(0).Do(ctx).Error()
	})
}

// served finds the first of the versions in which the API server serves the resource; found is false where it serves none.
func (a *api) served(ctx context.Context, plural string, versions ...string) (r resource, found bool, err error) {
	for _, version := range versions {
		gv := schema.GroupVersion{Group: certificatesGroup, Version: version}
		var list metav1.APIResourceList
		err := a.call(ctx, gv, func(ctx context.Context, c *rest.RESTClient) error {
			raw, err := c.Get().AbsPath("/apis/" + gv.String()).MaxRetries(0).Do(ctx).Raw()
			if err == nil {
				err = json.Unmarshal(raw, &list)
			}
			return err
		})
		if err != nil && !apierrors.IsNotFound(err) {
			return resource{}, false, fmt.Errorf("asking what of %s is served: %w", gv, err)
		}
		for _, has := range list.APIResources {
			if has.Name == plural {
				return resource{gv, plural}, true, nil
			}
		}
	}
	return resource{}, false, nil
}

// right is something that the CA's account must be allowed to do.
type right struct{ verb, resource, subresource, name string }

func (r right) String() string {
	what := r.resource
	if r.subresource != "" {
		what += "/" + r.subresource
	}
	if r.name != "" {
		what += " " + r.name
	}
	return r.verb + " " + what
}

// may asks whether the CA's account has a right in the certificates' group.
func (a *api) may(ctx context.Context, r right) (bool, error) {
	return a.mayIn(ctx, certificatesGroup, r)
}

// mayIn asks for one in any group, in all namespaces.
func (a *api) mayIn(ctx context.Context, group string, r right) (bool, error) {
	gv := authorizationv1.SchemeGroupVersion
	ask := authorizationv1.SelfSubjectAccessReview{
		TypeMeta: metav1.TypeMeta{APIVersion: gv.String(), Kind: "SelfSubjectAccessReview"},
		Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
			Group: group, Verb: r.verb, Resource: r.resource, Subresource: r.subresource, Name: r.name,
		}},
	}
	var answer authorizationv1.SelfSubjectAccessReview
	err := a.call(ctx, gv, func(ctx context.Context, c *rest.RESTClient) error {
		data, err := json.Marshal(&ask)
		if err != nil {
			return err
		}
		raw, err := c.Post().Resource("selfsubjectaccessreviews").SetHeader("Content-Type", runtime.ContentTypeJSON).Body(data).MaxRetries(0).Do(ctx).Raw()
		if err == nil {
			err = json.Unmarshal(raw, &answer)
		}
		return err
	})
	return answer.Status.Allowed, err
}
