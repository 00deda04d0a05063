//go:build cgo

package softhsm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/keyring"
	"github.com/meshca/meshca/ca/lint"
	"github.com/meshca/meshca/ca/pkcs11"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/test/softhsm"
)

// opened is a new token in this process, and the modules that reach it. SoftHSM reads its configuration when it is loaded.
func opened(t *testing.T) (*softhsm.Token, *pkcs11.Modules) {
	t.Helper()
	softhsm.Need(t)
	dir, err := os.MkdirTemp("", "hsm")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	store, err := softhsm.NewStore(dir)
	must(t, err)
	t.Setenv("SOFTHSM2_CONF", store.Config)
	m := pkcs11.New()
	t.Cleanup(func() { must(t, m.Close()) })
	return store.NewToken(t, "inside"), m
}

func parsed(t *testing.T, uri string) pkcs11.URI {
	t.Helper()
	u, err := pkcs11.Parse(uri)
	must(t, err)
	return u
}

func TestKeysInAToken(t *testing.T) {
	token, m := opened(t)
	u := parsed(t, token.URI("root"))
	if _, err := m.Find(u); err == nil || !strings.Contains(err.Error(), "no such key") {
		t.Errorf("found what is not there: %v", err)
	}
	k, err := m.Make(u)
	must(t, err)
	digest := sha256.Sum256([]byte("x"))
	pub, ok := k.Public().(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		t.Fatalf("the key is %T", k.Public())
	}
	signs := func(k *pkcs11.Key) {
		t.Helper()
		if sig, err := k.Sign(rand.Reader, digest[:], nil); err != nil || !ecdsa.VerifyASN1(pub, digest[:], sig) {
			t.Errorf("signed %x, %v", sig, err)
		}
	}
	signs(k)
	if _, err := m.Make(u); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second key of that name: %v", err)
	}
	found, err := m.Find(u)
	must(t, err)
	signs(found)
	signs(m.Known(k.URI(), pub))
	if err := m.Known(u, softKey(t)).Ready(); err != nil {
		t.Error(err)
	}
	if _, err := m.Known(u, softKey(t)).Sign(rand.Reader, digest[:], nil); err == nil || !strings.Contains(err.Error(), "another one than was certified") {
		t.Errorf("another key of that name: %v", err)
	}
	signs(k)
	must(t, m.Destroy(k.URI()))
	must(t, m.Destroy(k.URI()))
	if n := len(token.Objects(t)); n != 0 {
		t.Errorf("%d objects are left", n)
	}
	if _, err := k.Sign(rand.Reader, digest[:], nil); err == nil || !errors.Is(k.Ready(), ca.ErrKeyLost) {
		t.Errorf("a key that is gone: %v, ready %v", err, k.Ready())
	}
}

func softKey(t *testing.T) *ecdsa.PublicKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return &k.PublicKey
}

func TestAWrongPINIsNotTriedTwice(t *testing.T) {
	token, m := opened(t)
	u := parsed(t, token.URI(""))
	right, err := os.ReadFile(token.PinFile)
	must(t, err)
	must(t, os.WriteFile(token.PinFile, []byte("0000"), 0o600))
	if err := m.Probe(u); err == nil || !strings.Contains(err.Error(), "CKR_PIN_INCORRECT") {
		t.Fatalf("got %v", err)
	}
	time.Sleep(4 * time.Second) // sooner, nothing is tried
	if err := m.Probe(u); err == nil || !strings.Contains(err.Error(), "not tried again") {
		t.Errorf("got %v", err)
	}
	must(t, os.WriteFile(token.PinFile, right, 0o600))
	must(t, m.Probe(u))
	absent := u
	absent.Token = "absent"
	if err := m.Probe(absent); err == nil || !strings.Contains(err.Error(), "pkcs11:token=absent") {
		t.Errorf("a token that is not there: %v", err)
	}
	// Its failure finalized the library under the other one, which is opened anew.
	must(t, m.Probe(u))
}

// signer is a CA whose intermediates are in a token, below a root in files.
type signer struct {
	line   *ca.Line
	issuer *ca.Issuer
	log    bytes.Buffer
}

func newSigner(t *testing.T, dir string, token *softhsm.Token, m *pkcs11.Modules) *signer {
	t.Helper()
	s := &signer{}
	files := disk.Files{Cert: filepath.Join(dir, "root.crt"), Key: filepath.Join(dir, "root.key")}
	if _, err := disk.Create(files, disk.CreateOptions{TrustDomain: domain}); err != nil && !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	up, err := disk.Open(disk.Options{Root: files})
	must(t, err)
	issuers, err := up.Issuers(t.Context())
	must(t, err)
	store, err := bolt.Open(filepath.Join(t.TempDir(), "meshca.db"))
	must(t, err)
	t.Cleanup(func() { _ = store.Close() })
	trust, err := ca.NewTrust(t.Context(), ca.TrustConfig{TrustDomain: domain, Store: store, Roots: []*x509.Certificate{issuers[0].Root}})
	must(t, err)
	log := slog.New(slog.NewTextHandler(&s.log, nil))
	ring, err := keyring.Open(keyring.Config{Dir: filepath.Join(dir, "kept"), Token: parsed(t, token.URI("ca")), Modules: m, Log: log})
	must(t, err)
	root := ca.Root{ID: issuers[0].Ref, Ref: issuers[0].Ref}
	must(t, ring.Retain(root.ID))
	auth, err := ca.NewAuthority(ca.AuthorityConfig{TrustDomain: domain, Upstream: up, Trust: trust, Keys: ring, Log: log})
	must(t, err)
	auth.Assign(ca.Assignment{Root: root})
	lines, _ := auth.Lines()
	s.line = lines[0]
	ledger, err := ca.NewSequencer(ca.SequencerConfig{Store: store})
	must(t, err)
	t.Cleanup(ledger.Close)
	linter, err := lint.New(lint.Options{})
	must(t, err)
	s.issuer, err = ca.NewIssuer(ca.IssuerConfig{Authority: auth, Ledger: ledger, Linter: linter, Profiles: ca.Profiles(0)})
	must(t, err)
	return s
}

// Issuances that are in hand while the intermediate is replaced end under the old key, which is destroyed behind them.
func TestNothingFailsWhileTheIntermediateIsReplaced(t *testing.T) {
	token, m := opened(t)
	s := newSigner(t, t.TempDir(), token, m)
	_, err := s.line.Renew(t.Context())
	must(t, err)
	var done sync.WaitGroup
	stop := make(chan struct{})
	issued := make([]int, 4)
	for i := range issued {
		pub := softKey(t)
		done.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := s.issuer.Issue(t.Context(), ca.Request{
					Grant: ca.Grant{ID: spiffeid.RequireFromPath(domain, "/ns/shop/sa/cart")}, PublicKey: pub, Evidence: []byte(`{"method":"test"}`),
				}); err != nil {
					t.Errorf("in the middle of it: %v", err)
					return
				}
				issued[i]++
			}
		})
	}
	for range 20 {
		_, err := s.line.Renew(t.Context())
		must(t, err)
	}
	close(stop)
	done.Wait()
	for _, n := range issued {
		if n < 5 {
			t.Errorf("issued %v: too little to meet a renewal", issued)
		}
	}
	if n := len(token.Objects(t)); n != 2 {
		t.Errorf("%d objects are in the token, want those of one key", n)
	}
	if s.log.Len() > 0 {
		t.Errorf("log: %s", s.log.String())
	}
}

// What a crash leaves in the token goes at the next start, and nothing of others does.
func TestOrphansAreDestroyed(t *testing.T) {
	token, m := opened(t)
	dir := t.TempDir()
	foreign, err := m.Make(parsed(t, token.URI("ca-of-somebody-else")))
	must(t, err)
	s := newSigner(t, dir, token, m)
	_, err = s.line.Renew(t.Context())
	must(t, err)
	serial := s.line.Status().Chain[0].SerialNumber

	// It dies with a key that has no certificate yet, and with one whose successor has come.
	ring, err := keyring.Open(keyring.Config{Dir: filepath.Join(dir, "kept"), Token: parsed(t, token.URI("ca")), Modules: m})
	must(t, err)
	if _, err := ring.Make(s.line.Root().ID); err != nil {
		t.Fatal(err)
	}
	if n := len(token.Objects(t)); n != 6 {
		t.Fatalf("%d objects, want a foreign key, one in use and an orphan", n)
	}
	s = newSigner(t, dir, token, m)
	_, err = s.line.Renew(t.Context())
	must(t, err)
	if n := len(token.Objects(t)); n != 4 || s.line.Status().Chain[0].SerialNumber.Cmp(serial) != 0 {
		t.Errorf("%d objects, serial %x of %x", n, s.line.Status().Chain[0].SerialNumber, serial)
	}

	// What was stolen signs until its successor has come, and no start takes it up again.
	must(t, s.line.Forget())
	if err := s.line.Ready(); err != nil {
		t.Errorf("forgotten: %v", err)
	}
	s = newSigner(t, dir, token, m)
	if n := len(token.Objects(t)); n != 2 {
		t.Errorf("behind a start there are %d objects, want the foreign key's", n)
	}
	_, err = s.line.Renew(t.Context())
	must(t, err)
	if s.line.Status().Chain[0].SerialNumber.Cmp(serial) == 0 {
		t.Error("the stolen intermediate is in use")
	}

	digest := sha256.Sum256([]byte("x"))
	if _, err := foreign.Sign(rand.Reader, digest[:], nil); err != nil {
		t.Errorf("the key of somebody else: %v", err)
	}
}

// A key that somebody deleted in the token is gone for good: its intermediate is replaced before half-life.
func TestALostKeyIsReplaced(t *testing.T) {
	token, m := opened(t)
	dir := t.TempDir()
	s := newSigner(t, dir, token, m)
	_, err := s.line.Renew(t.Context())
	must(t, err)
	data, err := os.ReadFile(filepath.Join(dir, "kept", s.line.Root().ID+".json"))
	must(t, err)
	var record struct{ Kept struct{ URI string } }
	must(t, json.Unmarshal(data, &record))
	if bytes.Contains(data, []byte("PRIVATE")) || bytes.Contains(data, []byte("4711")) {
		t.Errorf("a key or a PIN: %s", data)
	}
	u, err := parsed(t, token.URI("")).Resolve(record.Kept.URI)
	must(t, err)
	must(t, m.Destroy(u))
	issue := func() error {
		_, err := s.issuer.Issue(t.Context(), ca.Request{
			Grant: ca.Grant{ID: spiffeid.RequireFromPath(domain, "/ns/shop/sa/cart")}, PublicKey: softKey(t), Evidence: []byte(`{"method":"test"}`),
		})
		return err
	}
	if err := issue(); err == nil || !errors.Is(s.line.Ready(), ca.ErrKeyLost) {
		t.Fatalf("issued with %v, ready %v", err, s.line.Ready())
	}
	s.line.Mend()
	select {
	case <-s.line.Wake():
	default:
		t.Fatal("nobody is told to replace it")
	}
	_, err = s.line.Renew(t.Context())
	must(t, err)
	must(t, issue())
	must(t, s.line.Ready())
}

// A key that cannot be destroyed when it should be is destroyed later.
func TestAKeyIsDestroyedWhenItsTokenIsBack(t *testing.T) {
	token, m := opened(t)
	s := newSigner(t, t.TempDir(), token, m)
	_, err := s.line.Renew(t.Context())
	must(t, err)
	must(t, m.Close())
	must(t, os.Rename(token.PinFile, token.PinFile+".away"))
	s.line.Expired()
	if !strings.Contains(s.log.String(), "could not be destroyed; it is tried again") || len(token.Objects(t)) != 2 {
		t.Errorf("%d objects, log: %s", len(token.Objects(t)), s.log.String())
	}
	must(t, os.Rename(token.PinFile+".away", token.PinFile))
	_, err = s.line.Renew(t.Context())
	must(t, err)
	if n := len(token.Objects(t)); n != 2 {
		t.Errorf("%d objects, want those of the new key", n)
	}
}
