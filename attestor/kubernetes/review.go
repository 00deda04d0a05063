package kubernetes

import (
	"context"
	"fmt"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// Extras that the API server gives with a service account's user (k8s.io/apiserver/pkg/authentication/serviceaccount).
const (
	extraPodName      = "authentication.kubernetes.io/pod-name"
	extraPodUID       = "authentication.kubernetes.io/pod-uid"
	extraNodeName     = "authentication.kubernetes.io/node-name"
	extraNodeUID      = "authentication.kubernetes.io/node-uid"
	extraCredentialID = "authentication.kubernetes.io/credential-id"
)

// review asks the API server whether the token is good for the audience, and whose it is.
func (a *api) review(ctx context.Context, l lane, token attestor.Token, audience string) (authenticationv1.TokenReviewStatus, error) {
	review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token.Secret(), Audiences: []string{audience}}}
	var status authenticationv1.TokenReviewStatus
	err := a.call(ctx, l, "tokenreviews", func(ctx context.Context, c *clients) error {
		got, err := c.authentication.Post().Resource("tokenreviews").Body(review).MaxRetries(0).Do(ctx).Get()
		if err != nil {
			return err
		}
		answer, ok := got.(*authenticationv1.TokenReview)
		if !ok {
			return fmt.Errorf("asked for a TokenReview, it answered with %T", got)
		}
		status = answer.Status
		return nil
	})
	return status, err
}

// believe takes from the API server's answer what the token proves. claims are the token's own: nothing is taken from
// them, but where they say otherwise, something authenticated that is no service-account token.
func believe(s *authenticationv1.TokenReviewStatus, c *claims, audience string, ev *attestor.Evidence) *refusal.Error {
	if !s.Authenticated {
		return refusal.New(refusal.TokenRejected, "the API server says: %s", sentence(s.Error))
	}
	// A server that knows nothing of audiences answers without them, and accepts its own tokens. One that knows them tells
	// which of those that were asked about the token has: that it has no others, its claims say.
	if told := audiences(s.Audiences); !told.only(audience) {
		return refusal.New(refusal.TokenAudience, "the API server says that the token is for %s; it must be for %q alone", told, audience).On("status.audiences")
	}
	namespace, account, ok := splitSubject(s.User.Username)
	if !ok {
		return refusal.New(refusal.TokenNotServiceAccount, "the token's user is %s", quoted(s.User.Username)).On("status.user.username")
	}
	id, err := attestor.NewIdentity(ev.Identity.Cluster(), namespace, account)
	if err != nil {
		return refusal.New(refusal.TokenNotServiceAccount, "%w", err).On("status.user.username")
	}
	podName, podUID := extra(s, extraPodName), extra(s, extraPodUID)
	if podName == "" || podUID == "" {
		return refusal.New(refusal.TokenUnbound, "the API server names no pod for the token of %s/%s", namespace, account).On(extraPodName)
	}
	k := &c.Kubernetes
	if id != ev.Identity || s.User.UID != k.ServiceAccount.UID || podName != k.Pod.Name || podUID != k.Pod.UID {
		return refusal.New(refusal.TokenRejected, "what the API server says of the token (%s, pod %s) is not what the token says", id, quoted(podName))
	}
	ev.Proven = true
	ev.NodeName, ev.NodeUID = extra(s, extraNodeName), extra(s, extraNodeUID)
	if id := strings.TrimPrefix(extra(s, extraCredentialID), "JTI="); id != "" {
		ev.CredentialID = kept(id)
	}
	if (ev.NodeName != "" && !validName(ev.NodeName)) || bounded(ev.NodeUID) != ev.NodeUID {
		return refusal.New(refusal.NodeUnknown, "the API server names a node that there cannot be: %s", quoted(ev.NodeName)).On(extraNodeName)
	}
	return nil
}

// extra is the one value of an extra; several are none.
func extra(s *authenticationv1.TokenReviewStatus, key string) string {
	if v := s.User.Extra[key]; len(v) == 1 {
		return v[0]
	}
	return ""
}

// saysGone tells from an API server's answer that the signature was good, but what the token is bound to is gone. The
// text is read for no more than a better reason: it is a refusal in any case.
func saysGone(s *authenticationv1.TokenReviewStatus) bool {
	return !s.Authenticated && (strings.Contains(s.Error, "has been invalidated") || strings.Contains(s.Error, "has been deleted") ||
		strings.Contains(s.Error, "does not match") || strings.Contains(s.Error, "not found"))
}

// sentence bounds an API server's text.
func sentence(s string) string {
	const most = 300
	if s == "" {
		return "it is not authenticated"
	}
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' {
			return ' '
		}
		return r
	}, s)
}
