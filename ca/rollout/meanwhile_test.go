package rollout_test

import (
	"context"
	"crypto"
	"errors"
	"slices"
	"sync/atomic"
	"testing"

	"go.step.sm/crypto/pemutil"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// slowly is an upstream that makes no roots, and answers one question only when something else is done.
type slowly struct {
	ca.Upstream
	meanwhile atomic.Pointer[func()]
}

func (s *slowly) Issuers(ctx context.Context) ([]ca.UpstreamIssuer, error) {
	if do := s.meanwhile.Swap(nil); do != nil {
		(*do)()
	}
	return s.Upstream.Issuers(ctx)
}

// onSlowly is a house whose upstream has three roots, the first of which signs. meanwhile says what the next question waits for.
func onSlowly(t *testing.T) (h *house, ids []string, meanwhile func(func())) {
	t.Helper()
	h, s := newHouse(t), &slowly{}
	h.stop()
	h.wrap = func(u ca.Upstream) ca.Upstream {
		s.Upstream = u
		return s
	}
	h.open()
	ids = h.trusted()
	for range 2 {
		made, err := h.upstream.NewIssuer(t.Context())
		h.must(err)
		ids = append(ids, ca.RootID(made.Root))
	}
	t.Cleanup(h.run())
	return h, ids, func(do func()) { s.meanwhile.Store(&do) }
}

// While the upstream is asked for who can follow, the rollout goes on: the root that comes signs for all by then. It is
// replaced, as it is where that is known from the start.
func TestATaintAsARolloutEnds(t *testing.T) {
	t.Parallel()
	h, ids, meanwhile := onSlowly(t)
	h.agents.unconfirmed = []string{"agent that is away"}
	_, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: bound, Issuer: ids[1]})
	h.must(err)
	h.at(rotation.StepPublished)
	meanwhile(func() {
		h.agents.confirm()
		h.at(rotation.StepOut)
		h.issue("web")
	})
	r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: bound, Tainted: ids[1], Issuer: ids[2]})
	h.must(err)
	if r.Old.ID != ids[1] || r.New.ID != ids[2] || len(r.Behind) > 0 || !slices.Contains(h.trusted(), ids[1]) {
		t.Errorf("the root %s, which signs, is tainted, and it is %+v; trusted are %v", ids[1], r, h.trusted())
	}
	h.at(rotation.StepRetired)
	if by := h.issue("web"); by != ids[2] || h.agents.orders() != 1 {
		t.Errorf("%s signs, and %d orders to renew were given", by, h.agents.orders())
	}
}

// What an order rests on is not so any more as it is entered: it is refused, and changes nothing.
func TestAnOrderThatWasOvertaken(t *testing.T) {
	t.Parallel()
	h, ids, meanwhile := onSlowly(t)
	to := func(id string) func() {
		return func() {
			_, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: id})
			h.must(err)
			h.at(rotation.StepOut)
		}
	}
	overtaken := func(what string, x rollout.RotateOptions) {
		t.Helper()
		r, err := h.operator.Rotate(t.Context(), x)
		h.must(second(h.roller.Resume(t.Context())))
		if !errors.Is(err, rotation.ErrMeanwhile) || h.operator.Standing().Rollout.Active() || len(h.operator.Standing().Rollout.Taints) > 0 {
			t.Errorf("%s: %+v, %v", what, r, err)
		}
	}
	meanwhile(to(ids[1]))
	overtaken("a rotation, and another root signs", rollout.RotateOptions{Issuer: ids[2]})
	meanwhile(to(ids[2]))
	overtaken("a taint of the one that signs, and that is another one", rollout.RotateOptions{Within: bound, Issuer: ids[0]})
	if by := h.issue("web"); by != ids[2] {
		t.Errorf("%s signs", by)
	}
}

// A root of the tainted key that comes in while the upstream is asked leaves with it.
func TestATwinComesInAsItsKeyIsTainted(t *testing.T) {
	t.Parallel()
	h, ids, meanwhile := onSlowly(t)
	key, err := pemutil.Read(h.files().Key)
	h.must(err)
	twin := anchors(t, key.(crypto.Signer), 1)
	meanwhile(func() {
		_, err := h.operator.TrustRoots(t.Context(), twin)
		h.must(err)
	})
	_, err = h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: bound, Issuer: ids[1]})
	h.must(err)
	h.eventually("its leaving", func() bool { return !slices.Contains(h.trusted(), ca.RootID(twin[0])) })
}
