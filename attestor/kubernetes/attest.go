package kubernetes

import (
	"context"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// Attest proves whose token it is, and that what it is bound to lives. The token must be for this audience and no other.
//
// What refuses is a *refusal.Error, or ctx's own error. The evidence is then what was known so far: see
// attestor.Evidence.Proven.
func (c *Cluster) Attest(ctx context.Context, token attestor.Token, audience string) (attestor.Evidence, error) {
	return c.attest(ctx, laneOf(audience), token, audience)
}

// AttestDirect is Attest for a workload's token that nobody known brings: what it costs the API server is bounded as
// strangers' calls are.
func (c *Cluster) AttestDirect(ctx context.Context, token attestor.Token) (attestor.Evidence, error) {
	return c.attest(ctx, laneStrangers, token, attestor.WorkloadAudience)
}

func (c *Cluster) attest(ctx context.Context, l lane, token attestor.Token, audience string) (attestor.Evidence, error) {
	unread := attestor.Evidence{Method: c.method()}
	// 1. Its form: what cannot be a service-account token costs nobody a call or a signature.
	signed, refused := parseJWS(token.Secret())
	if refused != nil {
		return unread, refused
	}
	// 2. Its claims, and its proof. A token is asked about only if what it says of itself would do.
	said, refused := parseClaims(signed.payload)
	if refused != nil {
		return unread, refused
	}
	ev := said.evidence(c.name, c.method())
	var err error
	if c.mode == JWKS {
		err = c.proveByKeys(ctx, &signed, &said, audience, &ev)
	} else {
		err = c.proveByReview(ctx, l, token, &said, audience, &ev)
	}
	if err != nil {
		return ev, err
	}
	// 3. What it is bound to, as it is now.
	if c.live {
		var w attestor.Wants
		if audience == attestor.WorkloadAudience {
			w = c.wants.Value()
		}
		if err := c.standing(ctx, l, &ev, w); err != nil {
			return ev, err
		}
	}
	// 4. On which node: everything later rests on that.
	if ev.NodeName == "" || ev.NodeUID == "" {
		return ev, refusal.New(refusal.NodeUnknown, "the token of pod %s/%s does not name its node by name and UID", ev.Identity.Namespace(), ev.PodName).On("kubernetes.io.node")
	}
	return ev, nil
}

func (c *Cluster) method() string {
	if c.mode == JWKS {
		return "kubernetes/jwks"
	}
	return "kubernetes/tokenReview"
}

// proveByKeys verifies the signature, then what was signed.
func (c *Cluster) proveByKeys(ctx context.Context, signed *jws, said *claims, audience string, ev *attestor.Evidence) error {
	key, set, err := c.keys.find(ctx, signed.kid, ev.IssuedAt)
	if err != nil {
		return err
	}
	if !signed.verify(key) {
		return refusal.New(refusal.TokenSignature, "the signature (%s) does not verify under key %s", signed.alg, quoted(signed.kid))
	}
	ev.Proven = true
	return nilOr(said.check(set.issuer, audience, c.maxTokenAge, c.now()))
}

// proveByReview asks the API server. Expiry, age and issuer are the token's own words, which count once the API server
// stands behind the token; before that they can only refuse.
func (c *Cluster) proveByReview(ctx context.Context, l lane, token attestor.Token, said *claims, audience string, ev *attestor.Evidence) error {
	if refused := said.check(c.issuer, audience, c.maxTokenAge, c.now()); refused != nil {
		return refused
	}
	status, err := c.api.review(ctx, l, token, audience)
	if err != nil {
		return err
	}
	refused := believe(&status, said, audience, ev)
	if refused != nil && saysGone(&status) {
		// It was a good token: what became of its pod is a better answer than "rejected".
		copied := *ev
		if err := c.standing(ctx, l, &copied, attestor.Wants{}); err != nil && ctx.Err() == nil && !refusal.Of(err).Passing() {
			return err
		}
	}
	return nilOr(refused)
}

// nilOr keeps a nil *refusal.Error from becoming an error that is not nil.
func nilOr(refused *refusal.Error) error {
	if refused == nil {
		return nil
	}
	return refused
}
