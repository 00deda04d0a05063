package kubernetes

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/rotation"
)

// mirror is the cluster's objects of one kind, kept by a list and a watch and stripped to what is used of them.
//
// client-go's reflector does the keeping. What its informers add (queues, handlers, whole objects) nobody here needs.
type mirror struct {
	kind     kind
	wants    *rotation.Current[attestor.Wants]
	api      *api
	maxStale time.Duration
	now      func() time.Time
	log      *slog.Logger

	mu      sync.RWMutex
	objects map[name]object // nil before the first list
	byUID   map[string]name // of pods alone
	buried  burials

	round     atomic.Pointer[attestor.Wants] // what is kept of objects that come now
	heard     atomic.Pointer[time.Time]      // when the API server last said anything about them
	relisting atomic.Bool                    // what it says now goes to the next list, not yet to objects
	last      lastError                      // of listing and watching
}

var _ cache.TransformingStore = (*mirror)(nil)

func newMirror(k kind, wants *rotation.Current[attestor.Wants], a *api, s settings, now func() time.Time, log *slog.Logger) *mirror {
	m := &mirror{kind: k, wants: wants, api: a, maxStale: s.maxStale, now: now, log: log}
	m.round.Store(&attestor.Wants{})
	m.last.set(refusal.New(refusal.KubernetesUnavailable, "%s were not listed yet", k))
	return m
}

// run keeps the mirror until ctx ends. The reflector retries what fails, after 0.8 s at first and half a minute at last.
func (m *mirror) run(ctx context.Context) error {
	quiet := klog.New(nil) // failures are logged here, once each
	ctx = klog.NewContext(ctx, quiet)
	for ctx.Err() == nil {
		wants, stale := m.wants.Get()
		m.round.Store(&wants)
		round, stop := context.WithCancel(ctx)
		go m.untilOthersAreWanted(round, stop, wants, stale)
		r := cache.NewReflectorWithOptions(&cache.ListWatch{ListWithContextFunc: m.list, WatchFuncWithContext: m.watch},
			m.kind.example(), m, cache.ReflectorOptions{Name: m.kind.String(), Logger: &quiet})
		r.RunWithContext(round)
		stop()
	}
	return ctx.Err()
}

// untilOthersAreWanted calls stop when other labels or annotations of these objects are wanted than in this round: they are
// listed anew then. Until that is done, those that are looked at and lack what is wanted are read one by one.
func (m *mirror) untilOthersAreWanted(round context.Context, stop func(), wants attestor.Wants, stale <-chan struct{}) {
	defer stop()
	labels, annotations := m.kind.wanted(wants)
	for {
		select {
		case <-round.Done():
			return
		case <-stale:
		}
		wants, stale = m.wants.Get()
		if l, a := m.kind.wanted(wants); l != labels || a != annotations {
			return
		}
	}
}

// find returns the object as the mirror has it.
func (m *mirror) find(n name) (object, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	o, ok := m.objects[n]
	return o, ok
}

// seen is find, and whether the objects are known at all.
func (m *mirror) seen(n name) (o object, found, known bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	o, found = m.objects[n]
	return o, found, m.objects != nil
}

// isBuried tells whether the API server said that the object of this UID was deleted, a while ago at most.
func (m *mirror) isBuried(uid string) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.buried.has(uid)
}

// fresh refuses when the objects were known once, but nothing was heard about them for too long.
func (m *mirror) fresh() error {
	heard := m.heard.Load()
	if heard == nil {
		return nil // nothing is known, so each is read live
	}
	if silent := m.now().Sub(*heard); silent > m.maxStale {
		return refusal.New(refusal.KubernetesStale, "the watch on %s has been silent for %v, at most %v are allowed", m.kind, silent.Round(time.Second), m.maxStale)
	}
	return nil
}

func (m *mirror) ready() error {
	if m.heard.Load() == nil {
		return m.last.get()
	}
	return m.fresh()
}

func (m *mirror) list(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
	m.relisting.Store(true)
	got, err := m.api.clients().core.Get().Resource(m.kind.String()).VersionedParams(&options, metav1.ParameterCodec).Do(ctx).Get()
	m.note(ctx, err)
	return got, err
}

// watch has the server end each watch within half of maxStale, so that a cluster where nothing happens is heard of in
// time even from a server that sends no bookmarks. What a watch says is noted, bookmarks too.
func (m *mirror) watch(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	m.relisting.Store(options.SendInitialEvents != nil && *options.SendInitialEvents)
	options.Watch = true
	most := int64(m.maxStale / time.Second / 2)
	if options.TimeoutSeconds == nil || *options.TimeoutSeconds > most {
		options.TimeoutSeconds = &most
	}
	w, err := m.api.clients().core.Get().Resource(m.kind.String()).VersionedParams(&options, metav1.ParameterCodec).Watch(ctx)
	m.note(ctx, err)
	if err != nil {
		return nil, err
	}
	m.hear()
	return watch.Filter(w, func(e watch.Event) (watch.Event, bool) {
		if e.Type != watch.Error {
			m.hear()
		}
		return e, true
	}), nil
}

func (m *mirror) hear() {
	if m.relisting.Load() {
		return
	}
	now := m.now()
	m.heard.Store(&now)
}

func (m *mirror) note(ctx context.Context, err error) {
	if err != nil && ctx.Err() == nil {
		m.api.doubt()
	}
	switch {
	case ctx.Err() != nil:
	case err == nil:
		if m.last.set(nil) {
			m.log.Info("watching", "objects", m.kind.String())
		}
	case m.last.set(fault("watching "+m.kind.String(), err)):
		m.log.Warn("the watch broke; it is tried again", "objects", m.kind.String(), "error", err)
	}
}

// Add is the reflector's: an object that is new, or that it saw before.
func (m *mirror) Add(obj any) error {
	n, o, err := stripped(obj, *m.round.Load())
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.objects != nil {
		m.index(n, o)
		m.objects[n] = o
	}
	return nil
}

// index notes a pod's UID, in place of that of the pod which had the name before; m.mu is held.
func (m *mirror) index(n name, o object) {
	if m.kind != pods {
		return
	}
	if before, ok := m.objects[n]; ok && before.uid != o.uid {
		delete(m.byUID, before.uid)
	}
	m.byUID[o.uid] = n
}

// named is the pod of a UID, as the mirror has it.
func (m *mirror) named(uid string) (name, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n, ok := m.byUID[uid]
	return n, ok
}

// Update is the reflector's.
func (m *mirror) Update(obj any) error { return m.Add(obj) }

// Delete is the reflector's.
func (m *mirror) Delete(obj any) error {
	n, o, err := stripped(obj, attestor.Wants{})
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.objects, n)
	delete(m.byUID, o.uid)
	m.buried.add(o.uid, m.now())
	return nil
}

// Replace is the reflector's: these are all.
func (m *mirror) Replace(list []any, _ string) error {
	objects := make(map[name]object, len(list))
	for _, obj := range list {
		n, o, err := stripped(obj, *m.round.Load())
		if err != nil {
			return err
		}
		objects[n] = o
	}
	m.mu.Lock()
	m.objects, m.byUID = objects, map[string]name{}
	for n, o := range objects {
		m.index(n, o)
	}
	m.mu.Unlock()
	m.relisting.Store(false)
	m.hear()
	return nil
}

// Resync is the reflector's; there is nobody to tell again.
func (m *mirror) Resync() error { return nil }

// Transformer strips objects while a list is still gathered.
func (m *mirror) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) { return strip(obj, *m.round.Load()) }
}

// strip drops what is not used of an object, which is nearly all of a pod.
func strip(obj any, w attestor.Wants) (any, error) {
	switch o := obj.(type) {
	case *corev1.Pod:
		p := &corev1.Pod{
			ObjectMeta: bare(&o.ObjectMeta), Status: corev1.PodStatus{Phase: o.Status.Phase},
			Spec: corev1.PodSpec{NodeName: o.Spec.NodeName, ServiceAccountName: o.Spec.ServiceAccountName},
		}
		if w.PodLabels {
			p.Labels = o.Labels
		}
		if w.PodAnnotations {
			p.Annotations = o.Annotations
		}
		return p, nil
	case *corev1.Node:
		return &corev1.Node{ObjectMeta: bare(&o.ObjectMeta)}, nil
	case *corev1.ServiceAccount:
		return &corev1.ServiceAccount{ObjectMeta: bare(&o.ObjectMeta)}, nil
	case *corev1.Namespace:
		n := &corev1.Namespace{ObjectMeta: bare(&o.ObjectMeta)}
		if w.NamespaceLabels {
			n.Labels = o.Labels
		}
		return n, nil
	}
	return obj, nil // a tombstone, which holds no more than a name
}

func bare(m *metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion, DeletionTimestamp: m.DeletionTimestamp,
		CreationTimestamp: m.CreationTimestamp,
	}
}
