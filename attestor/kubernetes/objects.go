package kubernetes

import (
	"context"
	"fmt"
	"reflect"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/meshca/meshca/attestor"
)

// kind is one of the four kinds of object that a token stands on, in the order in which they are judged: where a whole
// namespace goes, that is the reason to give.
type kind int

const (
	namespaces kind = iota
	serviceAccounts
	pods
	nodes
	kinds // how many there are
)

func (k kind) String() string {
	return [kinds]string{"namespaces", "serviceaccounts", "pods", "nodes"}[k]
}

func (k kind) example() runtime.Object {
	return [kinds]runtime.Object{&corev1.Namespace{}, &corev1.ServiceAccount{}, &corev1.Pod{}, &corev1.Node{}}[k]
}

// object is what is used of any of them.
type object struct {
	uid string
	// deletion is when its deletion is due; zero: nobody asked for it. Of a pod it is when its grace ends.
	deletion time.Time
	// node is a pod's spec.nodeName; phase a pod's.
	node  string
	phase corev1.PodPhase
	// account is a pod's service account; created is when a pod or a service account was made, in whole seconds.
	account string
	created time.Time
	// labels and annotations are nil where they are not wanted of its kind.
	labels, annotations *entries
}

// name of an object; namespace is empty for namespaces and nodes.
type name struct{ namespace, name string }

func (n name) String() string {
	if n.namespace == "" {
		return n.name
	}
	return n.namespace + "/" + n.name
}

// entries are labels or annotations; nil where the object has too many.
type entries struct{ kept map[string]string }

func keep(wanted bool, m map[string]string) *entries {
	if !wanted {
		return nil
	}
	size := 0
	for k, v := range m {
		size += len(k) + len(v)
	}
	switch {
	case len(m) > attestor.MaxEntries || size > attestor.MaxEntryBytes:
		return &entries{}
	case m == nil:
		return &entries{map[string]string{}}
	}
	return &entries{m}
}

// wanted is what is wanted of the kind.
func (k kind) wanted(w attestor.Wants) (labels, annotations bool) {
	switch k {
	case pods:
		return w.PodLabels, w.PodAnnotations
	case namespaces:
		return w.NamespaceLabels, false
	}
	return false, false
}

// stripped is what is used of obj.
func stripped(obj any, w attestor.Wants) (name, object, error) {
	meta, ok := obj.(metav1.ObjectMetaAccessor)
	if !ok {
		return name{}, object{}, fmt.Errorf("a %T is no object", obj)
	}
	m := meta.GetObjectMeta()
	o := object{uid: string(m.GetUID())}
	if d := m.GetDeletionTimestamp(); d != nil {
		o.deletion = d.Time
	}
	switch obj := obj.(type) {
	case *corev1.Pod:
		o.node, o.phase, o.account, o.created = obj.Spec.NodeName, obj.Status.Phase, obj.Spec.ServiceAccountName, obj.CreationTimestamp.Time
		o.labels, o.annotations = keep(w.PodLabels, obj.Labels), keep(w.PodAnnotations, obj.Annotations)
	case *corev1.ServiceAccount:
		o.created = obj.CreationTimestamp.Time
	case *corev1.Namespace:
		o.labels = keep(w.NamespaceLabels, obj.Labels)
	}
	return name{m.GetNamespace(), m.GetName()}, o, nil
}

// get reads one object from the API server.
func (a *api) get(ctx context.Context, l lane, k kind, n name, w attestor.Wants) (o object, found bool, err error) {
	err = a.call(ctx, l, k.String(), func(ctx context.Context, c *clients) error {
		got, err := c.core.Get().Resource(k.String()).NamespaceIfScoped(n.namespace, n.namespace != "").Name(n.name).MaxRetries(0).Do(ctx).Get()
		if err != nil {
			return err
		}
		var is name
		if is, o, err = stripped(got, w); err == nil && (is != n || reflect.TypeOf(got) != reflect.TypeOf(k.example())) {
			err = fmt.Errorf("asked for %s %s, it answered with %T %s", k, n, got, is)
		}
		return err
	})
	if isNotFound(err) {
		return object{}, false, nil
	}
	return o, err == nil, err
}
