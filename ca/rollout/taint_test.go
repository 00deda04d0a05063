package rollout_test

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.step.sm/crypto/pemutil"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

const bound = 20 * time.Second

// taint has a root go; empty: the one that signs.
func (h *house) taint(id string) rotation.Rollout {
	h.t.Helper()
	r, err := h.operator.Rotate(h.t.Context(), rollout.RotateOptions{By: "test", Within: bound, Tainted: id})
	h.must(err)
	return r
}

func (h *house) rotate(canary int) rotation.Rollout {
	h.t.Helper()
	r, err := h.operator.Rotate(h.t.Context(), rollout.RotateOptions{By: "test", Canary: canary})
	h.must(err)
	return r
}

// forbidden wants that a root cannot come back: not by a rollout, not by an import, not by itself.
func (h *house) forbidden(id string) {
	h.t.Helper()
	issuers, err := h.upstream.Issuers(h.t.Context())
	h.must(err)
	i := slices.IndexFunc(issuers, func(i ca.UpstreamIssuer) bool { return ca.RootID(i.Root) == id })
	if i < 0 {
		h.t.Fatalf("the upstream has no %s", id)
	}
	if _, err := h.operator.Rotate(h.t.Context(), rollout.RotateOptions{Issuer: issuers[i].Ref}); refusal.Of(err) != refusal.RootTainted {
		h.t.Errorf("a rollout to it: %v", err)
	}
	if _, err := h.operator.TrustRoots(h.t.Context(), []*x509.Certificate{issuers[i].Root}); refusal.Of(err) != refusal.RootTainted {
		h.t.Errorf("an import of it: %v", err)
	}
	if added, err := h.operator.TrustFound(h.t.Context(), issuers[i:i+1]); err != nil || len(added) != 0 {
		h.t.Errorf("it was found and taken: %v", err)
	}
	v, err := h.operator.View(h.t.Context())
	h.must(err)
	for _, c := range v.Candidates {
		if c.Ref == issuers[i].Ref && refusal.Of(c.Fault) != refusal.RootTainted {
			h.t.Errorf("it is offered: %v", c.Fault)
		}
	}
	if slices.Contains(h.trusted(), id) {
		h.t.Errorf("trusted are %v", h.trusted())
	}
}

func TestTheOldRootIsTaintedUnderARollout(t *testing.T) {
	t.Parallel()
	for _, step := range []rotation.Step{rotation.StepPublished, rotation.StepCanary, rotation.StepRetired} {
		t.Run(string(step), func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			canary := 0
			switch step {
			case rotation.StepPublished:
				h.agents.unconfirmed = []string{"agent that is away"}
				canary = 50
			case rotation.StepCanary:
				canary = 50
			}
			defer h.run()()
			first := h.issue("web")
			r := h.rotate(canary)
			h.at(step)
			h.issue("db")
			if tainted := h.taint(first); tainted.New != r.New || tainted.Within != bound {
				t.Errorf("it is not hastened: %+v", tainted)
			}
			h.at(rotation.StepOut)
			if by := h.issue("web"); by != r.New.ID || !slices.Equal(h.trusted(), []string{r.New.ID}) || len(h.agents.renewed) != 1 {
				t.Errorf("%s signs, trusted are %v, renewals %v", by, h.trusted(), h.agents.renewed)
			}
			h.forbidden(first)
		})
	}
}

// The root that comes in is tainted: the one before it signs again, and it is remembered beyond the next rollout and a
// restart.
func TestTheSuccessorIsTainted(t *testing.T) {
	t.Parallel()
	for _, step := range []rotation.Step{rotation.StepPublished, rotation.StepCanary, rotation.StepRetired} {
		t.Run(string(step), func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			canary, renewals := 0, 1
			switch step {
			case rotation.StepPublished:
				h.agents.unconfirmed = []string{"agent that is away"}
				renewals = 0 // it has signed nothing
			case rotation.StepCanary:
				canary = 50
			}
			defer h.run()()
			first := h.issue("web")
			r := h.rotate(canary)
			h.at(step)
			if step == rotation.StepCanary {
				h.eventually("the share", func() bool { return h.auth.Assignment().Share == canary })
			}
			for i := range 20 {
				h.issue(fmt.Sprint("w", i))
			}
			if back := h.taint(r.New.ID); !back.Aborted || back.Stays().ID != first {
				t.Errorf("it does not go back: %+v", back)
			}
			h.at(rotation.StepOut)
			if by := h.issue("web"); by != first || !slices.Equal(h.trusted(), []string{first}) || len(h.agents.renewed) != renewals {
				t.Errorf("%s signs, trusted are %v, renewals %v", by, h.trusted(), h.agents.renewed)
			}
			if lines, _ := h.auth.Lines(); len(lines) != 1 {
				t.Errorf("%d lines: the key of what is tainted is still there", len(lines))
			}
			h.agents.confirm()
			h.rotate(0)
			h.at(rotation.StepOut)
			h.forbidden(r.New.ID)
			h.stop()
			h.open()
			h.forbidden(r.New.ID)
		})
	}
}

// Both roots of a rollout are tainted: a third one follows, also in a process that comes after a kill.
func TestBothRootsAreTainted(t *testing.T) {
	t.Parallel()
	for _, step := range []rotation.Step{rotation.StepPublished, rotation.StepCanary} {
		t.Run(string(step), func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			canary := 0
			switch step {
			case rotation.StepPublished:
				h.agents.unconfirmed = []string{"agent that is away"}
			case rotation.StepCanary:
				canary = 50
			}
			stop := h.run()
			first := h.issue("web")
			r := h.rotate(canary)
			h.at(step)
			h.issue("db")
			h.taint("") // the one that signs for most: the second order finds the other one
			third := h.taint(r.New.ID)
			if third.New.ID == first || third.New.ID == r.New.ID || third.Step != rotation.StepChosen || len(third.Behind) != 1 {
				t.Errorf("no third one follows: %+v", third)
			}
			stop()
			h.stop()
			h.agents.confirm()
			h.open()
			defer h.run()()
			h.issue("web")
			h.at(rotation.StepOut)
			h.eventually("the other one's end", func() bool { return slices.Equal(h.trusted(), []string{third.New.ID}) })
			if by := h.issue("web"); by != third.New.ID {
				t.Errorf("%s signs", by)
			}
			h.forbidden(first)
			h.forbidden(r.New.ID)
		})
	}
}

// While the old root is being taken out there is no way back to it.
func TestTheRootThatSignsIsTaintedAsTheOldOneLeaves(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var mu sync.Mutex
	held := true
	h.journal.before = func(s rotation.Step) error {
		mu.Lock()
		defer mu.Unlock()
		if held && s == rotation.StepOut {
			return errors.New("not yet")
		}
		return nil
	}
	h.stop()
	h.open()
	defer h.run()()
	first := h.issue("web")
	r := h.rotate(0)
	h.at(rotation.StepLeaving)
	h.eventually("its withdrawal", func() bool { return !slices.Contains(h.trusted(), first) })
	third := h.taint("")
	if third.Old.ID != r.New.ID || third.New.ID == first {
		t.Errorf("it goes back to what has left: %+v", third)
	}
	mu.Lock()
	held = false
	mu.Unlock()
	h.at(rotation.StepOut)
	if got := h.trusted(); !slices.Equal(got, []string{third.New.ID}) {
		t.Errorf("trusted are %v", got)
	}
	h.forbidden(r.New.ID)
}

// What signs for nobody leaves at once, whatever is under way. Its key is tainted with it.
func TestAnAnchorIsTainted(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.agents.unconfirmed = []string{"agent-1"}
	defer h.run()()
	root := anchor(t, nil, nil)
	_, err := h.operator.TrustRoots(t.Context(), []*x509.Certificate{root})
	h.must(err)
	r := h.rotate(0)
	h.at(rotation.StepPublished)
	if got := h.taint(ca.RootID(root)); got.New != r.New || got.Within != 0 {
		t.Errorf("the rollout is touched: %+v", got)
	}
	h.eventually("its end", func() bool { return !slices.Contains(h.trusted(), ca.RootID(root)) })
	if h.step() != rotation.StepPublished || !slices.Contains(h.trusted(), r.New.ID) {
		t.Errorf("%s, trusted are %v", h.step(), h.trusted())
	}
	if _, err := h.operator.TrustRoots(t.Context(), []*x509.Certificate{root}); refusal.Of(err) != refusal.RootTainted {
		t.Errorf("it comes back: %v", err)
	}
	if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: bound, Tainted: "00"}); err == nil || !strings.Contains(err.Error(), "certctl ca status") {
		t.Errorf("a root that is not there: %v", err)
	}
}

func TestAKeyIsTaintedWithItsRoot(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	defer h.run()()
	twins := anchors(t, nil, 2)
	_, err := h.operator.TrustRoots(t.Context(), twins[:1])
	h.must(err)
	h.taint(ca.RootID(twins[0]))
	if _, err := h.operator.TrustRoots(t.Context(), twins[1:]); refusal.Of(err) != refusal.RootTainted || !strings.Contains(err.Error(), "its key, which the root") {
		t.Errorf("another certificate of its key: %v", err)
	}
	if rollout.Tainted(rotation.Rollout{}, twins[0]) != nil {
		t.Error("nothing was tainted")
	}
}

// An upstream that makes no roots: the emergency needs one that is there, and says so.
func TestATaintWhereNoRootCanBeMade(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.makesNone = true
	h.stop()
	h.open()
	first := h.issue("web")
	// One of the same key is no way out, by itself or by its name.
	key, err := pemutil.Read(h.files().Key)
	h.must(err)
	twin := anchors(t, key.(crypto.Signer), 1)[0]
	h.extra = []ca.UpstreamIssuer{{Ref: "twin", Root: twin, NotAfter: time.Now().Add(1000 * time.Hour)}}
	if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: bound, Issuer: "twin"}); refusal.Of(err) != refusal.RootTainted {
		t.Errorf("to another certificate of the stolen key: %v", err)
	}
	for _, dry := range []bool{true, false} {
		if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: bound, DryRun: dry}); err == nil || !strings.Contains(err.Error(), "nothing was changed") ||
			!strings.Contains(err.Error(), "name the issuer to go to with --issuer") {
			t.Errorf("no root to go to: %v", err)
		}
	}
	if h.step() != "" {
		t.Fatalf("something was changed: %s", h.step())
	}
	second, err := h.upstream.NewIssuer(t.Context())
	h.must(err)
	h.agents.unconfirmed = []string{"agent-1"}
	defer h.run()()
	_, err = h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: second.Ref})
	h.must(err)
	h.at(rotation.StepPublished)
	third, err := h.upstream.NewIssuer(t.Context())
	h.must(err)
	// Where a party can sign, another issuer is of no use, and one that is named anyway is not passed over.
	if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: bound, Issuer: third.Ref}); err == nil || !strings.Contains(err.Error(), "--issuer names another one") {
		t.Errorf("an issuer that would not be taken: %v", err)
	}
	h.taint("")
	if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: bound, Tainted: second.Ref, Issuer: first}); refusal.Of(err) != refusal.RootTainted {
		t.Errorf("back to what is tainted: %v", err)
	}
	// The only candidate that is left is not taken before somebody has named it, or trusted its root.
	if r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: bound, Tainted: second.Ref}); err == nil || !strings.Contains(err.Error(), "--issuer") ||
		!strings.Contains(err.Error(), third.Ref) {
		t.Errorf("it goes to %+v, which nobody has named: %v", r.New, err)
	}
	_, err = h.operator.TrustRoots(t.Context(), []*x509.Certificate{third.Root})
	h.must(err)
	if r := h.taint(second.Ref); r.New.ID != third.Ref {
		t.Errorf("it goes to %+v", r.New)
	}
}

// Roots that appear at the upstream are taken in where that is wanted: those that can be used, and that nobody took out.
func TestFoundRootsAreTrusted(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	defer h.run()()
	first := h.issue("web")
	found := func() (ids []string) {
		t.Helper()
		issuers, err := h.upstream.Issuers(t.Context())
		h.must(err)
		broken := ca.UpstreamIssuer{Ref: "b", Root: anchor(t, nil, nil), Fault: errors.New("no key")}
		ended := ca.UpstreamIssuer{Ref: "e", Root: anchor(t, nil, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })}
		added, err := h.operator.TrustFound(t.Context(), append(issuers, broken, ca.UpstreamIssuer{Ref: "n"}, ended))
		if err == nil || !strings.Contains(err.Error(), "ended") {
			t.Errorf("a root that has ended: %v", err)
		}
		for _, i := range added {
			ids = append(ids, ca.RootID(i.Root))
		}
		return ids
	}
	if ids := found(); len(ids) != 0 {
		t.Errorf("taken in: %v", ids)
	}
	made, err := h.upstream.NewIssuer(t.Context())
	h.must(err)
	second := ca.RootID(made.Root)
	if ids := found(); !slices.Equal(ids, []string{second}) || !slices.Equal(h.trusted(), []string{first, second}) {
		t.Errorf("taken in: %v, trusted %v", ids, h.trusted())
	}
	if by := h.issue("web"); by != first {
		t.Errorf("%s signs", by)
	}
	// What a command took out stays out, and so does what a rollout took out.
	h.must(h.operator.RemoveRoot(t.Context(), second))
	if ids := found(); len(ids) != 0 {
		t.Errorf("what was removed is taken in: %v", ids)
	}
	_, err = h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: second})
	h.must(err)
	h.at(rotation.StepRetired)
	if ids := found(); len(ids) != 0 {
		t.Errorf("amid a rollout: %v", ids)
	}
	h.at(rotation.StepOut)
	if ids := found(); len(ids) != 0 || !slices.Equal(h.trusted(), []string{second}) {
		t.Errorf("what has retired is taken in: %v, trusted %v", ids, h.trusted())
	}
}
