package kubernetes

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// listedFor is for how long a list of a node's pods answers for UIDs that it does not hold: whatever an agent asks for, it
// costs the API server one list of its own node in that time.
const listedFor = time.Second

// nameByUID finds the name of a pod that an agent names by its UID alone: by the watch, and what that does not know by one live
// list of the pods on the agent's node.
func (c *Cluster) nameByUID(ctx context.Context, p attestor.PodRef) (name, error) {
	if n, ok := c.watched[pods].named(p.UID); ok {
		return n, nil
	}
	if !validName(p.Node) {
		return name{}, refusal.New(refusal.NodeUnknown, "the node of the agent that names the pod is not known").On("pod.uid")
	}
	found, err := c.lists.of(ctx, p.Node, c.now, func(ctx context.Context) (map[string]name, error) { return c.api.podsOn(ctx, p.Node) })
	if err != nil {
		return name{}, err
	}
	n, ok := found[p.UID]
	if !ok {
		return name{}, refusal.New(refusal.PodGone, "no pod on node %s has the UID %s (a static pod has another one at the API server)", p.Node, quoted(p.UID)).On("pod.uid")
	}
	return n, nil
}

// podsOn lists the pods on a node, by UID.
func (a *api) podsOn(ctx context.Context, node string) (map[string]name, error) {
	found := map[string]name{}
	options := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("spec.nodeName", node).String()}
	err := a.call(ctx, laneKnown, pods.String(), func(ctx context.Context, c *clients) error {
		got, err := c.core.Get().Resource(pods.String()).VersionedParams(&options, metav1.ParameterCodec).MaxRetries(0).Do(ctx).Get()
		if err != nil {
			return err
		}
		list, ok := got.(*corev1.PodList)
		if !ok {
			return fmt.Errorf("asked for a list of pods, it answered with a %T", got)
		}
		for i := range list.Items {
			if p := &list.Items[i]; p.Spec.NodeName == node {
				found[string(p.UID)] = name{p.Namespace, p.Name}
			}
		}
		return nil
	})
	return found, err
}

// lists are the last lists of nodes' pods, for a moment. The zero value is ready.
type lists struct {
	flight singleflight.Group

	mu   sync.Mutex
	last map[string]listed
}

type listed struct {
	at   time.Time // when it was asked for
	pods map[string]name
}

// of returns the list of a node: the last one, if it is young, or else a new one, asked for once for all who want it.
func (l *lists) of(ctx context.Context, node string, now func() time.Time, ask func(context.Context) (map[string]name, error)) (map[string]name, error) {
	l.mu.Lock()
	last, ok := l.last[node]
	l.mu.Unlock()
	if ok && now().Sub(last.at) < listedFor {
		return last.pods, nil
	}
	// The asking is shared, so it does not end with the patience of whoever came first; the call has a bound of its own.
	done := l.flight.DoChan(node, func() (any, error) {
		at := now()
		found, err := ask(context.WithoutCancel(ctx))
		if err == nil {
			l.keep(node, listed{at, found})
		}
		return found, err
	})
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case r := <-done:
		if r.Err != nil {
			return nil, r.Err
		}
		found, _ := r.Val.(map[string]name)
		return found, nil
	}
}

// keep notes a list, and forgets those that answer for nothing any more.
func (l *lists) keep(node string, fresh listed) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for n, old := range l.last {
		if fresh.at.Sub(old.at) >= listedFor {
			delete(l.last, n)
		}
	}
	if l.last == nil {
		l.last = map[string]listed{}
	}
	l.last[node] = fresh
}
