package kubernetes

import (
	"context"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// methodVouched is what evidence says that no token stands behind.
const methodVouched = "kubernetes/nodeVouched"

// Vouch finds out whose a pod is that an agent names without showing its token, whole or by its UID alone: the cluster
// itself must know that pod, by UID. On which node it runs is in the evidence, for whoever knows from which node the agent
// asks; without that the evidence proves nothing. The pod must live, as a token's must.
func (c *Cluster) Vouch(ctx context.Context, p attestor.PodRef) (attestor.Evidence, error) {
	ev := attestor.Evidence{Vouched: true, Method: methodVouched, PodName: kept(p.Name), PodUID: kept(p.UID)}
	// 1. Names that can be.
	byUID := p.Namespace == "" && p.Name == ""
	id, err := attestor.NewIdentity(c.name, p.Namespace, "unknown")
	switch {
	case byUID: // its name is looked up below
	case err != nil:
		return ev, refusal.New(refusal.RequestMalformed, "no namespace can be called %s", quoted(p.Namespace)).On("pod.namespace")
	case !validName(p.Name):
		return ev, refusal.New(refusal.RequestMalformed, "no pod can be called %s", quoted(p.Name)).On("pod.name")
	}
	switch {
	case ev.PodUID == "":
		return ev, refusal.New(refusal.RequestMalformed, "the pod is named without its UID").On("pod.uid")
	case !c.live:
		return ev, refusal.New(refusal.NodeVouchedNotAllowed, "cluster %s has liveness: none, so that no pod of it is known", c.name)
	}
	for _, m := range c.mirrors {
		if err := m.fresh(); err != nil {
			return ev, err
		}
	}
	if byUID {
		n, err := c.nameByUID(ctx, p)
		if err != nil {
			return ev, err
		}
		ev.PodName = n.name
		if id, err = attestor.NewIdentity(c.name, n.namespace, "unknown"); err != nil {
			return ev, refusal.New(refusal.PodGone, "the API server names no namespace of the pod: %w", err).On("pod.uid")
		}
	}
	ev.Identity = id
	// 2. The pod, as the cluster knows it: its account is its own word for nothing, the API server set it.
	w := c.wants.Value()
	account, err := c.accountOf(ctx, &ev, w)
	if err != nil {
		ev.Identity = attestor.Identity{}
		return ev, err
	}
	ev.Identity, ev.ServiceAccountUID = account.id, account.uid
	// 3. What it stands on: namespace and node. The pod and the account were judged as they were found.
	if err := c.judgeAll(ctx, laneKnown, &ev, w, []kind{namespaces, nodes}); err != nil {
		return ev, err
	}
	ev.Proven = true
	return ev, nil
}

// account is a service account as it is now.
type account struct {
	id  attestor.Identity
	uid string
}

func (c *Cluster) accountOf(ctx context.Context, ev *attestor.Evidence, w attestor.Wants) (account, error) {
	now := c.now()
	pod, err := c.look(ctx, pods, nameOf(pods, ev), w, func(o object, found bool) *refusal.Error { return judgePod(ev, o, found, now) })
	if err != nil {
		return account{}, err
	}
	gather(pods, ev, &pod, w)
	id, err := attestor.NewIdentity(c.name, ev.Identity.Namespace(), pod.account)
	if err != nil { // a mirror of a static pod has none
		return account{}, refusal.New(refusal.ServiceAccountGone, "pod %s has no service account", nameOf(pods, ev)).On("spec.serviceAccountName")
	}
	n := name{id.Namespace(), id.ServiceAccount()}
	// A token names its account's UID. A pod does not, but cannot be older than the account that it was made for. Both times
	// are in whole seconds, and one apply makes both objects within one. So an account that was deleted and made anew in the
	// second of the pod's creation is taken for the pod's: nothing tells them apart, for UIDs have no order and an object's
	// version is that of its last change. The API server is no stricter: it gives such a pod tokens of the new account.
	found, err := c.look(ctx, serviceAccounts, n, w, func(o object, found bool) *refusal.Error {
		switch {
		case !found || passed(o.deletion, now):
			return refusal.New(refusal.ServiceAccountGone, "service account %s %s", n, goneOr(found, "was deleted")).On("spec.serviceAccountName")
		case o.created.After(pod.created):
			return refusal.New(refusal.ServiceAccountGone, "service account %s is another one now: it was made at %s, after the pod", n, o.created.UTC().Format(time.RFC3339)).
				On("spec.serviceAccountName")
		}
		return nil
	})
	return account{id, found.uid}, err
}

// look finds one object by the watch or, where that does not settle it, by one live read.
func (c *Cluster) look(ctx context.Context, k kind, n name, w attestor.Wants, judged func(o object, found bool) *refusal.Error) (object, error) {
	if c.mirrors != nil {
		o, found := c.mirrors[k].find(n)
		if judged(o, found) == nil && gather(k, &attestor.Evidence{}, &o, w) {
			return o, nil
		}
	}
	o, found, err := c.api.get(ctx, laneKnown, k, n, w)
	if err != nil {
		return object{}, err
	}
	return o, nilOr(judged(o, found))
}
