package agent

import (
	"crypto/ecdsa"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/test/fakeca"
)

// issued is an SVID as the CA would answer it, with its key.
func issued(t *testing.T, ca *fakeca.CA, path string, life time.Duration) (*meshcav1.X509SVID, *ecdsa.PrivateKey) {
	t.Helper()
	key, csr, err := newCSR()
	must(t, err)
	answer, err := ca.Sign(path, csr, life)
	must(t, err)
	return answer, key
}

func newHeld(t *testing.T, ca *fakeca.CA, path string, life time.Duration) *held {
	t.Helper()
	tr := newTestTrust(t, ca)
	must(t, tr.offer(ca.Bundle(), nil))
	answer, key := issued(t, ca, path, life)
	h, err := receive(answer, key, tr, machineClocks()())
	must(t, err)
	return h
}

func TestReceiveRefuses(t *testing.T) {
	ca, foreign := newCA(t), newCA(t)
	tr := newTestTrust(t, ca)
	must(t, tr.offer(ca.Bundle(), nil))
	for name, change := range map[string]func(*meshcav1.X509SVID, **ecdsa.PrivateKey){
		"another key":      func(_ *meshcav1.X509SVID, key **ecdsa.PrivateKey) { *key, _, _ = newCSR() },
		"another ID":       func(a *meshcav1.X509SVID, _ **ecdsa.PrivateKey) { a.SpiffeId += "x" },
		"no ID":            func(a *meshcav1.X509SVID, _ **ecdsa.PrivateKey) { a.SpiffeId = "" },
		"no chain":         func(a *meshcav1.X509SVID, _ **ecdsa.PrivateKey) { a.Chain = nil },
		"a broken chain":   func(a *meshcav1.X509SVID, _ **ecdsa.PrivateKey) { a.Chain[0] = a.Chain[0][1:] },
		"trailing bytes":   func(a *meshcav1.X509SVID, _ **ecdsa.PrivateKey) { a.Chain[0] = append(a.Chain[0], 0) },
		"an endless chain": func(a *meshcav1.X509SVID, _ **ecdsa.PrivateKey) { a.Chain = slicesRepeat(a.Chain[0], maxChain+1) },
		"no life":          func(a *meshcav1.X509SVID, _ **ecdsa.PrivateKey) { a.Life = nil },
		"nothing left":     func(a *meshcav1.X509SVID, _ **ecdsa.PrivateKey) { a.Remaining = durationpb.New(0) },
		"a foreign root": func(a *meshcav1.X509SVID, key **ecdsa.PrivateKey) {
			f, k := issued(t, foreign, "/ns/a/sa/b", time.Hour)
			a.Chain, *key = f.Chain, k
		},
	} {
		t.Run(name, func(t *testing.T) {
			answer, key := issued(t, ca, "/ns/a/sa/b", time.Hour)
			change(answer, &key)
			if _, err := receive(answer, key, tr, machineClocks()()); err == nil {
				t.Error("taken")
			}
		})
	}
}

func slicesRepeat(b []byte, n int) [][]byte {
	out := make([][]byte, n)
	for i := range out {
		out[i] = b
	}
	return out
}

// A node whose clock is off by a day takes what the CA issues, and knows how long it lasts.
func TestReceiveWithAClockThatIsOff(t *testing.T) {
	for _, skew := range []time.Duration{24 * time.Hour, -24 * time.Hour} {
		ca := newCA(t)
		ca.Skew(skew)
		h := newHeld(t, ca, "/ns/a/sa/b", time.Hour)
		if left := h.term.Remaining(time.Now()); left < 59*time.Minute || left > time.Hour {
			t.Errorf("skew %v: %v left of an hour", skew, left)
		}
	}
}

func TestStoreKeeps(t *testing.T) {
	ca := newCA(t)
	s := &store{filepath.Join(t.TempDir(), "keys"), machineClocks()}
	must(t, s.prepare())
	w := Workload{Socket: "/run/a.sock", TokenFile: "/run/a.token"}
	h := newHeld(t, ca, "/ns/a/sa/b", time.Hour)
	h.bearer = Bearer{Subject: "system:serviceaccount:a:b"}
	must(t, s.save(nameOf(w), w, h, 0))
	got, whose, err := s.load(nameOf(w), w, ca.Domain())
	must(t, err)
	if got == nil || whose != h.bearer || got.svid.ID != h.svid.ID || got.serial() != h.serial() || got.term.Life != h.term.Life {
		t.Fatalf("got %v", got)
	}
	if left := got.term.Remaining(time.Now()); left < 59*time.Minute || left > time.Hour {
		t.Errorf("%v left", left)
	}
	info, err := os.Stat(s.path(nameOf(w)))
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the file has mode %v", info.Mode())
	}
	must(t, s.disown(nameOf(w), w, h.bearer))
	if got, whose, err = s.load(nameOf(w), w, ca.Domain()); got != nil || whose != h.bearer || err != nil {
		t.Errorf("disowned, but %v of %v, %v", got, whose, err)
	}
	must(t, s.remove(nameOf(w)))
	must(t, s.remove(nameOf(w)))
	if got, _, err = s.load(nameOf(w), w, ca.Domain()); got != nil || err != nil {
		t.Errorf("removed, but %v %v", got, err)
	}
}

func TestStoreDoesNotGiveOut(t *testing.T) {
	w := Workload{Socket: "/run/a.sock", TokenFile: "/run/a.token"}
	for name, c := range map[string]struct {
		life   time.Duration
		skew   time.Duration
		boot   string
		change func(t *testing.T, path string, ca *fakeca.CA)
		ask    Workload
		fault  bool
	}{
		"what has ended": {life: time.Second, ask: w},
		"what had ended by the CA's clock when the machine booted": {life: time.Hour, skew: 2 * time.Hour, ask: w, boot: "another"},
		"another token's":  {life: time.Hour, ask: Workload{Socket: w.Socket, TokenFile: "/run/b.token"}},
		"another socket's": {life: time.Hour, ask: Workload{Socket: "/run/b.sock", TokenFile: w.TokenFile}},
		"what others could read": {life: time.Hour, ask: w, fault: true, change: func(t *testing.T, path string, _ *fakeca.CA) {
			must(t, os.Chmod(path, 0o640))
		}},
		"a damaged file": {life: time.Hour, ask: w, fault: true, change: func(t *testing.T, path string, _ *fakeca.CA) {
			must(t, os.WriteFile(path, []byte(`{"version":1,`), 0o600))
		}},
		"a newer version's": {life: time.Hour, ask: w, fault: true, change: func(t *testing.T, path string, _ *fakeca.CA) {
			must(t, os.WriteFile(path, []byte(`{"version":2}`), 0o600))
		}},
		"a link": {life: time.Hour, ask: w, fault: true, change: func(t *testing.T, path string, _ *fakeca.CA) {
			must(t, os.Rename(path, path+"x"))
			must(t, os.Symlink(path+"x", path))
		}},
		"another key with the chain": {life: time.Hour, ask: w, fault: true, change: func(t *testing.T, path string, ca *fakeca.CA) {
			data, err := os.ReadFile(path)
			must(t, err)
			other := &store{filepath.Dir(path), machineClocks()}
			must(t, other.save("x", w, newHeld(t, ca, "/ns/a/sa/b", time.Hour), 0))
			theirs, err := os.ReadFile(other.path("x"))
			must(t, err)
			mixed := strings.Replace(string(data), field(t, data, "key"), field(t, theirs, "key"), 1)
			must(t, os.WriteFile(path, []byte(mixed), 0o600))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			ca := newCA(t)
			s := &store{filepath.Join(t.TempDir(), "keys"), machineClocks()}
			must(t, s.prepare())
			h := newHeld(t, ca, "/ns/a/sa/b", c.life)
			if c.boot != "" {
				h.received.boot = c.boot
			}
			must(t, s.save(nameOf(w), w, h, c.skew))
			if c.change != nil {
				c.change(t, s.path(nameOf(w)), ca)
			}
			if c.life < time.Minute {
				time.Sleep(c.life)
			}
			got, _, err := s.load(nameOf(w), c.ask, ca.Domain())
			if got != nil || (err != nil) != c.fault {
				t.Errorf("got %v, error %v", got != nil, err)
			}
			if err != nil && strings.Contains(err.Error(), "BEGIN") {
				t.Errorf("the error holds a key: %v", err)
			}
		})
	}
}

// field cuts a string field out of JSON.
func field(t *testing.T, data []byte, name string) string {
	t.Helper()
	_, rest, found := strings.Cut(string(data), fmt.Sprintf("%q:\"", name))
	value, _, closed := strings.Cut(rest, `"`)
	if !found || !closed {
		t.Fatalf("no field %s", name)
	}
	return value
}

func TestStorePrunes(t *testing.T) {
	s := &store{filepath.Join(t.TempDir(), "keys"), machineClocks()}
	must(t, s.prepare())
	w, gone := Workload{Socket: "/a"}, Workload{Socket: "/b"}
	for _, name := range []string{nameOf(w) + keptSuffix, nameOf(gone) + keptSuffix, temporary + "123", selfName + keptSuffix, "README"} {
		must(t, os.WriteFile(filepath.Join(s.dir, name), nil, 0o600))
	}
	must(t, s.prune(map[string]bool{nameOf(w): true}))
	entries, err := os.ReadDir(s.dir)
	must(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if len(names) != 3 {
		t.Errorf("left: %v", names)
	}
}

func TestStoreMakesItsDirectoryPrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	must(t, os.Mkdir(dir, 0o755))
	must(t, (&store{dir: dir}).prepare())
	if info, _ := os.Stat(dir); info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v", info.Mode())
	}
	must(t, os.Remove(dir))
	must(t, os.Symlink(t.TempDir(), dir))
	if err := (&store{dir: dir}).prepare(); err == nil {
		t.Error("a link was taken for the directory")
	}
}

// TestALockThatWasRemovedLocksNothing: an agent that leaves nothing takes its lock file along, while another one waits.
func TestALockThatWasRemovedLocksNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := lockFile(path, 0)
	must(t, err)
	second := make(chan error, 1)
	var unlockSecond func()
	go func() {
		var err error
		unlockSecond, err = lockFile(path, 10*time.Second)
		second <- err
	}()
	time.Sleep(100 * time.Millisecond) // it waits by now, or comes later and finds no file
	must(t, os.Remove(path))
	unlock()
	must(t, <-second)
	defer unlockSecond()
	if unlock, err := lockFile(path, 0); err == nil {
		unlock()
		t.Error("two hold the lock")
	}
}
