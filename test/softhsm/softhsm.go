// Package softhsm makes PKCS #11 tokens for tests with SoftHSM, which keeps each in a directory.
package softhsm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/meshca/meshca/test/parts"
)

// Missing says what a machine lacks for these tests, and how it gets it; empty: nothing.
func Missing() string {
	var lacks []string
	if _, err := exec.LookPath("softhsm2-util"); err != nil || Library() == "" {
		lacks = append(lacks, "SoftHSM (Debian: apt-get install softhsm2)")
	}
	if _, err := exec.LookPath("gcc"); err != nil {
		lacks = append(lacks, "a C compiler (Debian: apt-get install gcc libc6-dev)")
	}
	return strings.Join(lacks, " and ")
}

// Need skips the test where the machine lacks what it needs.
func Need(t testing.TB) {
	t.Helper()
	if lacks := Missing(); lacks != "" {
		t.Skipf("NOT TESTED: keys in PKCS #11. This machine lacks %s", lacks)
	}
}

// Library is where distributions put SoftHSM's; empty: nowhere.
func Library() string {
	for _, path := range []string{
		"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so", "/usr/local/lib/softhsm/libsofthsm2.so",
	} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}

// Store is a directory of tokens, and SoftHSM's configuration that names it.
type Store struct {
	// Dir holds a directory for each token.
	Dir string
	// Config is for SOFTHSM2_CONF in the environment of whoever loads the module.
	Config string
}

// NewStore makes an empty one in dir.
func NewStore(dir string) (*Store, error) {
	s := &Store{Dir: filepath.Join(dir, "tokens"), Config: filepath.Join(dir, "softhsm2.conf")}
	if err := os.Mkdir(s.Dir, 0o700); err != nil {
		return nil, err
	}
	return s, os.WriteFile(s.Config, fmt.Appendf(nil, "directories.tokendir = %s\nlog.level = ERROR\n", s.Dir), 0o600)
}

// Token is one token.
type Token struct {
	Label string
	// PinFile holds the user's PIN.
	PinFile string
	// Dir is where SoftHSM keeps it: taken away, the token is.
	Dir string
}

// NewToken makes a token.
func (s *Store) NewToken(t testing.TB, label string) *Token {
	t.Helper()
	before := s.dirs(t)
	k := &Token{Label: label, PinFile: filepath.Join(t.TempDir(), "pin")}
	if err := os.WriteFile(k.PinFile, []byte("4711-"+label+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	made := exec.CommandContext(t.Context(), "softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", "so-"+label, "--pin", "4711-"+label)
	made.Env = append(os.Environ(), "SOFTHSM2_CONF="+s.Config)
	if out, err := made.CombinedOutput(); err != nil {
		t.Fatalf("softhsm2-util: %v\n%s", err, out)
	}
	for _, dir := range s.dirs(t) {
		if !slices.Contains(before, dir) {
			k.Dir = dir
		}
	}
	if k.Dir == "" {
		t.Fatal("softhsm2-util made no token")
	}
	return k
}

func (s *Store) dirs(t testing.TB) []string {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(s.Dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return dirs
}

// URI names a key in the token, or where object is empty the token.
func (k *Token) URI(object string) string {
	if object != "" {
		object = ";object=" + object
	}
	return fmt.Sprintf("pkcs11:token=%s%s?module-path=%s&pin-source=%s", k.Label, object, Library(), k.PinFile)
}

// Silent builds a library in dir that is SoftHSM's, but that does not return while a file exists. It takes env in its
// environment.
func Silent(t testing.TB, dir, while string) (library string, env []string) {
	t.Helper()
	headers := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11")
	include, err := headers.Output()
	if err != nil {
		t.Fatalf("PKCS #11's headers: %v", err)
	}
	root, err := parts.Root()
	if err != nil {
		t.Fatal(err)
	}
	library = filepath.Join(dir, "silent.so")
	build := exec.CommandContext(t.Context(), "gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, "-I", strings.TrimSpace(string(include)),
		filepath.Join(root, "test/softhsm/testdata/silent.c"), "-ldl")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return library, []string{"SILENT_LIBRARY=" + Library(), "SILENT_WHILE=" + while}
}

// Objects are the files of the objects in the token: two for each key pair.
func (k *Token) Objects(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(k.Dir, "*.object"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(files, func(f string) bool { return filepath.Base(f) == "token.object" })
}

// Away takes the token away until the returned function is called.
func (k *Token) Away(t testing.TB) (back func()) {
	t.Helper()
	elsewhere := filepath.Join(t.TempDir(), "token")
	if err := os.Rename(k.Dir, elsewhere); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := os.Rename(elsewhere, k.Dir); err != nil {
			t.Fatal(err)
		}
	}
}
