package rollout_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"math/big"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// anchor makes a certificate of somebody else's: a root, but for what change makes of it. by signs; nil: its own key.
func anchor(t *testing.T, by *ecdsa.PrivateKey, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "Another Root"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	if change != nil {
		change(c)
	}
	if by == nil {
		by = key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return c
}

// anchors makes roots of one key; nil: a new one.
func anchors(t *testing.T, key crypto.Signer, n int64) (roots []*x509.Certificate) {
	t.Helper()
	if key == nil {
		var err error
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n {
		c := &x509.Certificate{SerialNumber: big.NewInt(i + 1), Subject: pkix.Name{CommonName: "Twin"}, IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		if c, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		roots = append(roots, c)
	}
	return roots
}

func TestAnAnchorComesAndGoes(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	root, second := anchor(t, nil, nil), anchor(t, nil, nil)
	ids := []string{ca.RootID(root), ca.RootID(second)}
	first, _ := h.trust.Bundle()
	added, err := h.operator.TrustRoots(t.Context(), []*x509.Certificate{root, root, second})
	h.must(err)
	bundle, _ := h.trust.Bundle()
	if !slices.Equal(added, ids) || len(h.trusted()) != 3 || sequenceOf(bundle) != sequenceOf(first)+1 {
		t.Errorf("added %v, trusted %v, sequence %d after %d", added, h.trusted(), sequenceOf(bundle), sequenceOf(first))
	}
	if added, err := h.operator.TrustRoots(t.Context(), []*x509.Certificate{root}); err != nil || len(added) != 0 || len(h.trusted()) != 3 {
		t.Errorf("again: %v, %v", added, err)
	}
	v, err := h.operator.View(t.Context())
	h.must(err)
	if i := slices.IndexFunc(v.Roots, func(r rollout.RootView) bool { return r.ID == ids[0] }); i < 0 || v.Roots[i].State != "trusted" || v.Roots[i].Line != nil {
		t.Errorf("view %+v", v.Roots)
	}
	h.must(h.operator.RemoveRoot(t.Context(), ids[0]))
	if slices.Contains(h.trusted(), ids[0]) || len(h.trusted()) != 2 {
		t.Errorf("trusted are %v", h.trusted())
	}
	if err := h.operator.RemoveRoot(t.Context(), ids[0]); err == nil || !strings.Contains(err.Error(), "certctl ca status") {
		t.Errorf("a root that is not there: %v", err)
	}
}

func TestWhatIsNoAnchor(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	h.must(err)
	lines, _ := h.auth.Lines()
	before := h.trusted()
	good := anchor(t, nil, nil)
	var many []*x509.Certificate
	for range 64 {
		many = append(many, anchor(t, nil, nil))
	}
	for name, roots := range map[string][]*x509.Certificate{
		"nothing":              nil,
		"signed by another":    {good, anchor(t, other, nil)},
		"a leaf":               {good, anchor(t, nil, func(c *x509.Certificate) { c.IsCA = false })},
		"an intermediate":      {good, lines[0].Status().Chain[0]},
		"ended":                {good, anchor(t, nil, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })},
		"may not sign":         {good, anchor(t, nil, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature })},
		"more than are of use": many,
	} {
		if added, err := h.operator.TrustRoots(t.Context(), roots); err == nil {
			t.Errorf("%s was taken: %v", name, added)
		}
		if got := h.trusted(); !slices.Equal(got, before) {
			t.Fatalf("%s: trusted are %v", name, got)
		}
	}
}

func TestARootThatIsNeededStays(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.agents.unconfirmed = []string{"agent-1"}
	defer h.run()()
	first := h.issue("web")
	refused := func(id, why string) {
		t.Helper()
		before := h.trusted()
		if err := h.operator.RemoveRoot(t.Context(), id); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", why, err)
		}
		if got := h.trusted(); !slices.Equal(got, before) {
			t.Errorf("trusted are %v", got)
		}
	}
	refused(first, "signs")
	// Nothing signs under it, but what was signed is alive.
	held := anchor(t, nil, nil)
	_, err := h.operator.TrustRoots(t.Context(), []*x509.Certificate{held})
	h.must(err)
	id := ca.RootID(held)
	sum, err := hex.DecodeString(id)
	h.must(err)
	h.must(h.ledger.Append(t.Context(), ca.LedgerEntry{
		Serial: []byte{0x7f, 1}, ID: "spiffe://mesh.test/ns/a/sa/old", Profile: "workload", Root: sum, AuthorityKeyID: []byte{1}, TBSDigest: make([]byte, 32),
		IssuedAt: time.Now(), NotAfter: time.Now().Add(time.Second), Evidence: []byte(`{}`),
	}))
	refused(id, "1 SVIDs under the root")
	// A rollout needs both of its roots, whoever signs.
	r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{})
	h.must(err)
	h.at(rotation.StepPublished)
	refused(r.New.ID, "certctl ca abort")
	refused(r.Old.ID, "certctl ca abort")
	h.agents.confirm()
	h.at(rotation.StepOut)
	refused(r.New.ID, "signs")
	h.eventually("the end of what lived under it", func() bool { return h.operator.RemoveRoot(t.Context(), id) == nil })
}

// A rollout finds its root in the trust bundle, or puts it there, and nobody takes it away behind that.
func TestARootIsNotRemovedUnderARollout(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.agents.unconfirmed = []string{"agent-1"}
	made, err := h.upstream.NewIssuer(t.Context())
	h.must(err)
	id := ca.RootID(made.Root)
	for range 100 {
		_, err := h.operator.TrustRoots(t.Context(), []*x509.Certificate{made.Root}) // where it was removed below
		h.must(err)
		removed := make(chan error, 1)
		go func() { removed <- h.operator.RemoveRoot(t.Context(), id) }()
		_, err = h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: made.Ref})
		h.must(err)
		h.roller.Move(t.Context())
		<-removed
		if step := h.step(); step != rotation.StepPublished || !slices.Contains(h.trusted(), id) {
			t.Fatalf("%s, and trusted are %v", step, h.trusted())
		}
		_, err = h.operator.Abort(t.Context(), "test")
		h.must(err)
		for h.roller.Move(t.Context()) {
		}
	}
}

// A root that was trusted before a rollout to it stays trusted where that is aborted: certificates under it may live that this
// CA's ledger does not know. One that came by the rollout leaves.
func TestAbortLeavesWhatWasTrustedBefore(t *testing.T) {
	t.Parallel()
	for _, when := range []string{"before", "amid", "after the abort", "never"} {
		for _, canary := range []int{0, 50} {
			h := newHouse(t)
			defer h.run()()
			made, err := h.upstream.NewIssuer(t.Context())
			h.must(err)
			id := ca.RootID(made.Root)
			imported := func(now string) {
				if now == when {
					h.eventually("the import", func() bool { // but while it is being taken out
						_, err := h.operator.TrustRoots(t.Context(), []*x509.Certificate{made.Root})
						return err == nil
					})
				}
			}
			imported("before")
			h.agents.unconfirmed = []string{"agent-1"}
			_, err = h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: made.Ref, Canary: canary})
			h.must(err)
			h.at(rotation.StepPublished)
			if canary > 0 {
				h.agents.confirm()
				h.at(rotation.StepCanary)
			}
			imported("amid")
			r, err := h.operator.Abort(t.Context(), "test")
			h.must(err)
			imported("after the abort")
			if want := when != "never"; r.Spares() != (want && when != "after the abort") {
				t.Errorf("%s, canary %d: %+v", when, canary, r)
			}
			h.at(rotation.StepOut)
			if got, want := slices.Contains(h.trusted(), id), when != "never"; got != want {
				t.Errorf("imported %s, canary %d: trusted %v, want %v", when, canary, got, want)
			}
			if when == "never" {
				continue
			}
			// Tainted it leaves all the same.
			_, err = h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: 20 * time.Second, Tainted: id})
			h.must(err)
			h.eventually("the tainted root's leaving", func() bool { return !slices.Contains(h.trusted(), id) })
		}
	}
}

// An import of a root that goes would be done with the rollout: it is refused, with what leads out, and nothing of it is done.
func TestARootThatGoesIsNotImported(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var held atomic.Bool
	held.Store(true)
	h.journal.before = func(s rotation.Step) error {
		if held.Load() && s == rotation.StepOut {
			return errors.New("not yet")
		}
		return nil
	}
	h.stop()
	h.open()
	defer h.run()()
	first := h.rootsOf(h.trusted()...)
	h.agents.unconfirmed = []string{"agent-1"}
	r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{})
	h.must(err)
	refused := func(want string) {
		t.Helper()
		all := slices.Concat([]*x509.Certificate{anchor(t, nil, nil)}, h.rootsOf(r.New.ID), first)
		before := h.trusted()
		added, err := h.operator.TrustRoots(t.Context(), all)
		if err == nil || !strings.Contains(err.Error(), want) || len(added) > 0 {
			t.Errorf("imported: %v, %v", added, err)
		}
		now, _, err := h.store.Rollout(t.Context())
		h.must(err)
		if !slices.Equal(h.trusted(), before) || now.Trusted {
			t.Errorf("something was done: trusted are %v, %+v", h.trusted(), now)
		}
	}
	h.at(rotation.StepPublished)
	refused("`certctl ca abort` keeps it")
	h.agents.confirm()
	h.at(rotation.StepLeaving)
	h.eventually("its leaving", func() bool { return !slices.Contains(h.trusted(), r.Old.ID) })
	refused("is being taken out of the trust bundle: try again when it is out")
	held.Store(false)
	h.at(rotation.StepOut)
	added, err := h.operator.TrustRoots(t.Context(), first)
	if err != nil || !slices.Equal(added, []string{r.Old.ID}) || !slices.Contains(h.trusted(), r.Old.ID) {
		t.Errorf("when it is out: %v, %v", added, err)
	}
}

// The configuration names the root that a rollout brings in: an abort leaves that trusted.
func TestAbortLeavesWhatIsConfigured(t *testing.T) {
	t.Parallel()
	for _, named := range []bool{true, false} {
		h := newHouse(t)
		h.agents.unconfirmed = []string{"agent-1"}
		r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{})
		h.must(err)
		h.must(h.operator.Settle(t.Context(), h.rootsOf(r.Old.ID)...)) // which leaves, whoever names it
		if named {
			h.must(h.operator.Settle(t.Context(), h.rootsOf(r.New.ID)...))
		}
		h.roller.Move(t.Context())
		h.must(second(h.operator.Abort(t.Context(), "test")))
		for h.roller.Move(t.Context()) {
		}
		if h.step() != rotation.StepOut || slices.Contains(h.trusted(), r.New.ID) != named {
			t.Errorf("named %v: %s, trusted are %v", named, h.step(), h.trusted())
		}
	}
}

// rootsOf are the upstream's roots of these IDs.
func (h *house) rootsOf(ids ...string) (roots []*x509.Certificate) {
	h.t.Helper()
	issuers, err := h.upstream.Issuers(h.t.Context())
	h.must(err)
	for _, i := range issuers {
		if slices.Contains(ids, ca.RootID(i.Root)) {
			roots = append(roots, i.Root)
		}
	}
	return roots
}

// kept has the bundle trust a root for what it signed by a journal that a backup took the place of.
func (h *house) kept(root *x509.Certificate, until time.Time) {
	h.t.Helper()
	h.must(h.trust.AddRoots(h.t.Context(), root))
	r, version, err := h.store.Rollout(h.t.Context())
	h.must(err)
	party := rotation.Party{ID: ca.RootID(root), Key: ca.KeyOf(root)}
	r, _ = r.Keep(nil, []rotation.Party{party}, until)
	h.must(h.store.SwapRollout(h.t.Context(), version, r))
	_, err = h.roller.Resume(h.t.Context())
	h.must(err)
}

// A root that is kept leaves by itself, unless somebody wants it: by an import, or in the configuration. Tainted, it has a
// bound, and what it signed is renewed before.
func TestARootThatIsKept(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		left time.Duration
		then func(*house, *x509.Certificate)
		in   bool
	}{
		"its time is over": {-time.Second, func(*house, *x509.Certificate) {}, false},
		"imported": {-time.Second, func(h *house, root *x509.Certificate) {
			_, err := h.operator.TrustRoots(h.t.Context(), []*x509.Certificate{root})
			h.must(err)
		}, true},
		"configured": {-time.Second, func(h *house, root *x509.Certificate) { h.must(h.operator.Settle(h.t.Context(), root)) }, true},
		"tainted": {time.Hour, func(h *house, root *x509.Certificate) {
			r := h.taint(ca.RootID(root))
			if by := time.Until(r.Behind[0].By); h.agents.orders() != 1 || by <= 0 || by > bound {
				h.t.Errorf("%d orders; it leaves in %s", h.agents.orders(), by)
			}
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			root := anchor(t, nil, nil)
			h.kept(root, time.Now().Add(c.left))
			c.then(h, root)
			for h.roller.Move(t.Context()) {
			}
			if in := slices.Contains(h.trusted(), ca.RootID(root)); in != c.in {
				t.Errorf("it is trusted: %v", in)
			}
		})
	}
}
