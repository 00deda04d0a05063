package kubesigner

import (
	"context"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// following is a list and a watch of some objects. client-go's reflector keeps it up: it tries again what breaks, after
// 0.8 s at first and half a minute at last.
type following struct {
	api      *api
	resource resource
	// namespace is the objects'; empty: all, or none.
	namespace string
	selector  fields.Selector
	example   runtime.Object
	// seen is told of each object that is there, or new, or changed; gone, which may be nil, of each that is no more. strip
	// drops what neither looks at, before lists are held in memory; nil: nothing.
	seen  func(obj any)
	gone  func()
	strip func(obj any)
	// heard is told how the last list or watch began.
	heard func(error)
}

// run follows until ctx ends. It returns an error if the API server says that there is no such resource or that we may not
// follow it: whoever asked for it looks again whether that is so, and from when on not.
func (f *following) run(ctx context.Context) error {
	quiet := klog.New(nil)
	round, stop := context.WithCancelCause(klog.NewContext(ctx, quiet))
	defer stop(nil)
	note := func(err error) {
		switch {
		case round.Err() != nil:
			return
		case apierrors.IsNotFound(err), apierrors.IsForbidden(err):
			stop(err)
		case err != nil:
			f.api.conn.Doubt()
		}
		f.heard(err)
	}
	list := func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		o.FieldSelector = f.selector.String()
		client, err := f.api.at(f.resource.GroupVersion)
		if err != nil {
			return nil, err
		}
		got, err := client.Get().NamespaceIfScoped(f.namespace, f.namespace != "").Resource(f.resource.plural).VersionedParams(&o, metav1.ParameterCodec).Do(ctx).Get()
		note(err)
		return got, err
	}
	begin := func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
		o.FieldSelector, o.Watch = f.selector.String(), true
		client, err := f.api.at(f.resource.GroupVersion)
		if err != nil {
			return nil, err
		}
		w, err := client.Get().NamespaceIfScoped(f.namespace, f.namespace != "").Resource(f.resource.plural).VersionedParams(&o, metav1.ParameterCodec).Watch(ctx)
		note(err)
		return w, err
	}
	r := cache.NewReflectorWithOptions(&cache.ListWatch{ListWithContextFunc: list, WatchFuncWithContext: begin}, f.example, arrivals{f},
		cache.ReflectorOptions{Name: f.resource.String(), Logger: &quiet})
	r.RunWithContext(round)
	if err := ctx.Err(); err != nil {
		return err
	}
	return context.Cause(round)
}

// arrivals passes on what a reflector tells, and keeps nothing.
type arrivals struct{ f *following }

var _ cache.TransformingStore = arrivals{}

// Add is the reflector's.
func (a arrivals) Add(obj any) error { a.f.seen(obj); return nil }

// Update is the reflector's.
func (a arrivals) Update(obj any) error { return a.Add(obj) }

// Delete is the reflector's.
func (a arrivals) Delete(any) error {
	if a.f.gone != nil {
		a.f.gone()
	}
	return nil
}

// Replace is the reflector's: these are all. What is missing among them may have gone unseen.
func (a arrivals) Replace(all []any, _ string) error {
	for _, obj := range all {
		a.f.seen(obj)
	}
	return a.Delete(nil)
}

// Resync is the reflector's.
func (a arrivals) Resync() error { return nil }

// Transformer strips objects while a list is gathered.
func (a arrivals) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if a.f.strip != nil {
			a.f.strip(obj)
		}
		return obj, nil
	}
}
