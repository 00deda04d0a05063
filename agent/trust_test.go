package agent

import (
	"encoding/pem"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/meshca/meshca/test/fakeca"
)

func newTestTrust(t *testing.T, ca *fakeca.CA) *trust {
	t.Helper()
	dir := t.TempDir()
	return newTrust(ca.Domain(), filepath.Join(dir, "file"), filepath.Join(dir, "kept"), slog.New(slog.DiscardHandler))
}

func newCA(t *testing.T) *fakeca.CA {
	t.Helper()
	ca, err := fakeca.New("mesh.test")
	must(t, err)
	return ca
}

func pemOf(ca *fakeca.CA) []byte {
	var out []byte
	for _, root := range ca.Roots() {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw})...)
	}
	return out
}

func TestTrustHigherSequenceWins(t *testing.T) {
	ca := newCA(t)
	first := ca.Bundle()
	must(t, ca.AddRoot())
	second := ca.Bundle()
	tr := newTestTrust(t, ca)
	must(t, os.WriteFile(tr.file, second, 0o600))
	tr.load()
	if tr.sequence() != 2 {
		t.Fatalf("sequence %d from the file", tr.sequence())
	}
	must(t, tr.offer(first, nil))
	if tr.sequence() != 2 {
		t.Error("the CA's older bundle won")
	}
	must(t, ca.AddRoot())
	must(t, tr.offer(ca.Bundle(), nil))
	must(t, tr.readFile())
	if tr.sequence() != 3 {
		t.Error("the older file won")
	}
	again := newTrust(tr.domain, tr.file, tr.kept, tr.log)
	again.load()
	if again.sequence() != 3 || len(again.current.Value().X509Authorities()) != 3 {
		t.Errorf("after a restart: sequence %d", again.sequence())
	}
	must(t, ca.AddRoot())
	must(t, os.WriteFile(tr.file, ca.Bundle(), 0o600))
	must(t, again.readFile())
	if again.sequence() != 4 {
		t.Error("the newer file lost")
	}
}

// unnumbered is the CA's bundle as SPIFFE JSON without a sequence.
func unnumbered(t *testing.T, ca *fakeca.CA) []byte {
	t.Helper()
	data, err := spiffebundle.FromX509Authorities(ca.Domain(), ca.Roots()).Marshal()
	must(t, err)
	return data
}

// A file that has no sequence is taken once. After that it must not push aside what the CA said since, however often it
// is read: the agent reads it at every handshake that fails.
func TestTrustFileWithoutSequence(t *testing.T) {
	for name, content := range map[string]func(*testing.T, *fakeca.CA) []byte{
		"PEM": func(_ *testing.T, ca *fakeca.CA) []byte { return pemOf(ca) }, "JSON": unnumbered,
	} {
		t.Run(name, func(t *testing.T) {
			ca := newCA(t)
			tr := newTestTrust(t, ca)
			must(t, os.WriteFile(tr.file, content(t, ca), 0o600))
			tr.load()
			if len(tr.current.Value().X509Authorities()) != 1 {
				t.Fatal("the file was not taken")
			}
			for range 6 {
				must(t, ca.AddRoot())
			}
			must(t, tr.offer(ca.Bundle(), nil))
			if tr.sequence() != 7 {
				t.Fatal("the CA's bundle did not replace one without a sequence")
			}
			must(t, tr.readFile())
			if tr.sequence() != 7 {
				t.Error("the same file was taken again over the CA's newer bundle")
			}
			again := newTrust(tr.domain, tr.file, tr.kept, tr.log)
			again.load()
			if again.sequence() != 7 {
				t.Error("after a restart the file won over what the CA said")
			}
			must(t, ca.ReplaceRoot())
			must(t, os.WriteFile(tr.file, content(t, ca), 0o600))
			must(t, again.readFile())
			if roots := again.current.Value().X509Authorities(); len(roots) != 1 || !roots[0].Equal(ca.Roots()[0]) {
				t.Error("a file that was changed was not taken")
			}
		})
	}
}

func TestTrustRefusesWhatIsNoBundle(t *testing.T) {
	ca := newCA(t)
	for name, content := range map[string]string{
		"empty": "", "text": "hello", "no roots": `{"keys":[]}`, "broken JSON": `{"keys":`, "a key": "-----BEGIN EC PRIVATE KEY-----\nAA==\n-----END EC PRIVATE KEY-----\n",
		"too large": string(make([]byte, maxBundleBytes+1)),
	} {
		t.Run(name, func(t *testing.T) {
			tr := newTestTrust(t, ca)
			must(t, tr.offer(ca.Bundle(), nil))
			must(t, os.WriteFile(tr.file, []byte(content), 0o600))
			if err := tr.readFile(); err == nil {
				t.Error("taken")
			}
			if err := tr.offer([]byte(content), nil); err == nil {
				t.Error("taken from the CA")
			}
			if tr.sequence() != 1 {
				t.Error("what was held is gone")
			}
		})
	}
}

func TestTrustWithNothing(t *testing.T) {
	ca := newCA(t)
	tr := newTestTrust(t, ca)
	tr.load()
	if _, err := tr.GetX509BundleForTrustDomain(ca.Domain()); err == nil {
		t.Error("trusts without a bundle")
	}
}

// The kept copy cannot be written: the bundle is in use, but nobody is told that it would outlive a restart.
func TestTrustThatCannotBeKept(t *testing.T) {
	ca := newCA(t)
	tr := newTestTrust(t, ca)
	tr.kept = filepath.Join(t.TempDir(), "gone", "kept")
	must(t, tr.offer(ca.Bundle(), nil))
	if tr.sequence() != 1 || tr.ensureKept() {
		t.Fatal("not in use, or said to be kept")
	}
	must(t, os.Mkdir(filepath.Dir(tr.kept), 0o700))
	if !tr.ensureKept() {
		t.Error("not kept once it could be")
	}
}

func FuzzParseBundle(f *testing.F) {
	ca, err := fakeca.New("mesh.test")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ca.Bundle())
	f.Add([]byte(`{"keys":[],"spiffe_sequence":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if b, err := parseBundle(ca.Domain(), data); err == nil && len(b.X509Authorities()) == 0 {
			t.Error("a bundle without roots was taken")
		}
	})
}

// The mark of the last state outlives a restart, and is kept against a CA that is behind: it may prove that to it.
func TestTrustKeepsTheMark(t *testing.T) {
	ca := newCA(t)
	tr := newTestTrust(t, ca)
	first := ca.Bundle()
	is := func(want string) {
		t.Helper()
		again := newTrust(tr.domain, tr.file, tr.kept, tr.log)
		again.load()
		if got := string(tr.witnessed()); got != want || string(again.witnessed()) != want {
			t.Errorf("it shows %q, after a restart %q; want %q", got, again.witnessed(), want)
		}
	}
	must(t, tr.offer(first, []byte("one")))
	is("one")
	must(t, tr.offer(first, []byte("two"))) // another state with the same bundle
	is("two")
	must(t, tr.offer(first, nil)) // a CA of an earlier version
	is("two")
	must(t, tr.offer(first, make([]byte, maxMark+1)))
	is("two")
	must(t, ca.AddRoot())
	must(t, tr.offer(ca.Bundle(), []byte("three")))
	is("three")
	must(t, tr.offer(first, []byte("behind")))
	is("three")
	if tr.sequence() != 2 {
		t.Errorf("the bundle is %d", tr.sequence())
	}
}
