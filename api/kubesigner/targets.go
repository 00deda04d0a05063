package kubesigner

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
)

const (
	// domainAnnotation is on what is ours: the trust domain that is published there. Whoever puts it on an object of theirs
	// hands it over.
	domainAnnotation = "meshca.io/trust-domain"
	// sequenceAnnotation is the bundle's, for people, and for a CA whose store is an old one.
	sequenceAnnotation = "meshca.io/bundle-sequence"

	trustBundles = "clustertrustbundles"
)

// content is what of an object is the bundle.
type content struct {
	resource
	kind  string
	empty func() object
	read  func(object) string
	// write is the part of a patch, or of a new object, that holds the bundle.
	write func(value string) map[string]any
}

func inConfigMap(key string) content {
	return content{
		resource: configMaps, kind: "ConfigMap",
		empty: func() object { return &corev1.ConfigMap{} },
		read:  func(o object) string { return o.(*corev1.ConfigMap).Data[key] }, //nolint:errcheck // empty makes no others
		write: func(value string) map[string]any { return map[string]any{"data": map[string]string{key: value}} },
	}
}

func (p *Publisher) configMap(c ConfigMapConfig, form func(material) string) *target {
	key := objectKey{c.Namespace, c.Name}
	in := inConfigMap(c.Key)
	return &target{
		name: fmt.Sprintf("%s/configmap/%s", p.o.Cluster, key),
		put: func(ctx context.Context, m material, first bool) (bool, error) {
			return p.ensure(ctx, in, key, form(m), m, first)
		},
		follow: []func(context.Context, func()) error{func(ctx context.Context, wake func()) error {
			return p.changes(ctx, configMaps, key, &corev1.ConfigMap{}, wake)
		}},
	}
}

func (p *Publisher) clusterTrustBundle(c ClusterTrustBundleConfig) *target {
	key := objectKey{name: strings.ReplaceAll(p.o.Signer, "/", ":") + ":" + c.Name}
	find := func(ctx context.Context) (resource, error) {
		r, found, err := p.api.served(ctx, trustBundles, "v1", "v1beta1", "v1alpha1")
		if err == nil && !found {
			err = fmt.Errorf("%s: %w", trustBundles, errNotServed)
		}
		return r, err
	}
	in := func(r resource) content {
		return content{
			resource: r, kind: "ClusterTrustBundle",
			empty: func() object { return &certificatesv1beta1.ClusterTrustBundle{} },
			read: func(o object) string {
				return o.(*certificatesv1beta1.ClusterTrustBundle).Spec.TrustBundle //nolint:errcheck // empty makes no others
			},
			write: func(value string) map[string]any {
				return map[string]any{"spec": map[string]string{"signerName": p.o.Signer, "trustBundle": value}}
			},
		}
	}
	return &target{
		name: fmt.Sprintf("%s/clustertrustbundle/%s", p.o.Cluster, key),
		put: func(ctx context.Context, m material, first bool) (bool, error) {
			r, err := find(ctx)
			if err != nil {
				return false, err
			}
			return p.ensure(ctx, in(r), key, m.pem, m, first)
		},
		follow: []func(context.Context, func()) error{func(ctx context.Context, wake func()) error {
			r, err := find(ctx)
			if err != nil {
				return err
			}
			return p.changes(ctx, r, key, &certificatesv1beta1.ClusterTrustBundle{}, wake)
		}},
	}
}

// everyNamespace is one place with as many objects as the cluster has namespaces.
func (p *Publisher) everyNamespace(c EveryNamespaceConfig) *target {
	in := inConfigMap(c.Key)
	return &target{
		name: fmt.Sprintf("%s/configmap/*/%s", p.o.Cluster, c.Name),
		put: func(ctx context.Context, m material, first bool) (changed bool, err error) {
			return p.ensureEverywhere(ctx, in, c.Name, m, first)
		},
		follow: []func(context.Context, func()) error{
			func(ctx context.Context, wake func()) error {
				return p.changes(ctx, namespaces, objectKey{}, &corev1.Namespace{}, wake)
			},
			func(ctx context.Context, wake func()) error {
				return p.changes(ctx, configMaps, objectKey{name: c.Name}, &corev1.ConfigMap{}, wake)
			},
		},
	}
}

// changes calls wake when an object of this name is made, changed or deleted: in its namespace or, without one, in any.
// Without a name it is about all objects.
func (p *Publisher) changes(ctx context.Context, r resource, which objectKey, example object, wake func()) error {
	selector := fields.Everything()
	if which.name != "" {
		selector = fields.OneTermEqualSelector("metadata.name", which.name)
	}
	f := following{
		api: p.api, resource: r, namespace: which.namespace, selector: selector, example: example, heard: func(error) {},
		seen: func(any) { wake() }, gone: wake,
		strip: func(obj any) {
			switch o := obj.(type) {
			case *corev1.ConfigMap:
				o.Data, o.BinaryData, o.ManagedFields = nil, nil, nil
			case *certificatesv1beta1.ClusterTrustBundle:
				o.Spec, o.ManagedFields = certificatesv1beta1.ClusterTrustBundleSpec{}, nil
			}
		},
	}
	return f.run(ctx)
}

// ensure has one object hold the bundle, and reports whether it held anything else before.
func (p *Publisher) ensure(ctx context.Context, in content, key objectKey, want string, m material, first bool) (changed bool, err error) {
	for range 4 { // others may make, change or delete it meanwhile
		has := in.empty()
		err = p.api.get(ctx, in.resource, key, has)
		switch {
		case apierrors.IsNotFound(err):
			changed, err = true, p.make(ctx, in, key, want, m)
		case err == nil:
			var more bool
			more, err = p.mend(ctx, in, key, has, want, m, first)
			changed = changed || more
		}
		if !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
			break
		}
	}
	return changed, err
}

func marks(m material) map[string]string {
	return map[string]string{domainAnnotation: m.domain, sequenceAnnotation: strconv.FormatUint(m.sequence, 10)}
}

func (p *Publisher) make(ctx context.Context, in content, key objectKey, want string, m material) error {
	body := in.write(want)
	body["apiVersion"], body["kind"] = in.GroupVersion.String(), in.kind
	body["metadata"] = map[string]any{"name": key.name, "annotations": marks(m)}
	return p.api.create(ctx, in.resource, key.namespace, body)
}

// mend changes an object that is there, if it is ours.
func (p *Publisher) mend(ctx context.Context, in content, key objectKey, has object, want string, m material, first bool) (changed bool, err error) {
	if err := p.ours(in, key, has, m, first); err != nil {
		return false, err
	}
	ann := has.GetAnnotations()
	changed = in.read(has) != want
	if !changed && ann[sequenceAnnotation] == marks(m)[sequenceAnnotation] {
		return false, nil
	}
	body := in.write(want)
	body["metadata"] = map[string]any{"resourceVersion": has.GetResourceVersion(), "uid": has.GetUID(), "annotations": marks(m)}
	return changed, p.api.patch(ctx, in.resource, key, "", body, in.empty())
}

// ours refuses to touch what belongs to others: an object that is not marked, or is another trust domain's. And it refuses
// to take back what this CA published once and does not know any more. That is asked at the start alone; later, what
// changed was changed by others.
func (p *Publisher) ours(in content, key objectKey, has object, m material, first bool) error {
	what := strings.ToLower(in.kind) + " " + key.name
	if key.namespace != "" {
		what = "--namespace " + key.namespace + " " + what
	}
	ann := has.GetAnnotations()
	switch domain := ann[domainAnnotation]; {
	case domain == "":
		return fmt.Errorf("%s %s is somebody else's and was left as it is. To hand it over: kubectl annotate %s %s=%s", in.kind, key, what, domainAnnotation, m.domain)
	case domain != m.domain:
		return fmt.Errorf("%s %s belongs to trust domain %.100q and was left as it is: configure another name here or there", in.kind, key, domain)
	}
	if theirs, err := strconv.ParseUint(ann[sequenceAnnotation], 10, 64); first && err == nil && theirs > m.sequence {
		return fmt.Errorf("%s %s holds the trust bundle %d, and this CA has %d: its store is an old one (docs/operations.md, \"After an old backup\"). "+
			"If somebody made that number up: kubectl delete %s", in.kind, key, theirs, m.sequence, what)
	}
	return nil
}

// ensureEverywhere has an object in each namespace hold the bundle. Namespaces that are going are left out.
func (p *Publisher) ensureEverywhere(ctx context.Context, in content, name string, m material, first bool) (changed bool, err error) {
	var spaces corev1.NamespaceList
	var maps corev1.ConfigMapList
	fromCache := metav1.ListOptions{ResourceVersion: "0"}
	if err := p.api.list(ctx, namespaces, fromCache, &spaces); err != nil {
		return false, err
	}
	fromCache.FieldSelector = fields.OneTermEqualSelector("metadata.name", name).String()
	if err := p.api.list(ctx, configMaps, fromCache, &maps); err != nil {
		return false, err
	}
	is := make(map[string]*corev1.ConfigMap, len(maps.Items))
	for i := range maps.Items {
		is[maps.Items[i].Namespace] = &maps.Items[i]
	}
	var failed []error
	for i := range spaces.Items {
		s := &spaces.Items[i]
		if s.DeletionTimestamp != nil {
			continue
		}
		if ctx.Err() != nil {
			return changed, ctx.Err()
		}
		has := is[s.Name]
		if has != nil && p.ours(in, objectKey{s.Name, name}, has, m, first) == nil && in.read(has) == m.pem &&
			has.Annotations[sequenceAnnotation] == marks(m)[sequenceAnnotation] {
			continue
		}
		more, err := p.ensure(ctx, in, objectKey{s.Name, name}, m.pem, m, first)
		changed = changed || more
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			failed = append(failed, err)
		}
	}
	if len(failed) > 0 {
		return changed, fmt.Errorf("in %d of %d namespaces it could not be written, the first: %w", len(failed), len(spaces.Items), failed[0])
	}
	return changed, nil
}
