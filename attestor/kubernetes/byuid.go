package kubernetes

import (
	"context"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

const (
	// listEvery lies between two lists of a node's pods at least: whatever its agent asks for, it costs the API server no more.
	listEvery = 100 * time.Millisecond
	// maxLists bounds the lists that are kept.
	maxLists = 10_000
)

// nameByUID finds the name of a pod that an agent names by its UID alone: by the watch, and what that does not know by one live
// list of the pods on the agent's node.
func (c *Cluster) nameByUID(ctx context.Context, p attestor.PodRef) (name, error) {
	if n, ok := c.watched[pods].named(p.UID); ok {
		return n, nil
	}
	if !validName(p.Node) {
		return name{}, refusal.New(refusal.NodeUnknown, "the node of the agent that names the pod is not known").On("pod.uid")
	}
	n, found, err := c.lists.find(ctx, p.Node, p.UID, c.now, func(ctx context.Context) (map[string]name, error) { return c.api.podsOn(ctx, p.Node) })
	switch {
	case err != nil:
		return name{}, err
	case !found:
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

// lists are the last lists of nodes' pods. The zero value is ready.
type lists struct {
	mu     sync.Mutex
	byNode map[string]*nodeList
}

// nodeList is one node's. Who has its turn may use the rest.
type nodeList struct {
	turn chan struct{}
	at   time.Time // when it was asked for
	pods map[string]name
}

func (l *lists) node(node string) *nodeList {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.byNode[node]
	if n != nil {
		return n
	}
	if l.byNode == nil || len(l.byNode) >= maxLists {
		l.byNode = map[string]*nodeList{} // they cost no more than a list each
	}
	n = &nodeList{turn: make(chan struct{}, 1)}
	l.byNode[node] = n
	return n
}

// find looks a UID up in the last list, and where that does not hold it in one that is asked for after this question, for all
// who ask meanwhile.
func (l *lists) find(ctx context.Context, node, uid string, now func() time.Time, ask func(context.Context) (map[string]name, error)) (n name, found bool, err error) {
	asked := now()
	list := l.node(node)
	select {
	case list.turn <- struct{}{}:
		defer func() { <-list.turn }()
	case <-ctx.Done():
		return name{}, false, ctx.Err()
	}
	if n, found = list.pods[uid]; found || list.pods != nil && !list.at.Before(asked) {
		return n, found, nil
	}
	if pause := list.at.Add(listEvery).Sub(now()); pause > 0 {
		timer := time.NewTimer(pause)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return name{}, false, ctx.Err()
		}
	}
	list.at = now()
	pods, err := ask(ctx)
	if err != nil {
		return name{}, false, err
	}
	list.pods = pods
	n, found = pods[uid]
	return n, found, nil
}
