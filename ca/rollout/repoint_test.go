package rollout_test

import (
	"context"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// mount is an upstream that knows roots by references of its own, which are others after an import, and that makes none.
// It lists only what is asked for beside the first.
type mount struct {
	ca.Upstream
	mu       sync.Mutex
	refs     map[string]string // of the upstream below, to the one here
	fault    error
	included []string
	asked    int // for its issuers
}

func (m *mount) ref(below string) string {
	if ref, ok := m.refs[below]; ok {
		return ref
	}
	return below
}

func (m *mount) imported(below, ref string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refs[below] = ref
}

func (m *mount) Include(names ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.included = append(m.included, names...)
}

func (m *mount) LeftOut() int { return 7 }

func (m *mount) Issuers(ctx context.Context) ([]ca.UpstreamIssuer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.asked++; ctx.Err() != nil {
		return nil, ctx.Err()
	}
	all, err := m.Upstream.Issuers(ctx)
	for n := range all {
		all[n].Ref = m.ref(all[n].Ref)
		all[n].Name, all[n].Fault = "name of "+all[n].Ref, m.fault
	}
	return slices.DeleteFunc(all, func(i ca.UpstreamIssuer) bool {
		return !i.Named && !slices.Contains(m.included, i.Ref) && !slices.Contains(m.included, i.Name)
	}), err
}

func (m *mount) SignIntermediate(ctx context.Context, ref string, r ca.IntermediateRequest) ([]*x509.Certificate, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for below, now := range m.refs {
		if now == ref {
			return m.Upstream.SignIntermediate(ctx, below, r)
		}
	}
	return nil, errors.New("unable to find PKI issuer")
}

// onMount is a house whose upstream is a mount, with the journal that the daemon has from its first start on. Its root is
// the mount's issuer "one".
func onMount(t *testing.T, dir string) (*house, *mount) {
	t.Helper()
	h := newHouseIn(t, dir)
	m := &mount{refs: map[string]string{h.auth.Assignment().Root.ID: "one"}}
	h.wrap = func(u ca.Upstream) ca.Upstream { m.Upstream = u; return m }
	h.must(h.store.SwapRollout(t.Context(), 0, rotation.Rollout{New: rotation.Party{ID: h.auth.Assignment().Root.ID, Ref: "one"}, Step: rotation.StepOut, NewShare: 100}))
	h.stop()
	h.open()
	return h, m
}

// The issuer of the root that signs is deleted, and the same root imported again: it has another reference then.
func TestAnIssuerIsImportedAgain(t *testing.T) {
	t.Parallel()
	h, m := onMount(t, t.TempDir())
	root := h.auth.Assignment().Root
	trusted, _ := h.trust.Bundle()
	m.imported(root.ID, "again")
	lines, _ := h.auth.Lines()
	if err := lines[0].RenewNow(t.Context()); err == nil {
		t.Fatal("the issuer that is gone signs")
	}
	before := lines[0].Status().Chain[0]
	if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: "again"}); err == nil {
		t.Error("a rollout of a root to itself")
	}
	for _, issuer := range []string{"one", "nobody"} {
		if to, moved, err := h.operator.Repoint(t.Context(), issuer, false); moved || err != nil {
			t.Errorf("%s: %+v, %v", issuer, to, err)
		}
	}
	m.fault = errors.New("revoked")
	if _, moved, err := h.operator.Repoint(t.Context(), "again", false); moved || err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("to one that cannot be used: %v, %v", moved, err)
	}
	m.fault = nil
	again := ca.Root{ID: root.ID, Ref: "again"}
	if to, moved, err := h.operator.Repoint(t.Context(), "again", true); !moved || err != nil || to != again || h.auth.Assignment().Root != root {
		t.Errorf("a dry run: %+v, %v, %v", to, moved, err)
	}
	if to, moved, err := h.operator.Repoint(t.Context(), "name of again", false); !moved || err != nil || to != again {
		t.Fatalf("%+v, %v, %v", to, moved, err)
	}
	if now, _ := h.auth.Lines(); len(now) != 1 || now[0] != lines[0] || now[0].Root() != again || now[0].Status().Chain[0].Equal(before) || h.auth.Assignment().Root != again {
		t.Errorf("%d lines, of %+v; %+v signs", len(now), now[0].Root(), h.auth.Assignment())
	}
	if b, _ := h.trust.Bundle(); h.issue("web") != root.ID || !slices.Equal(h.trusted(), []string{root.ID}) || sequenceOf(b) != sequenceOf(trusted) || h.step() != rotation.StepOut {
		t.Errorf("trusted are %v", h.trusted())
	}
	if _, moved, err := h.operator.Repoint(t.Context(), "again", false); moved || err != nil {
		t.Errorf("a second time: %v, %v", moved, err)
	}
	v, err := h.operator.View(t.Context())
	h.must(err)
	if v.Roots[0].Issuer != "again" || v.LeftOut != 7 || !slices.Contains(m.included, "again") {
		t.Errorf("view %+v, asked for %v", v, m.included)
	}
	// It stands in the journal.
	h.stop()
	h.open()
	lines, _ = h.auth.Lines()
	if err := lines[0].RenewNow(t.Context()); err != nil || lines[0].Root() != again {
		t.Errorf("after a restart: %v", err)
	}
}

func sequenceOf(b interface{ SequenceNumber() (uint64, bool) }) uint64 {
	n, _ := b.SequenceNumber()
	return n
}

// mute is a mount that does not sign for an issuer before its caller gives up, and tells when it is asked.
type mute struct {
	*mount
	ref   string
	asked chan struct{}
}

func (m mute) SignIntermediate(ctx context.Context, ref string, r ca.IntermediateRequest) ([]*x509.Certificate, error) {
	if ref != m.ref {
		return m.mount.SignIntermediate(ctx, ref, r)
	}
	select {
	case m.asked <- struct{}{}:
	default:
	}
	<-ctx.Done()
	return nil, ctx.Err()
}

// The issuer that a root is re-pointed to is slow to sign. An emergency does not wait for that.
func TestATaintDoesNotWaitForARepoint(t *testing.T) {
	t.Parallel()
	h, m := onMount(t, t.TempDir())
	slow := mute{m, "again", make(chan struct{}, 1)}
	h.wrap = func(u ca.Upstream) ca.Upstream { m.Upstream = u; return slow }
	h.stop()
	h.open()
	stolen := anchor(t, nil, nil)
	_, err := h.operator.TrustRoots(t.Context(), []*x509.Certificate{stolen})
	h.must(err)
	m.imported(h.auth.Assignment().Root.ID, slow.ref)
	patient, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, _, err := h.operator.Repoint(patient, slow.ref, false)
		done <- err
	}()
	<-slow.asked
	_, err = h.operator.Rotate(t.Context(), rollout.RotateOptions{By: "test", Within: bound, Tainted: ca.RootID(stolen)})
	h.must(err)
	select {
	case err := <-done:
		t.Fatalf("the taint came behind the re-point: %v", err)
	default:
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("the re-point: %v", err)
	}
}

// The same while a rollout is under way, for the root that it goes to.
func TestAnIssuerIsImportedAgainUnderARollout(t *testing.T) {
	t.Parallel()
	h, m := onMount(t, t.TempDir())
	made, err := h.upstream.NewIssuer(t.Context())
	h.must(err)
	m.imported(made.Ref, "two")
	h.agents.unconfirmed = []string{"agent-1"}
	defer h.run()()
	_, err = h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: "name of two", Canary: 50})
	h.must(err)
	h.at(rotation.StepPublished)
	m.imported(made.Ref, "again")
	if to, moved, err := h.operator.Repoint(t.Context(), "again", false); !moved || err != nil || to.ID != ca.RootID(made.Root) || h.step() != rotation.StepPublished {
		t.Errorf("%+v, %v, %v", to, moved, err)
	}
	h.agents.confirm()
	h.at(rotation.StepCanary)
	h.eventually("the share", func() bool { return h.auth.Assignment().Share == 50 })
	m.imported(made.Ref, "once more")
	if _, moved, err := h.operator.Repoint(t.Context(), "once more", false); !moved || err != nil {
		t.Errorf("%v, %v", moved, err)
	}
	h.eventually("the successor's reference", func() bool { return h.auth.Assignment().Successor.Ref == "once more" })
	_, err = h.operator.Continue(t.Context(), nil)
	h.must(err)
	h.at(rotation.StepOut)
	if by := h.issue("web"); by != ca.RootID(made.Root) || h.auth.Assignment().Root.Ref != "once more" {
		t.Errorf("%s signs: %+v", by, h.auth.Assignment())
	}
	// What has left is no party any more.
	m.imported(h.upstreamRef(), "back")
	if _, moved, err := h.operator.Repoint(t.Context(), "back", false); moved || err != nil {
		t.Errorf("a root that has left: %v, %v", moved, err)
	}
}

// upstreamRef is the reference of the root that the configuration names.
func (h *house) upstreamRef() string {
	issuers, err := h.upstream.Issuers(h.t.Context())
	h.must(err)
	return issuers[0].Ref
}

// An emergency takes the issuer that is to sign by its name, too.
func TestATaintNamesTheIssuerThatSignsThen(t *testing.T) {
	t.Parallel()
	h, m := onMount(t, t.TempDir())
	made, err := h.upstream.NewIssuer(t.Context())
	h.must(err)
	m.imported(made.Ref, "two")
	h.agents.unconfirmed = []string{"agent-1"}
	defer h.run()()
	_, err = h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: "two"})
	h.must(err)
	h.at(rotation.StepPublished)
	for _, issuer := range []string{"name of one", "nobody"} {
		if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: issuer, Within: bound}); err == nil || !strings.Contains(err.Error(), "--issuer names another one") {
			t.Errorf("%s: %v", issuer, err)
		}
	}
	r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: "name of two", Within: bound})
	h.must(err)
	if r.New.Ref != "two" || r.Within != bound {
		t.Errorf("%+v", r)
	}
}

// Where the upstream makes no roots, a rotation that names none goes to one that somebody has trusted, and to no other.
func TestACandidateIsNotTakenUnnamed(t *testing.T) {
	t.Parallel()
	h, m := onMount(t, t.TempDir())
	made, err := h.upstream.NewIssuer(t.Context())
	h.must(err)
	m.imported(made.Ref, "two")
	m.Include("two")
	for _, dry := range []bool{true, false} {
		if r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{DryRun: dry}); err == nil || !strings.Contains(err.Error(), "--issuer") || !strings.Contains(err.Error(), "two (name of two)") {
			t.Errorf("it goes to %+v: %v", r.New, err)
		}
	}
	_, err = h.operator.TrustRoots(t.Context(), []*x509.Certificate{made.Root})
	h.must(err)
	for _, dry := range []bool{true, false} {
		if r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{DryRun: dry}); err != nil || r.New.Ref != "two" {
			t.Errorf("it goes to %+v: %v", r.New, err)
		}
	}
}

// Who watches a rollout does not ask the upstream each time, and sees what it says soon enough.
func TestViewsOfARolloutShareWhatTheUpstreamSays(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		h, m := onMount(t, dir)
		made, err := h.upstream.NewIssuer(t.Context())
		h.must(err)
		m.imported(made.Ref, "two")
		h.agents.unconfirmed = []string{"agent-1"}
		asks := func(views, want int) {
			t.Helper()
			before := m.asked
			for range views {
				v, err := h.operator.View(t.Context())
				h.must(err)
				if v.LeftOut != 7 || v.UpstreamErr != nil {
					t.Errorf("%+v", v)
				}
			}
			if m.asked-before != want {
				t.Errorf("%d views asked %d times, want %d", views, m.asked-before, want)
			}
		}
		asks(3, 3) // nobody watches
		_, err = h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: "two"})
		h.must(err)
		gone, leave := context.WithCancel(t.Context())
		leave()
		if v, err := h.operator.View(gone); err == nil && v.UpstreamErr == nil {
			t.Error("who has left is told")
		}
		asks(3, 1)
		h.roller.Move(t.Context())
		asks(3, 1) // another step
		time.Sleep(29 * time.Second)
		asks(2, 0)
		time.Sleep(time.Second)
		asks(2, 1)
	})
}
