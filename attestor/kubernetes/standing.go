package kubernetes

import (
	"context"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// standing holds what a token is bound to against the cluster as it is now: namespace, service account, pod and node
// must live, each the very object of the token. It fills in the node where the token does not name it, and the facts that
// are wanted.
func (c *Cluster) standing(ctx context.Context, l lane, ev *attestor.Evidence, w attestor.Wants) error {
	// 1. Watches that know nothing new for too long say nothing.
	for _, m := range c.mirrors {
		if err := m.fresh(); err != nil {
			return err
		}
	}
	// 2. All that can be judged at once: the node too, if the token names it.
	todo := []kind{namespaces, serviceAccounts, pods, nodes}
	if ev.NodeName == "" {
		todo = todo[:nodes]
	}
	if err := c.judgeAll(ctx, l, ev, w, todo); err != nil {
		return err
	}
	// 3. The node that the pod's own object names, where the token did not.
	if len(todo) < int(kinds) {
		if err := c.judgeAll(ctx, l, ev, w, []kind{nodes}); err != nil {
			return err
		}
	}
	return nil
}

// judgeAll judges the objects of these kinds by the watches, and those that the watches do not settle by one live read
// each, all at once. A refusal that is final goes before one that would pass. An object that lacks what is wanted of it is
// not settled either.
func (c *Cluster) judgeAll(ctx context.Context, l lane, ev *attestor.Evidence, w attestor.Wants, todo []kind) error {
	now := c.now()
	var open [kinds]bool
	unsettled := 0
	for _, k := range todo {
		if c.mirrors != nil {
			o, found := c.mirrors[k].find(nameOf(k, ev))
			if err := judge(k, ev, o, found, now); err == nil {
				if gather(k, ev, &o, w) {
					continue
				}
			} else if err.Reason == refusal.PodFinished || c.mirrors[k].isBuried(uidOf(k, ev)) {
				return err // nothing later changes that
			}
		}
		open[k] = true
		unsettled++
	}
	if unsettled == 0 {
		return nil
	}
	var read [kinds]struct {
		object
		found bool
		err   error
	}
	var wg sync.WaitGroup
	for _, k := range todo {
		if !open[k] {
			continue
		}
		n := nameOf(k, ev)
		wg.Go(func() { read[k].object, read[k].found, read[k].err = c.api.get(ctx, l, k, n, w) })
	}
	wg.Wait()
	var passing error
	for _, k := range todo {
		switch r := &read[k]; {
		case !open[k]:
		case r.err != nil:
			if passing == nil {
				passing = r.err
			}
		default:
			if err := judge(k, ev, r.object, r.found, now); err != nil {
				return err
			}
			gather(k, ev, &r.object, w)
		}
	}
	return passing
}

// gather notes the facts that are wanted of an object, and reports whether it has them.
func gather(k kind, ev *attestor.Evidence, o *object, w attestor.Wants) bool {
	labels, annotations := k.wanted(w)
	switch {
	case labels && o.labels == nil || annotations && o.annotations == nil:
		return false
	case !labels && !annotations:
		return true
	case ev.Facts == nil:
		ev.Facts = &attestor.Facts{}
	}
	f := ev.Facts
	if k == namespaces {
		f.NamespaceLabels, f.TooLarge.NamespaceLabels = o.labels.kept, o.labels.kept == nil
		return true
	}
	if labels {
		f.PodLabels, f.TooLarge.PodLabels = o.labels.kept, o.labels.kept == nil
	}
	if annotations {
		f.PodAnnotations, f.TooLarge.PodAnnotations = o.annotations.kept, o.annotations.kept == nil
	}
	return true
}

func nameOf(k kind, ev *attestor.Evidence) name {
	switch k {
	case namespaces:
		return name{"", ev.Identity.Namespace()}
	case serviceAccounts:
		return name{ev.Identity.Namespace(), ev.Identity.ServiceAccount()}
	case pods:
		return name{ev.Identity.Namespace(), ev.PodName}
	}
	return name{"", ev.NodeName}
}

// judge says why an object, as it was found, does not bear the evidence. Of a pod and a node that do, it takes the names
// that the token left out.
func judge(k kind, ev *attestor.Evidence, o object, found bool, now time.Time) *refusal.Error {
	switch k {
	case namespaces:
		if !found || !o.deletion.IsZero() {
			return refusal.New(refusal.NamespaceGone, "namespace %s %s", ev.Identity.Namespace(), goneOr(found, "is being deleted")).On("kubernetes.io.namespace")
		}
	case serviceAccounts:
		n := nameOf(k, ev)
		switch {
		case !found || passed(o.deletion, now):
			return refusal.New(refusal.ServiceAccountGone, "service account %s %s", n, goneOr(found, "was deleted")).On("kubernetes.io.serviceaccount.name")
		case o.uid != ev.ServiceAccountUID:
			return refusal.New(refusal.ServiceAccountGone, "service account %s is another one now: its UID is %s, the token's is %s", n, o.uid, ev.ServiceAccountUID).On("kubernetes.io.serviceaccount.uid")
		}
	case pods:
		return judgePod(ev, o, found, now)
	case nodes:
		return judgeNode(ev, o, found)
	}
	return nil
}

func judgePod(ev *attestor.Evidence, o object, found bool, now time.Time) *refusal.Error {
	n := nameOf(pods, ev)
	switch {
	case !found:
		return refusal.New(refusal.PodGone, "pod %s does not exist", n).On("kubernetes.io.pod.name")
	case o.uid != ev.PodUID:
		return refusal.New(refusal.PodRecreated, "pod %s is another one now: its UID is %s, the token's is %s", n, o.uid, ev.PodUID).On("kubernetes.io.pod.uid")
	case o.phase == corev1.PodSucceeded, o.phase == corev1.PodFailed:
		return refusal.New(refusal.PodFinished, "pod %s is in phase %s", n, o.phase).On("status.phase")
	case passed(o.deletion, now):
		return refusal.New(refusal.PodFinished, "the deletion of pod %s was due %v ago", n, now.Sub(o.deletion).Round(time.Second)).On("metadata.deletionTimestamp")
	case o.node == "":
		return refusal.New(refusal.NodeUnknown, "pod %s is on no node yet", n).On("spec.nodeName")
	case ev.NodeName == "":
		ev.NodeName = o.node
	case o.node != ev.NodeName:
		return refusal.New(refusal.PodNotOnNode, "pod %s runs on node %s, its token says %s", n, o.node, ev.NodeName).On("kubernetes.io.node.name")
	}
	return nil
}

func judgeNode(ev *attestor.Evidence, o object, found bool) *refusal.Error {
	switch {
	case ev.NodeName == "":
		return refusal.New(refusal.NodeUnknown, "neither the token nor the pod names a node").On("kubernetes.io.node.name")
	case !found:
		return refusal.New(refusal.NodeGone, "node %s does not exist", ev.NodeName).On("kubernetes.io.node.name")
	case ev.NodeUID == "":
		ev.NodeUID = o.uid
	case o.uid != ev.NodeUID:
		return refusal.New(refusal.NodeGone, "node %s is another one now: its UID is %s, the token's is %s", ev.NodeName, o.uid, ev.NodeUID).On("kubernetes.io.node.uid")
	}
	return nil
}

// passed tells whether a deletion was asked for and is due. Before that a pod is terminating, and still serves.
func passed(deletion, now time.Time) bool { return !deletion.IsZero() && !now.Before(deletion) }

func goneOr(found bool, what string) string {
	if found {
		return what
	}
	return "does not exist"
}
