package kubernetes

import (
	"context"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// Confirm holds what an object of the cluster's API says of a pod against the cluster itself: pod, service account and
// node must live, each the very one by its UID, the pod must run as that account and on that node, and its namespace must
// not be going. Nothing else is believed, so it does not matter whether admission looked at the object too.
//
// claimed has the identity, all names and UIDs, and a method of its own; it comes back proven, with the facts that are
// wanted. What refuses is a *refusal.Error, or ctx's own error, and the evidence is then not proven.
func (c *Cluster) Confirm(ctx context.Context, claimed attestor.Evidence) (attestor.Evidence, error) {
	ev := claimed
	ev.Proven, ev.Vouched, ev.Facts = false, false, nil
	// 1. Names that can be.
	if err := c.claimable(&ev); err != nil {
		return ev, err
	}
	for _, m := range c.mirrors {
		if err := m.fresh(); err != nil {
			return ev, err
		}
	}
	// 2. The pod, its node and its account. A watch that does not bear the claim out may be behind: the API server is asked.
	w, now := c.wants.Value(), c.now()
	pod, err := c.look(ctx, pods, nameOf(pods, &ev), w, func(o object, found bool) *refusal.Error {
		if err := judgePod(&ev, o, found, now); err != nil {
			return err
		}
		if o.account != ev.Identity.ServiceAccount() {
			return refusal.New(refusal.ClaimUntrue, "pod %s runs as service account %s, and %s is claimed", nameOf(pods, &ev), quoted(o.account), ev.Identity.ServiceAccount()).
				On("spec.serviceAccountName")
		}
		return nil
	})
	if err != nil {
		return ev, err
	}
	gather(pods, &ev, &pod, w)
	// 3. What it stands on.
	if err := c.judgeAll(ctx, laneKnown, &ev, w, []kind{namespaces, serviceAccounts, nodes}); err != nil {
		return ev, err
	}
	ev.Proven = true
	return ev, nil
}

// claimable refuses what can be nobody's, before it costs a call.
func (c *Cluster) claimable(ev *attestor.Evidence) error {
	missing := func(what, field string) error {
		return refusal.New(refusal.RequestMalformed, "the claim names its %s not at all, or as none can be called", what).On(field)
	}
	switch {
	case !c.live:
		return refusal.New(refusal.KubernetesForbidden, "cluster %s has liveness: none, so that no pod of it is known", c.name)
	case ev.Identity.IsZero() || ev.ServiceAccountUID == "" || bounded(ev.ServiceAccountUID) != ev.ServiceAccountUID:
		return missing("service account", "serviceAccount")
	case ev.Identity.Cluster() != c.name:
		return refusal.New(refusal.ClusterMismatch, "the claim is of cluster %q, this is %q", ev.Identity.Cluster(), c.name)
	case !validName(ev.PodName) || ev.PodUID == "" || bounded(ev.PodUID) != ev.PodUID:
		return missing("pod", "pod")
	case !validName(ev.NodeName) || ev.NodeUID == "" || bounded(ev.NodeUID) != ev.NodeUID:
		return missing("node", "node")
	}
	return nil
}
