package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func trustOn(t *testing.T, store BundleStore, roots []*x509.Certificate, anchors ...*x509.Certificate) (*Trust, error) {
	t.Helper()
	return NewTrust(t.Context(), TrustConfig{TrustDomain: testDomain, Store: store, Roots: roots, Anchors: anchors})
}

func TestFirstStartMakesTheBundle(t *testing.T) {
	store := &memory{}
	root, anchor := newRoot(t, "root", time.Hour).root, newRoot(t, "anchor", time.Hour).root
	now := uint64(time.Now().Unix())
	trust, err := trustOn(t, store, []*x509.Certificate{root}, anchor)
	if err != nil {
		t.Fatal(err)
	}
	b, stale := trust.Bundle()
	if sequence(b) < now || !b.HasX509Authority(root) || !b.HasX509Authority(anchor) || store.bundle.Sequence != sequence(b) {
		t.Errorf("sequence %d, %d roots, stored %d", sequence(b), len(b.X509Authorities()), store.bundle.Sequence)
	}
	// What is stored is what a relying party reads.
	read, err := spiffebundle.Parse(testDomain, store.bundle.JSON)
	if err != nil || !read.Equal(b) {
		t.Errorf("stored %v, %v", read, err)
	}
	select {
	case <-stale:
		t.Error("stale from the start")
	default:
	}
}

// Agents go by the sequence alone: where a CA is made anew, on an empty store with another root, that must be higher.
func TestACAThatWasMadeAnewIsNewer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before, anew := &memory{}, &memory{}
		trust, err := trustOn(t, before, []*x509.Certificate{newRoot(t, "root", time.Hour).root})
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			time.Sleep(time.Minute)
			if err := trust.AddRoots(t.Context(), newRoot(t, "another", time.Hour).root); err != nil {
				t.Fatal(err)
			}
		}
		if before.changes() != 3 {
			t.Errorf("three changes made %d of the first sequence", before.changes())
		}
		if _, err := trustOn(t, anew, []*x509.Certificate{newRoot(t, "anew", time.Hour).root}); err != nil {
			t.Fatal(err)
		}
		if anew.bundle.Sequence <= before.bundle.Sequence {
			t.Errorf("the CA that was made anew begins at %d, the one before was at %d", anew.bundle.Sequence, before.bundle.Sequence)
		}
	})
}

// A ledger and a root that serve two trust domains would prove nothing about either.
func TestATrustDomainCannotBeRenamed(t *testing.T) {
	other := spiffeid.RequireTrustDomainFromString("other.test")
	store, root := &memory{}, newRoot(t, "root", time.Hour).root
	if _, err := trustOn(t, store, []*x509.Certificate{root}); err != nil {
		t.Fatal(err)
	}
	before := string(store.bundle.JSON)
	_, err := NewTrust(t.Context(), TrustConfig{TrustDomain: other, Store: store, Roots: []*x509.Certificate{root}})
	if !errors.Is(err, ErrTrustDomain) || !strings.Contains(err.Error(), `"other.test"`) || !strings.Contains(err.Error(), testDomain.Name()) {
		t.Errorf("a store of %s: %v", testDomain, err)
	}
	if string(store.bundle.JSON) != before {
		t.Error("the store was changed")
	}
	named := *root
	named.URIs = []*url.URL{testDomain.ID().URL()}
	if _, err := trustOn(t, &memory{}, []*x509.Certificate{&named}); err != nil {
		t.Errorf("a root of the trust domain: %v", err)
	}
	named.URIs = []*url.URL{other.ID().URL()}
	for name, c := range map[string]TrustConfig{
		"the upstream's root": {Roots: []*x509.Certificate{&named}},
		"an anchor":           {Roots: []*x509.Certificate{root}, Anchors: []*x509.Certificate{&named}},
	} {
		c.TrustDomain, c.Store = testDomain, &memory{}
		if _, err := NewTrust(t.Context(), c); !errors.Is(err, ErrTrustDomain) {
			t.Errorf("%s with the SPIFFE ID of %s: %v", name, other, err)
		}
	}
}

func TestLaterStarts(t *testing.T) {
	root, other, third := newRoot(t, "root", time.Hour).root, newRoot(t, "other", time.Hour).root, newRoot(t, "third", time.Hour).root
	start := func(t *testing.T) *memory {
		store := &memory{}
		if _, err := trustOn(t, store, []*x509.Certificate{root}); err != nil {
			t.Fatal(err)
		}
		return store
	}
	t.Run("the same root", func(t *testing.T) {
		store := start(t)
		trust, err := trustOn(t, store, []*x509.Certificate{root})
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := trust.Bundle(); sequence(b) != store.first || len(b.X509Authorities()) != 1 {
			t.Errorf("sequence %d, %d roots", sequence(b), len(b.X509Authorities()))
		}
	})
	t.Run("another root", func(t *testing.T) {
		store := start(t)
		_, err := trustOn(t, store, []*x509.Certificate{other})
		if !errors.Is(err, ErrRootUnknown) || !strings.Contains(err.Error(), "certctl ca rotate root --issuer") || strings.Contains(err.Error(), "anchor") {
			t.Errorf("got %v", err)
		}
		if store.changes() != 0 {
			t.Error("the bundle changed")
		}
	})
	t.Run("another root, named as an anchor in the same step", func(t *testing.T) {
		// It would sign before anyone holds it.
		store := start(t)
		if _, err := trustOn(t, store, []*x509.Certificate{other}, other); !errors.Is(err, ErrRootUnknown) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("one after the other", func(t *testing.T) {
		store := start(t)
		trust, err := trustOn(t, store, []*x509.Certificate{root}, other)
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := trust.Bundle(); sequence(b) != store.first+1 || !b.HasX509Authority(other) {
			t.Errorf("sequence %d", sequence(b))
		}
		if _, err := trustOn(t, store, []*x509.Certificate{other}); err != nil {
			t.Error(err)
		}
	})
	t.Run("the upstream has one more", func(t *testing.T) {
		store := start(t)
		trust, err := trustOn(t, store, []*x509.Certificate{root, third})
		if err != nil {
			t.Fatal(err)
		}
		b, _ := trust.Bundle()
		if sequence(b) != store.first || b.HasX509Authority(third) {
			t.Error("it is not just listed")
		}
	})
	t.Run("the named one is not known any more, and another one appeared", func(t *testing.T) {
		store := start(t)
		trust, err := NewTrust(t.Context(), TrustConfig{TrustDomain: testDomain, Store: store, Others: []*x509.Certificate{third}})
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := trust.Bundle(); sequence(b) != store.first || b.HasX509Authority(third) {
			t.Error("the bundle changed")
		}
	})
	t.Run("the named one was replaced, and has ended", func(t *testing.T) {
		store := start(t)
		trust, err := trustOn(t, store, []*x509.Certificate{root}, other)
		if err != nil {
			t.Fatal(err)
		}
		if err := trust.RemoveRoot(t.Context(), RootID(root)); err != nil {
			t.Fatal(err)
		}
		ended := newRoot(t, "root", -time.Minute).root
		known := TrustConfig{TrustDomain: testDomain, Store: store, Roots: []*x509.Certificate{ended}, Others: []*x509.Certificate{other}}
		if trust, err = NewTrust(t.Context(), known); err != nil {
			t.Fatal(err)
		}
		if b, _ := trust.Bundle(); b.HasX509Authority(ended) || !b.HasX509Authority(other) {
			t.Error("the bundle changed")
		}
		// Trust begins with none that has ended, and what an operator names beside the upstream is to be good.
		if _, err := trustOn(t, &memory{}, []*x509.Certificate{ended}); !errors.Is(err, errRootEnded) {
			t.Errorf("a first start: %v", err)
		}
		known.Anchors = []*x509.Certificate{ended}
		if _, err := NewTrust(t.Context(), known); !errors.Is(err, errRootEnded) {
			t.Errorf("an anchor: %v", err)
		}
	})
}

func TestAddRoots(t *testing.T) {
	root, other := newRoot(t, "root", time.Hour).root, newRoot(t, "other", time.Hour).root
	store := &memory{}
	trust, err := trustOn(t, store, []*x509.Certificate{root})
	if err != nil {
		t.Fatal(err)
	}
	_, stale := trust.Bundle()
	if err := trust.AddRoots(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	select {
	case <-stale:
		t.Error("a root that was there changed the bundle")
	default:
	}
	if err := trust.AddRoots(t.Context(), other, other, root); err != nil {
		t.Fatal(err)
	}
	<-stale
	if b, _ := trust.Bundle(); sequence(b) != store.first+1 || len(b.X509Authorities()) != 2 {
		t.Errorf("sequence %d with %d roots", sequence(b), len(b.X509Authorities()))
	}
}

func TestSwapFailsInPairs(t *testing.T) {
	root, other := newRoot(t, "root", time.Hour).root, newRoot(t, "other", time.Hour).root
	full := errors.New("no space left on device")
	store := &memory{}
	trust, err := trustOn(t, store, []*x509.Certificate{root})
	if err != nil {
		t.Fatal(err)
	}
	// It failed: nobody sees it.
	failing := failingSwap{store, full, false}
	trust.store = failing
	if err := trust.AddRoots(t.Context(), other); !errors.Is(err, full) {
		t.Fatalf("got %v", err)
	}
	if b, _ := trust.Bundle(); sequence(b) != store.first || store.changes() != 0 {
		t.Errorf("shows %d, stored %d", sequence(b), store.bundle.Sequence)
	}
	// It failed after it had taken effect: nobody is told yet, the next call finds it and does nothing twice.
	failing.effect = true
	trust.store = failing
	if err := trust.AddRoots(t.Context(), other); !errors.Is(err, full) || store.changes() != 1 {
		t.Fatalf("got %v, stored %d", err, store.bundle.Sequence)
	}
	trust.store = store
	if err := trust.AddRoots(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if b, _ := trust.Bundle(); sequence(b) != store.first+1 || !b.HasX509Authority(other) {
		t.Errorf("shows %d", sequence(b))
	}
}

type failingSwap struct {
	*memory
	err    error
	effect bool
}

func (f failingSwap) SwapBundle(ctx context.Context, expected uint64, next StoredBundle) error {
	if f.effect {
		if err := f.memory.SwapBundle(ctx, expected, next); err != nil {
			return err
		}
	}
	return f.err
}

func TestManyWritersOfOneBundle(t *testing.T) {
	store := &memory{}
	root := newRoot(t, "root", time.Hour).root
	var all []*Trust
	for range 4 {
		trust, err := trustOn(t, store, []*x509.Certificate{root})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, trust)
	}
	var wg sync.WaitGroup
	for _, trust := range all {
		wg.Go(func() {
			for range 3 {
				if err := trust.AddRoots(t.Context(), newRoot(t, "r", time.Hour).root); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	b, err := spiffebundle.Parse(testDomain, store.bundle.JSON)
	if err != nil || len(b.X509Authorities()) != 13 || store.changes() != 12 {
		t.Errorf("%d roots under sequence %d, %v", len(b.X509Authorities()), store.bundle.Sequence, err)
	}
}

func TestWhatCannotBeARoot(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	svid, err := h.issuer.Issue(t.Context(), workloadRequest(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]*x509.Certificate{
		"a leaf":          svid.Chain[0],
		"an intermediate": svid.Chain[1],
		"an ended root":   newRoot(t, "old", -time.Minute).root,
		"no keyCertSign":  newRoot(t, "odd", time.Hour, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }).root,
	} {
		if err := h.trust.AddRoots(t.Context(), c); err == nil {
			t.Errorf("%s became a root", name)
		}
		if _, err := trustOn(t, &memory{}, []*x509.Certificate{c}); err == nil {
			t.Errorf("%s became the first root", name)
		}
	}
	if _, err := trustOn(t, &memory{}, nil); err == nil {
		t.Error("a bundle without roots")
	}
}

func TestStoredBundleThatCannotBeRead(t *testing.T) {
	root := newRoot(t, "root", time.Hour).root
	if _, err := trustOn(t, &memory{bundle: StoredBundle{Sequence: 3, JSON: []byte("{")}}, []*x509.Certificate{root}); err == nil {
		t.Error("it was replaced silently")
	}
	if _, err := trustOn(t, &memory{before: errors.New("io")}, []*x509.Certificate{root}); err == nil {
		t.Error("a store that fails looked like an empty one")
	}
}
