package kubesigner

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"

	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/util/validation"
)

const (
	// domainAnnotation is on what is ours: the trust domain that is published there. Whoever puts it on an object of theirs
	// hands it over.
	domainAnnotation = "meshca.io/trust-domain"
	// sequenceAnnotation is the bundle's, for people, and for a CA whose store is an old one.
	sequenceAnnotation = "meshca.io/bundle-sequence"
	// domainLabel is for people, who find by it what is published for a trust domain.
	domainLabel = "meshca.io/published-for"

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
		put: func(ctx context.Context, m material, had uint64) (outcome, error) {
			did, err := p.ensure(ctx, in, key, form(m), m, had == 0)
			return did.toAll(had == m.sequence), err
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
		put: func(ctx context.Context, m material, had uint64) (outcome, error) {
			r, err := find(ctx)
			if err != nil {
				return outcome{}, err
			}
			did, err := p.ensure(ctx, in(r), key, m.pem, m, had == 0)
			return did.toAll(had == m.sequence), err
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

// did is what was done to an object.
type did int

const (
	nothing  did = iota
	marked       // its bundle was the right one, its marks were not
	created      // there was none
	replaced     // it held another bundle
)

// toAll is the outcome for a place that is this one object. again: it had held this very bundle.
func (d did) toAll(again bool) outcome {
	changed := d >= created
	return outcome{changed: changed, restored: changed && again}
}

// ensure has one object hold the bundle, and reports the most that it did for that.
func (p *Publisher) ensure(ctx context.Context, in content, key objectKey, want string, m material, first bool) (most did, err error) {
	for range 4 { // others may make, change or delete it meanwhile
		has, now := in.empty(), nothing
		err = p.api.get(ctx, in.resource, key, has)
		switch {
		case apierrors.IsNotFound(err):
			now, err = created, p.make(ctx, in, key, want, m)
		case err == nil:
			now, err = p.mend(ctx, in, key, has, want, m, first)
		}
		if err == nil {
			most = max(most, now)
		}
		if !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
			break
		}
	}
	return most, err
}

func marks(m material) map[string]string {
	return map[string]string{domainAnnotation: m.domain, sequenceAnnotation: strconv.FormatUint(m.sequence, 10)}
}

// labels hold the trust domain where it can be a label's value, and else its digest.
func labels(m material) map[string]string {
	value := m.domain
	if len(validation.IsValidLabelValue(value)) > 0 {
		sum := sha256.Sum256([]byte(value))
		value = "sha256-" + hex.EncodeToString(sum[:16])
	}
	return map[string]string{domainLabel: value}
}

func (p *Publisher) make(ctx context.Context, in content, key objectKey, want string, m material) error {
	body := in.write(want)
	body["apiVersion"], body["kind"] = in.GroupVersion.String(), in.kind
	body["metadata"] = map[string]any{"name": key.name, "annotations": marks(m), "labels": labels(m)}
	return p.api.create(ctx, in.resource, key.namespace, body)
}

// mend changes an object that is there, if it is ours.
func (p *Publisher) mend(ctx context.Context, in content, key objectKey, has object, want string, m material, first bool) (did, error) {
	if err := p.ours(in, key, has, m, first); err != nil {
		return nothing, err
	}
	now := replaced
	switch same := in.read(has) == want; {
	case same && isMarked(has, m):
		return nothing, nil
	case same:
		now = marked
	}
	body := in.write(want)
	body["metadata"] = map[string]any{"resourceVersion": has.GetResourceVersion(), "uid": has.GetUID(), "annotations": marks(m), "labels": labels(m)}
	return now, p.api.patch(ctx, in.resource, key, "", body, in.empty())
}

// isMarked reports whether an object says of itself what it should.
func isMarked(has object, m material) bool {
	for key, value := range marks(m) {
		if has.GetAnnotations()[key] != value {
			return false
		}
	}
	return has.GetLabels()[domainLabel] == labels(m)[domainLabel]
}

// errNotOurs is wrapped by the faults of objects that are there and are not ours to write.
var errNotOurs = errors.New("it was left as it is")

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
		return fmt.Errorf("%s %s is somebody else's: %w. To hand it over: kubectl annotate %s %s=%s", in.kind, key, errNotOurs, what, domainAnnotation, m.domain)
	case domain != m.domain:
		return fmt.Errorf("%s %s belongs to trust domain %.100q: %w. Configure another name here or there", in.kind, key, domain, errNotOurs)
	}
	if theirs, err := strconv.ParseUint(ann[sequenceAnnotation], 10, 64); first && err == nil && theirs > m.sequence {
		return fmt.Errorf("%s %s holds the trust bundle %d, and this CA has %d: its store is an old one (docs/operations.md, \"After an old backup\"). "+
			"If somebody made that number up: kubectl delete %s", in.kind, key, theirs, m.sequence, what)
	}
	return nil
}
