package kubernetes

import (
	"context"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"

	"github.com/meshca/meshca/api/refusal"
)

// How often it is looked at what the CA's account may do: also the beat in which an API server that is away is found
// to be back where no request comes.
const (
	rightsPeriod = time.Minute
	rightsRetry  = 5 * time.Second
)

// watchRights asks the API server from time to time whether it lets us do what attestation needs, until ctx ends.
func (c *Cluster) watchRights(ctx context.Context) error {
	for {
		wait := rightsPeriod
		err := c.askRights(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			wait = rightsRetry
		}
		if c.rights.set(err) {
			if err != nil {
				c.log.Warn("the cluster's API server does not serve what attestation needs", "error", err)
			} else {
				c.log.Info("the cluster's API server serves what attestation needs")
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

func (c *Cluster) askRights(ctx context.Context) error {
	need := make([]authorizationv1.ResourceAttributes, 0, kinds+1)
	for k := range kinds {
		need = append(need, authorizationv1.ResourceAttributes{Verb: "get", Resource: k.String()})
	}
	if c.mode == TokenReview {
		need = append(need, authorizationv1.ResourceAttributes{Verb: "create", Group: "authentication.k8s.io", Resource: "tokenreviews"})
	}
	for _, n := range need {
		may, err := c.api.may(ctx, n)
		if err != nil {
			return err
		}
		if !may {
			return refusal.New(refusal.KubernetesForbidden, "the CA's account may not %s %s", n.Verb, n.Resource)
		}
	}
	return nil
}

func (a *api) may(ctx context.Context, what authorizationv1.ResourceAttributes) (bool, error) {
	ask := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &what}}
	var answer authorizationv1.SelfSubjectAccessReview
	err := a.call(ctx, laneKnown, "rights", func(ctx context.Context, c *clients) error {
		return c.authorization.Post().Resource("selfsubjectaccessreviews").Body(ask).MaxRetries(0).Do(ctx).Into(&answer)
	})
	return answer.Status.Allowed, err
}
