package keyring_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/keyring"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/rotation"
)

var domain = spiffeid.RequireTrustDomainFromString("mesh.test")

// link is the way to an upstream, which can be cut.
type link struct {
	ca.Upstream
	cut    atomic.Bool
	signed atomic.Int32
}

func (l *link) SignIntermediate(ctx context.Context, ref string, r ca.IntermediateRequest) ([]*x509.Certificate, error) {
	if l.cut.Load() {
		return nil, errors.New("no route to the upstream")
	}
	l.signed.Add(1)
	return l.Upstream.SignIntermediate(ctx, ref, r)
}

// house is a CA that can be started again. Its root and its store outlive its processes.
type house struct {
	*testing.T
	dir      string
	td       spiffeid.TrustDomain
	life     time.Duration
	upstream *link
	store    *bolt.Store
	log      bytes.Buffer

	auth *ca.Authority
	ring *keyring.Ring
	line *ca.Line
}

func newHouse(t *testing.T) *house {
	t.Helper()
	h := &house{T: t, dir: t.TempDir(), td: domain, life: 72 * time.Hour}
	h.newRoot()
	h.start()
	return h
}

func (h *house) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

// newRoot begins with another root and an empty store; what is kept of intermediates stays.
func (h *house) newRoot() {
	dir := h.TempDir()
	files := disk.Files{Cert: filepath.Join(dir, "root.crt"), Key: filepath.Join(dir, "root.key")}
	_, err := disk.Create(files, disk.CreateOptions{TrustDomain: h.td})
	h.must(err)
	up, err := disk.Open(disk.Options{Root: files})
	h.must(err)
	h.upstream = &link{Upstream: up}
	h.store, err = bolt.Open(filepath.Join(dir, "meshca.db"))
	h.must(err)
	h.Cleanup(func() { _ = h.store.Close() })
}

func (h *house) keptDir() string { return filepath.Join(h.dir, "intermediates") }

// start is what a process does.
func (h *house) start() {
	h.Helper()
	log := slog.New(slog.NewTextHandler(&h.log, nil))
	issuers, err := h.upstream.Issuers(h.Context())
	h.must(err)
	root := issuers[0].Root
	trust, err := ca.NewTrust(h.Context(), ca.TrustConfig{TrustDomain: h.td, Store: h.store, Roots: []*x509.Certificate{root}})
	h.must(err)
	h.ring, err = keyring.Open(keyring.Config{Dir: h.keptDir(), Log: log})
	h.must(err)
	h.auth, err = ca.NewAuthority(ca.AuthorityConfig{TrustDomain: h.td, Upstream: h.upstream, Trust: trust, Life: h.life, Keys: h.ring, Log: log})
	h.must(err)
	h.must(h.ring.Retain(ca.RootID(root)))
	h.auth.Assign(ca.Assignment{Root: ca.Root{ID: ca.RootID(root), Ref: issuers[0].Ref}})
	lines, _ := h.auth.Lines()
	h.line = lines[0]
}

func (h *house) renew() rotation.Term {
	h.Helper()
	term, err := h.line.Renew(h.Context())
	h.must(err)
	return term
}

func (h *house) serial() string {
	h.Helper()
	chain := h.line.Status().Chain
	if len(chain) == 0 {
		h.Fatal("there is no intermediate")
	}
	return serial.String(chain[0].SerialNumber)
}

// file is the only one that is kept.
func (h *house) file() string {
	h.Helper()
	files, err := filepath.Glob(filepath.Join(h.keptDir(), "*"))
	h.must(err)
	if len(files) != 1 {
		h.Fatalf("%d files are kept: %v", len(files), files)
	}
	return files[0]
}

func TestARestartGoesOnWithTheUpstreamAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t)
		h.renew()
		serial := h.serial()
		if info, err := os.Stat(h.file()); err != nil || info.Mode() != 0o600 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
		time.Sleep(10 * time.Hour)
		h.upstream.cut.Store(true)
		h.start()
		term := h.renew()
		if h.serial() != serial || h.auth.Ready() != nil {
			t.Errorf("a start has %s of %s, ready %v", h.serial(), serial, h.auth.Ready())
		}
		// Its successor is due when it would have been: at half-life, counted from when it came.
		if in := time.Until(h.line.Due(term)); (in - 26*time.Hour).Abs() > time.Minute {
			t.Errorf("due in %s", in)
		}
		// The next one is a new one, whenever it is asked for.
		if _, err := h.line.Renew(t.Context()); err == nil || h.serial() != serial {
			t.Errorf("renewed with the upstream away: %v", err)
		}
		h.upstream.cut.Store(false)
		h.renew()
		if h.serial() == serial {
			t.Error("the old one is still in use")
		}
		second := h.serial()
		h.start()
		h.renew()
		if h.serial() != second {
			t.Error("a start goes back to the one before")
		}
	})
}

// Past half-life a start signs at once with what is kept, and has the next one as soon as the upstream gives it.
func TestAStartPastHalfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t)
		h.renew()
		serial := h.serial()
		time.Sleep(40 * time.Hour)
		h.upstream.cut.Store(true)
		h.start()
		ctx, stop := context.WithCancel(t.Context())
		go func() { _ = rotation.Keep(ctx, h.line, rotation.KeepOptions{Wake: h.line.Wake()}) }()
		synctest.Wait()
		time.Sleep(time.Minute)
		if h.serial() != serial || h.auth.Ready() != nil || h.line.Status().LastError == nil {
			t.Errorf("%s, ready %v, last error %v", h.serial(), h.auth.Ready(), h.line.Status().LastError)
		}
		h.upstream.cut.Store(false)
		time.Sleep(10 * time.Hour)
		if h.serial() == serial {
			t.Error("the next one did not come")
		}
		stop()
		synctest.Wait()
	})
}

func TestWhatHasEndedIsNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t)
		h.renew()
		time.Sleep(72*time.Hour - 5*time.Minute) // less than is issued under
		h.upstream.cut.Store(true)
		h.start()
		_, err := h.line.Renew(t.Context())
		if err == nil || !strings.Contains(err.Error(), "too soon to issue under it") || !strings.Contains(err.Error(), "no route") {
			t.Errorf("got %v", err)
		}
		if r, ok := refusal.From(h.auth.Ready()); !ok || r.Reason != refusal.IssuerNotReady {
			t.Errorf("ready: %v", h.auth.Ready())
		}
		h.upstream.cut.Store(false)
		h.renew()
		h.file()
	})
}

// What was stolen does not come back with a restart, also if nothing could replace it.
func TestATaintedIntermediateIsNotRecalled(t *testing.T) {
	h := newHouse(t)
	h.renew()
	stolen := h.serial()
	h.must(h.line.Forget())
	h.upstream.cut.Store(true)
	if _, err := h.line.Renew(t.Context()); err == nil || h.serial() != stolen {
		t.Fatal(err)
	}
	h.start()
	if _, err := h.line.Renew(t.Context()); err == nil {
		t.Errorf("the stolen one is used again: %s", h.serial())
	}
	h.upstream.cut.Store(false)
	h.renew()
	if h.serial() == stolen {
		t.Error("the stolen one is used again")
	}
}

// A command for a new intermediate is not content with the one that a start takes up meanwhile.
func TestRenewNowWantsANewOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t)
		h.renew()
		serial := h.serial()
		h.start()
		done := make(chan error, 1)
		go func() { done <- h.line.RenewNow(t.Context()) }()
		synctest.Wait()
		ctx, stop := context.WithCancel(t.Context())
		go func() { _ = rotation.Keep(ctx, h.line, rotation.KeepOptions{Wake: h.line.Wake()}) }()
		if err := <-done; err != nil || h.serial() == serial {
			t.Errorf("%v, and %s signs", err, h.serial())
		}
		stop()
		synctest.Wait()
	})
}

func TestTheKeyOfARootThatSignsNoMoreGoes(t *testing.T) {
	h := newHouse(t)
	h.renew()
	h.file()
	old := h.line
	h.auth.Assign(ca.Assignment{Root: ca.Root{ID: strings.Repeat("ab", 32), Ref: "another"}})
	if left, _ := os.ReadDir(h.keptDir()); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	// What comes for it later is dropped.
	if _, err := old.Renew(t.Context()); err == nil || !strings.Contains(err.Error(), "signs no more") {
		t.Errorf("got %v", err)
	}
	if left, _ := os.ReadDir(h.keptDir()); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestWhatIsKeptOfOthersIsReplaced(t *testing.T) {
	for name, change := range map[string]func(h *house){
		"another root": func(h *house) { h.newRoot() },
		"another root's under this one's name": func(h *house) {
			old := h.file()
			h.newRoot()
			issuers, err := h.upstream.Issuers(h.Context())
			h.must(err)
			data, err := os.ReadFile(old)
			h.must(err)
			id, was := ca.RootID(issuers[0].Root), strings.TrimSuffix(filepath.Base(old), ".json")
			h.must(os.WriteFile(filepath.Join(h.keptDir(), id+".json"), bytes.ReplaceAll(data, []byte(was), []byte(id)), 0o600))
		},
		"another trust domain": func(h *house) {
			h.td = spiffeid.RequireTrustDomainFromString("other.test")
			h.newRoot()
		},
		"another key": func(h *house) {
			first, err := os.ReadFile(h.file())
			h.must(err)
			h.renew()
			second, err := os.ReadFile(h.file())
			h.must(err)
			pem := func(b []byte) []byte { return b[bytes.Index(b, []byte(`"pem"`)):bytes.Index(b, []byte(`"chain"`))] }
			h.must(os.WriteFile(h.file(), bytes.Replace(second, pem(second), pem(first), 1), 0o600))
		},
		"a longer life than is asked for now": func(h *house) { h.life = 24 * time.Hour },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t)
			h.renew()
			change(h)
			signed := h.upstream.signed.Load()
			h.start()
			h.renew()
			if n := h.upstream.signed.Load() - signed; n != 1 {
				t.Errorf("%d signings, want a new one", n)
			}
			// The new one stands alone, and is good.
			h.file()
			serial := h.serial()
			h.upstream.cut.Store(true)
			h.start()
			if h.renew(); h.serial() != serial {
				t.Error("the new one was not kept")
			}
		})
	}
}

func TestWhatOthersCanUseIsRefused(t *testing.T) {
	h := newHouse(t)
	h.renew()
	file := h.file()
	whole, err := os.ReadFile(file)
	h.must(err)
	for name, c := range map[string]struct {
		breaks func() error
		want   string
	}{
		"a file that others can read":       {func() error { return os.Chmod(file, 0o640) }, "chmod 600"},
		"a directory that others can enter": {func() error { return os.Chmod(h.keptDir(), 0o755) }, "chmod 700"},
		"a symlink": {func() error {
			return errors.Join(os.Rename(file, file+".real"), os.Symlink(file+".real", file))
		}, "is a symlink"},
		"half a file": {func() error { return os.WriteFile(file, whole[:len(whole)/2], 0o600) }, "is damaged"},
		"one with more in it": {func() error {
			return os.WriteFile(file, bytes.Replace(whole, []byte(`"root"`), []byte(`"x":1,"root"`), 1), 0o600)
		}, "is damaged"},
		"one of a later version": {func() error {
			return os.WriteFile(file, bytes.Replace(whole, []byte(`"version": 1`), []byte(`"version": 2`), 1), 0o600)
		}, "has version 2"},
		"one under another name":   {func() error { return os.Rename(file, filepath.Join(h.keptDir(), strings.Repeat("cd", 32)+".json")) }, "is damaged"},
		"one under no root's name": {func() error { return os.Rename(file, filepath.Join(h.keptDir(), "x.json")) }, "is damaged"},
	} {
		h.must(os.RemoveAll(h.keptDir()))
		h.must(os.Mkdir(h.keptDir(), 0o700))
		h.must(os.WriteFile(file, whole, 0o600))
		if _, err := keyring.Open(keyring.Config{Dir: h.keptDir()}); err != nil {
			t.Fatalf("before %s: %v", name, err)
		}
		h.must(c.breaks())
		_, err := keyring.Open(keyring.Config{Dir: h.keptDir()})
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "PRIVATE") {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}

// Whoever goes back to keys in memory finds none on the disk.
func TestAbandon(t *testing.T) {
	h := newHouse(t)
	h.renew()
	h.file()
	h.must(keyring.Abandon(h.keptDir(), nil))
	if left, err := os.ReadDir(h.keptDir()); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
	// Keys in a token that nobody names can only be told of.
	const record = `{"version": 1, "root": "%", "others": [{"uri": "pkcs11:token=gone;object=k"}]}`
	id := strings.Repeat("ab", 32)
	h.must(os.WriteFile(filepath.Join(h.keptDir(), id+".json"), []byte(strings.Replace(record, "%", id, 1)), 0o600))
	var log bytes.Buffer
	h.must(keyring.Abandon(h.keptDir(), slog.New(slog.NewTextHandler(&log, nil))))
	if !strings.Contains(log.String(), "pkcs11:token=gone;object=k") || strings.Count(log.String(), "\n") != 1 {
		t.Errorf("log: %s", log.String())
	}
	h.file()
	absent := filepath.Join(t.TempDir(), "absent")
	h.must(keyring.Abandon(absent, nil))
	if _, err := os.Lstat(absent); err == nil {
		t.Error("a directory was made for nothing")
	}
}
