package ca_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/lint"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/ca/upstream/disk"
)

var domain = spiffeid.RequireTrustDomainFromString("example.org")

// house is a CA on real parts: a root and a store on disk.
type house struct {
	store  *bolt.Store
	ledger *ca.Sequencer
	trust  *ca.Trust
	auth   *ca.Authority
	issuer *ca.Issuer
	close  func()
}

func open(t testing.TB, dir string) *house {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	files := disk.Files{Cert: filepath.Join(dir, "root.crt"), Key: filepath.Join(dir, "root.key")}
	if _, err := os.Stat(files.Key); errors.Is(err, fs.ErrNotExist) {
		_, err := disk.Create(files, disk.CreateOptions{TrustDomain: domain})
		must(err)
	}
	upstream, err := disk.Open(disk.Options{Root: files})
	must(err)
	issuers, err := upstream.Issuers(t.Context())
	must(err)
	named := issuers[0]
	var h house
	h.store, err = bolt.Open(filepath.Join(dir, "meshca.db"))
	must(err)
	h.ledger, err = ca.NewSequencer(ca.SequencerConfig{Store: h.store})
	must(err)
	h.close = sync.OnceFunc(func() { h.ledger.Close(); must(h.store.Close()) })
	t.Cleanup(h.close)
	h.trust, err = ca.NewTrust(t.Context(), ca.TrustConfig{TrustDomain: domain, Store: h.store, Roots: []*x509.Certificate{named.Root}})
	must(err)
	h.auth, err = ca.NewAuthority(ca.AuthorityConfig{TrustDomain: domain, Upstream: upstream, Trust: h.trust})
	must(err)
	root := ca.Root{ID: ca.RootID(named.Root), Ref: named.Ref}
	_, err = h.auth.Prepare(root).Renew(t.Context())
	must(err)
	h.auth.Assign(ca.Assignment{Root: root})
	linter, err := lint.New(lint.Options{})
	must(err)
	h.issuer, err = ca.NewIssuer(ca.IssuerConfig{Authority: h.auth, Ledger: h.ledger, Linter: linter, Profiles: ca.Profiles(0)})
	must(err)
	return &h
}

func request(t testing.TB) ca.Request {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return ca.Request{
		Grant:     ca.Grant{ID: spiffeid.RequireFromPath(domain, "/ns/shop/sa/cart")},
		PublicKey: key.Public(),
		Evidence:  evidence,
	}
}

// TestRestart has many callers at once, and a CA that is stopped and started again on the same files.
func TestRestart(t *testing.T) {
	dir := t.TempDir()
	issued := map[[32]byte]bool{}
	var sequence uint64
	for run := range 3 {
		h := open(t, dir)
		bundle, _ := h.trust.Bundle()
		if n, _ := bundle.SequenceNumber(); run > 0 && n != sequence {
			t.Errorf("a restart took the bundle from sequence %d to %d", sequence, n)
		} else {
			sequence = n
		}
		var (
			mu sync.Mutex
			wg sync.WaitGroup
		)
		for range 40 {
			wg.Go(func() {
				svid, err := h.issuer.Issue(t.Context(), request(t))
				if err != nil {
					t.Error(err)
					return
				}
				if _, _, err := x509svid.Verify(svid.Chain, bundle.X509Bundle()); err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				issued[sha256.Sum256(svid.Chain[0].RawTBSCertificate)] = true
			})
		}
		wg.Wait()
		h.close()
	}
	if len(issued) != 120 {
		t.Fatalf("%d different SVIDs of 120", len(issued))
	}
	h := open(t, dir)
	entries := 0
	err := h.store.ScanLedger(context.Background(), func(e ca.LedgerEntry) (bool, error) {
		entries++
		if !issued[[32]byte(e.TBSDigest)] || !bytes.Equal(e.Evidence, evidence) {
			t.Errorf("entry %d stands for nothing that was issued", e.Index)
		}
		return true, nil
	})
	if err != nil || entries != len(issued) {
		t.Errorf("%d entries for %d SVIDs: %v", entries, len(issued), err)
	}
}

// TestStoreGone takes the store away under a running CA.
func TestStoreGone(t *testing.T) {
	h := open(t, t.TempDir())
	if _, err := h.issuer.Issue(t.Context(), request(t)); err != nil {
		t.Fatal(err)
	}
	if err := h.store.Close(); err != nil {
		t.Fatal(err)
	}
	svid, err := h.issuer.Issue(t.Context(), request(t))
	if refusal.Of(err) != refusal.LedgerUnavailable || len(svid.Chain) != 0 {
		t.Errorf("%v, %v", svid, err)
	}
}

// TestForeignRoot starts a CA on the state of another one.
func TestForeignRoot(t *testing.T) {
	dir := t.TempDir()
	open(t, dir).close()
	files := disk.Files{Cert: filepath.Join(t.TempDir(), "root.crt"), Key: filepath.Join(t.TempDir(), "root.key")}
	if _, err := disk.Create(files, disk.CreateOptions{TrustDomain: domain}); err != nil {
		t.Fatal(err)
	}
	upstream, err := disk.Open(disk.Options{Root: files})
	if err != nil {
		t.Fatal(err)
	}
	issuers, err := upstream.Issuers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	store, err := bolt.Open(filepath.Join(dir, "meshca.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if _, err := ca.NewTrust(t.Context(), ca.TrustConfig{TrustDomain: domain, Store: store, Roots: []*x509.Certificate{issuers[0].Root}}); !errors.Is(err, ca.ErrRootUnknown) {
		t.Errorf("got %v", err)
	}
}
