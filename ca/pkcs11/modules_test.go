package pkcs11

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/ca"
)

// library stands in for a PKCS #11 library with one token. A restart ends all sessions, as an HSM's does.
type library struct {
	mu       sync.Mutex
	pin      string
	down     bool
	keys     map[[2]string]*ecdsa.PrivateKey
	restarts int
	// hangs, while it is set, keeps who signs waiting, opens who opens the token, until it is closed.
	hangs, opens chan struct{}
	inside, most int // calls that wait so, now and at most
	opened       int
	logins       int
	open         int
}

// handle is one opened session of the library.
type handle struct {
	l      *library
	epoch  int
	closed bool
}

var errSession = errors.New("pkcs11: 0xB3: CKR_SESSION_HANDLE_INVALID")

// set changes what is so, and get reads it, while others use the library.
func (l *library) set(change func()) { l.mu.Lock(); defer l.mu.Unlock(); change() }

func (l *library) get(n *int) int { l.mu.Lock(); defer l.mu.Unlock(); return *n }

// wait keeps a call in the library for as long as hang says.
func (l *library) wait(hang *chan struct{}) {
	l.mu.Lock()
	until := *hang
	l.inside++
	l.most = max(l.most, l.inside)
	l.mu.Unlock()
	if until != nil {
		<-until
	}
	l.set(func() { l.inside-- })
}

func (l *library) start(_ URI, pin string) (device, error) {
	l.wait(&l.opens)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.opened++
	if l.down {
		return nil, errors.New("pkcs11: 0xE0: CKR_TOKEN_NOT_PRESENT")
	}
	l.logins++
	if pin != l.pin {
		return nil, fmt.Errorf("%w: pkcs11: 0xA0: CKR_PIN_INCORRECT", errPIN)
	}
	l.open++
	return &handle{l: l, epoch: l.restarts}, nil
}

func (h *handle) ok() error {
	if h.closed {
		panic("a closed session is used")
	}
	if h.l.down || h.epoch != h.l.restarts {
		return errSession
	}
	return nil
}

// remote is a key that signs only in the session in which it was found.
type remote struct {
	h   *handle
	key *ecdsa.PrivateKey
}

func (r remote) Public() crypto.PublicKey { return r.key.Public() }

func (r remote) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	r.h.l.wait(&r.h.l.hangs)
	r.h.l.mu.Lock()
	defer r.h.l.mu.Unlock()
	if err := r.h.ok(); err != nil {
		return nil, err
	}
	return r.key.Sign(rand, digest, opts)
}

func (h *handle) find(object, id string) (crypto.Signer, error) {
	h.l.mu.Lock()
	defer h.l.mu.Unlock()
	if err := h.ok(); err != nil {
		return nil, err
	}
	for name, k := range h.l.keys {
		if (object == "" || name[0] == object) && (id == "" || name[1] == id) {
			return remote{h, k}, nil
		}
	}
	return nil, errNoKey
}

func (h *handle) make(object, id string) (crypto.Signer, error) {
	h.l.mu.Lock()
	defer h.l.mu.Unlock()
	if err := h.ok(); err != nil {
		return nil, err
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	h.l.keys[[2]string{object, id}] = k
	return remote{h, k}, err
}

func (h *handle) destroy(object, id string) error {
	h.l.mu.Lock()
	defer h.l.mu.Unlock()
	if err := h.ok(); err != nil {
		return err
	}
	delete(h.l.keys, [2]string{object, id})
	return nil
}

func (h *handle) close() error {
	h.l.mu.Lock()
	defer h.l.mu.Unlock()
	h.closed = true
	h.l.open--
	return errors.New("pkcs11: 0x190: CKR_CRYPTOKI_NOT_INITIALIZED")
}

func newLibrary(t *testing.T) (*library, *Modules, URI) {
	t.Helper()
	l := &library{pin: "1234", keys: map[[2]string]*ecdsa.PrivateKey{}}
	pin := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(pin, []byte("1234\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := newModules(l.start)
	t.Cleanup(func() {
		if _ = m.Close(); l.open != 0 {
			t.Errorf("%d sessions were not closed", l.open)
		}
	})
	return l, m, URI{Token: "t", Module: "/m.so", PinSource: pin, Object: "root"}
}

func signs(k *Key) error {
	digest := sha256.Sum256([]byte("to be signed"))
	sig, err := k.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err == nil && !ecdsa.VerifyASN1(k.Public().(*ecdsa.PublicKey), digest[:], sig) {
		return errors.New("the signature does not verify")
	}
	return err
}

func TestAKeyLivesInItsToken(t *testing.T) {
	l, m, u := newLibrary(t)
	k, err := m.Make(u)
	if err != nil || signs(k) != nil || k.URI().ID != IDOf("root") {
		t.Fatalf("%+v, %v, %v", k, err, signs(k))
	}
	if _, err := m.Make(u); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "never overwritten") {
		t.Errorf("a second one of that name: %v", err)
	}
	found, err := m.Find(u)
	if err != nil || signs(found) != nil || !found.Public().(*ecdsa.PublicKey).Equal(k.Public()) {
		t.Errorf("found %+v, %v", found, err)
	}
	if l.logins != 1 {
		t.Errorf("%d logins for one token", l.logins)
	}
	if err := m.Destroy(u); err == nil {
		t.Error("a key was destroyed by half of its name")
	}
	if err := errors.Join(m.Destroy(k.URI()), m.Destroy(k.URI())); err != nil || len(l.keys) != 0 {
		t.Errorf("%v, %d keys are left", err, len(l.keys))
	}
	if err := signs(k); !errors.Is(err, errNoKey) || !errors.Is(k.Ready(), ca.ErrKeyLost) {
		t.Errorf("a key that is gone: %v, %v", err, k.Ready())
	}
	if _, err := m.Find(u); !errors.Is(err, errNoKey) {
		t.Errorf("found what is gone: %v", err)
	}
	if _, err := m.Make(u.WithKey("", "")); err == nil {
		t.Error("a key without a label")
	}
}

// A known key is not looked for before it is to sign; and then it must be that one.
func TestAKnownKey(t *testing.T) {
	l, m, u := newLibrary(t)
	made, err := m.Make(u)
	if err != nil {
		t.Fatal(err)
	}
	l.set(func() { l.down = true })
	known := m.Known(u, made.Public())
	if known.Ready() != nil {
		t.Errorf("nobody asked, and it is known to be away: %v", known.Ready())
	}
	l.set(func() { l.down = false })
	l.set(func() { l.restarts++ })
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_ = signs(known) // the first one ends the dead session
	if err := signs(known); err != nil {
		t.Error(err)
	}
	wrong := m.Known(u, other.Public())
	if err := signs(wrong); err == nil || !strings.Contains(err.Error(), "another one than was certified") || !errors.Is(wrong.Ready(), ca.ErrKeyLost) {
		t.Errorf("another key of that name: %v, %v", err, wrong.Ready())
	}
}

func TestATokenComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, m, u := newLibrary(t)
		k, err := m.Make(u)
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		go m.Run(ctx)
		defer synctest.Wait()
		defer stop()
		// It restarts: what is asked first fails, and what is asked then does not.
		l.set(func() { l.restarts++ })
		if err := signs(k); !errors.Is(err, errSession) || k.Ready() == nil || errors.Is(k.Ready(), ca.ErrKeyLost) {
			t.Errorf("a dead session: %v, ready %v", err, k.Ready())
		}
		if err := signs(k); err != nil || k.Ready() != nil {
			t.Errorf("behind it: %v, ready %v", err, k.Ready())
		}
		// It is away for a while, and nobody asks for a signature when it is back.
		l.set(func() { l.restarts++; l.down = true })
		_ = signs(k)
		before := l.get(&l.opened)
		for range 10 {
			if err := signs(k); err == nil || !strings.Contains(err.Error(), "CKR_TOKEN_NOT_PRESENT") || len(err.Error()) > 400 {
				t.Errorf("while it is away: %v", err)
			}
		}
		if n := l.get(&l.opened) - before; n > 1 {
			t.Errorf("opened %d times in a moment", n)
		}
		time.Sleep(time.Minute)
		if err := k.Ready(); err == nil || !strings.Contains(err.Error(), "pkcs11:token=t by /m.so") || len(err.Error()) > 400 {
			t.Errorf("ready: %v", err)
		}
		if n := l.get(&l.opened) - before; n < 10 || n > 25 {
			t.Errorf("opened %d times in a minute", n)
		}
		l.set(func() { l.down = false })
		time.Sleep(2 * tryAgain)
		if err := k.Ready(); err != nil {
			t.Errorf("it is back, and that is not seen: %v", err)
		}
		if err := signs(k); err != nil {
			t.Error(err)
		}
	})
}

// Tokens lock themselves after a few wrong PINs.
func TestAWrongPINIsTriedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, m, u := newLibrary(t)
		if err := os.WriteFile(u.PinSource, []byte("9999"), 0o600); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		go m.Run(ctx)
		defer synctest.Wait()
		defer stop()
		if _, err := m.Make(u); !errors.Is(err, errPIN) {
			t.Errorf("got %v", err)
		}
		time.Sleep(time.Hour)
		_, err := m.Make(u)
		if !errors.Is(err, errPIN) || !strings.Contains(err.Error(), "Put the right one into the file") || strings.Contains(err.Error(), "9999") {
			t.Errorf("got %v", err)
		}
		if n := l.get(&l.logins); n != 1 {
			t.Errorf("the wrong PIN was tried %d times", n)
		}
		if err := os.WriteFile(u.PinSource, []byte("1234"), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * tryAgain)
		if n := l.get(&l.logins); m.fault(u) != nil || n != 2 {
			t.Errorf("the right one: %v, %d logins", m.fault(u), n)
		}
		if err := os.Chmod(u.PinSource, 0o644); err != nil {
			t.Fatal(err)
		}
		l.set(func() { l.restarts++ })
		_ = m.Probe(u)
		if k, err := m.Make(u); err != nil && !strings.Contains(err.Error(), "SESSION") {
			t.Errorf("%+v, %v", k, err)
		}
		if _, err := m.Make(u); err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("a PIN that others can read: %v", err)
		}
	})
}

func TestTheBuildSaysWhatItLacks(t *testing.T) {
	if err := CheckBuild(); Supported != (err == nil) {
		t.Errorf("supported %v, %v", Supported, err)
	}
	if Supported {
		return
	}
	_, m, u := newLibrary(t)
	m.open = openDevice
	if _, err := m.Make(u); err == nil || !strings.Contains(err.Error(), "meshca-pkcs11") || !strings.Contains(err.Error(), "make build-pkcs11") {
		t.Errorf("got %v", err)
	}
}
