package disk

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/pemutil"

	"github.com/meshca/meshca/ca"
)

var domain = spiffeid.RequireTrustDomainFromString("example.org")

func filesIn(dir string) Files {
	return Files{Cert: filepath.Join(dir, "root.crt"), Key: filepath.Join(dir, "root.key")}
}

func created(t *testing.T, o CreateOptions) Files {
	t.Helper()
	f := filesIn(t.TempDir())
	o.TrustDomain = domain
	if _, err := Create(f, o); err != nil {
		t.Fatal(err)
	}
	return f
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func request(t *testing.T, life time.Duration) ca.IntermediateRequest {
	return ca.IntermediateRequest{PublicKey: newKey(t).Public(), TrustDomain: domain, Life: life, CommonName: "meshca intermediate"}
}

func TestCreateThenOpen(t *testing.T) {
	f := filesIn(filepath.Join(t.TempDir(), "a", "b"))
	root, err := Create(f, CreateOptions{TrustDomain: domain})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]fs.FileMode{f.Key: 0o600, filepath.Dir(f.Key): 0o700} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: mode %v, want %v (%v)", path, info.Mode().Perm(), want, err)
		}
	}
	if root.MaxPathLen != 1 || len(root.URIs) != 1 || root.URIs[0].String() != "spiffe://example.org" || time.Until(root.NotAfter) < 9*365*24*time.Hour {
		t.Errorf("root: path length %d, URIs %v, end %s", root.MaxPathLen, root.URIs, root.NotAfter)
	}
	u, err := Open(Options{Root: f})
	if err != nil {
		t.Fatal(err)
	}
	issuers, err := u.Issuers(t.Context())
	if err != nil || len(issuers) != 1 || !issuers[0].Root.Equal(root) || !issuers[0].Named || issuers[0].Ref != refOf(root) {
		t.Errorf("issuers %+v, %v", issuers, err)
	}
	r := request(t, 72*time.Hour)
	chain, err := u.SignIntermediate(t.Context(), refOf(root), r)
	if err != nil {
		t.Fatal(err)
	}
	c := chain[0]
	if len(chain) != 1 || !c.IsCA || !c.MaxPathLenZero || c.CheckSignatureFrom(root) != nil || c.URIs[0].String() != "spiffe://example.org" || c.KeyUsage&x509.KeyUsageDigitalSignature != 0 {
		t.Errorf("intermediate %+v", c)
	}
	if life := time.Until(c.NotAfter); life > 72*time.Hour || life < 72*time.Hour-2*time.Second {
		t.Errorf("life %s", life)
	}
}

func TestNothingIsOverwritten(t *testing.T) {
	f := created(t, CreateOptions{})
	key, err := os.ReadFile(f.Key)
	if err != nil {
		t.Fatal(err)
	}
	other := created(t, CreateOptions{})
	for name, try := range map[string]func() error{
		"create": func() error { _, err := Create(f, CreateOptions{TrustDomain: domain}); return err },
		"import": func() error { _, err := Import(other, f); return err },
		"create beside a key": func() error {
			_, err := Create(Files{Cert: f.Cert + "2", Key: f.Key}, CreateOptions{TrustDomain: domain})
			return err
		},
		"create beside a root": func() error {
			_, err := Create(Files{Cert: f.Cert, Key: f.Key + "2"}, CreateOptions{TrustDomain: domain})
			return err
		},
		"the writing of the file": func() error { return writeNew(f.Key, []byte("x"), 0o600) },
	} {
		if err := try(); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if now, err := os.ReadFile(f.Key); err != nil || !bytes.Equal(now, key) {
		t.Error("the key changed")
	}
	for _, path := range []string{f.Key + "2", f.Cert + "2"} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was left behind", path)
		}
	}
	// A dangling symlink is a file too.
	dir := t.TempDir()
	link := filesIn(dir)
	if err := os.Symlink(filepath.Join(dir, "elsewhere"), link.Key); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(link, CreateOptions{TrustDomain: domain}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("through a symlink: %v", err)
	}
}

func TestCreateLeavesNoHalfRoot(t *testing.T) {
	dir := t.TempDir()
	f := Files{Cert: filepath.Join(dir, "no", strings.Repeat("x", 300)), Key: filepath.Join(dir, "root.key")}
	if _, err := Create(f, CreateOptions{TrustDomain: domain}); err == nil {
		t.Fatal("a file name of 300 bytes")
	}
	if _, err := os.Stat(f.Key); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a key without its certificate was left behind")
	}
}

func TestOpenChecksModes(t *testing.T) {
	for _, mode := range []fs.FileMode{0o640, 0o604, 0o660, 0o644, 0o620} {
		f := created(t, CreateOptions{})
		if err := os.Chmod(f.Key, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(Options{Root: f}); err == nil || !strings.Contains(err.Error(), "chmod 600 "+f.Key) {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	f := created(t, CreateOptions{})
	if err := os.Chmod(f.Key, 0o400); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Options{Root: f}); err != nil {
		t.Errorf("mode 0400: %v", err)
	}
}

// write puts any certificate chain and key into files.
func put(t *testing.T, key []byte, chain ...*x509.Certificate) Files {
	t.Helper()
	f := filesIn(t.TempDir())
	if err := writeBoth(f, chain, key); err != nil {
		t.Fatal(err)
	}
	return f
}

func keyPEM(t *testing.T, key crypto.Signer, o ...pemutil.Options) []byte {
	t.Helper()
	block, err := pemutil.Serialize(key, append(o, pemutil.WithPKCS8(true))...)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(block)
}

func certificate(t *testing.T, name string, key crypto.Signer, parent *x509.Certificate, parentKey crypto.Signer, edit func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(100 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: -1, SubjectKeyId: []byte(name),
	}
	if edit != nil {
		edit(template)
	}
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestOpenRefuses(t *testing.T) {
	key, other := newKey(t), newKey(t)
	root := func(edit func(*x509.Certificate)) *x509.Certificate {
		return certificate(t, "root", key, nil, nil, edit)
	}
	middle := certificate(t, "middle", other, root(nil), key, nil)
	for name, c := range map[string]struct {
		files Files
		says  string
	}{
		"another's key":         {put(t, keyPEM(t, other), root(nil)), "does not belong"},
		"a leaf":                {put(t, keyPEM(t, key), root(func(c *x509.Certificate) { c.IsCA = false; c.KeyUsage = x509.KeyUsageDigitalSignature })), "is no CA"},
		"no keyCertSign":        {put(t, keyPEM(t, key), root(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })), "may not sign"},
		"path length 0":         {put(t, keyPEM(t, key), root(func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })), "no room"},
		"not yet valid":         {put(t, keyPEM(t, key), root(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })), "look at the clock"},
		"a middle without root": {put(t, keyPEM(t, other), middle), "does not end with a root"},
		"a middle out of order": {put(t, keyPEM(t, other), middle, certificate(t, "stranger", key, nil, nil, nil)), "not signed by certificate 2"},
		"a key that is a cert":  {put(t, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root(nil).Raw}), root(nil)), "no private key"},
		"a key that is noise":   {put(t, []byte("hello"), root(nil)), "not PEM"},
		"no certificate":        {put(t, keyPEM(t, key)), "certificate"},
		"no files":              {filesIn(t.TempDir()), "no such file"},
		"a middle with a root of path length 1": {put(t, keyPEM(t, other), middle,
			certificate(t, "root", key, nil, nil, func(c *x509.Certificate) { c.MaxPathLen = 1; c.SubjectKeyId = []byte("root") })), "no room"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Open(Options{Root: c.files})
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want a word on %q", err, c.says)
			}
			if err != nil && strings.Contains(err.Error(), "PRIVATE KEY") {
				t.Errorf("the error repeats the key: %v", err)
			}
		})
	}
}

func TestEncryptedKey(t *testing.T) {
	key := newKey(t)
	root := certificate(t, "root", key, nil, nil, nil)
	f := put(t, keyPEM(t, key, pemutil.WithPassword([]byte("opensesame"))), root)
	if _, err := Open(Options{Root: f}); err == nil || !strings.Contains(err.Error(), "is encrypted") {
		t.Errorf("without a passphrase: %v", err)
	}
	f.Passphrase = filepath.Join(t.TempDir(), "pass")
	for content, ok := range map[string]bool{"opensesame\n": true, "opensesame": true, "wrong\n": false, "\n": false} {
		if err := os.WriteFile(f.Passphrase, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(Options{Root: f})
		if (err == nil) != ok {
			t.Errorf("passphrase %q: %v", content, err)
		}
		if err != nil && strings.Contains(err.Error(), "wrong") {
			t.Errorf("the error repeats the passphrase: %v", err)
		}
	}
	if err := os.WriteFile(f.Passphrase, []byte("opensesame\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(f.Passphrase, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Options{Root: f}); err == nil || !strings.Contains(err.Error(), "chmod 600 "+f.Passphrase) {
		t.Errorf("a passphrase that all can read: %v", err)
	}
}

func TestImport(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	middleKey := newKey(t)
	root := certificate(t, "root", rsaKey, nil, nil, nil)
	middle := certificate(t, "middle", middleKey, root, rsaKey, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(10 * time.Hour) })
	for name, c := range map[string]struct {
		from  Files
		chain int
		life  time.Duration
	}{
		"an RSA root":     {put(t, keyPEM(t, rsaKey), root), 1, 72 * time.Hour},
		"an intermediate": {put(t, keyPEM(t, middleKey), middle, root), 2, 10 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			to := filesIn(filepath.Join(t.TempDir(), "state"))
			got, err := Import(c.from, to)
			if err != nil || !got.Equal(root) {
				t.Fatalf("%v, %v", got, err)
			}
			u, err := Open(Options{Root: to})
			if err != nil {
				t.Fatal(err)
			}
			chain, err := u.SignIntermediate(t.Context(), refOf(root), request(t, 72*time.Hour))
			if err != nil || len(chain) != c.chain {
				t.Fatalf("%d certificates, %v", len(chain), err)
			}
			if life := time.Until(chain[0].NotAfter); life > c.life || life < c.life-3*time.Second {
				t.Errorf("life %s, want %s", life, c.life)
			}
			roots := x509.NewCertPool()
			roots.AddCert(root)
			between := x509.NewCertPool()
			for _, m := range chain[1:] {
				between.AddCert(m)
			}
			if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
				t.Error(err)
			}
		})
	}
	if _, err := Import(put(t, keyPEM(t, newKey(t)), root), filesIn(t.TempDir())); err == nil {
		t.Error("imported a key that is another's")
	}
}

func TestIntermediateEndsWithItsRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := created(t, CreateOptions{Life: 100 * time.Hour})
		u, err := Open(Options{Root: f})
		if err != nil {
			t.Fatal(err)
		}
		root := u.issuers[0].chain[0]
		time.Sleep(90 * time.Hour)
		chain, err := u.SignIntermediate(t.Context(), refOf(root), request(t, 72*time.Hour))
		if err != nil || !chain[0].NotAfter.Equal(root.NotAfter) {
			t.Fatalf("ends at %v, its root at %v: %v", chain[0].NotAfter, root.NotAfter, err)
		}
		time.Sleep(11 * time.Hour)
		if _, err := u.SignIntermediate(t.Context(), refOf(root), request(t, 72*time.Hour)); err == nil || !strings.Contains(err.Error(), "ended at") {
			t.Errorf("an ended root signs: %v", err)
		}
		// It is the one that `certctl ca rotate root` leads away from, and so it must not keep the CA from starting.
		if u, err = Open(Options{Root: f, Successors: filepath.Join(t.TempDir(), "roots"), TrustDomain: domain}); err != nil {
			t.Fatal(err)
		}
		if all, err := u.Issuers(t.Context()); err != nil || len(all) != 1 || !errors.Is(all[0].Fault, errEnded) || !all[0].Root.Equal(root) || !all[0].Named {
			t.Errorf("issuers %+v, %v", all, err)
		}
		if _, err := u.SignIntermediate(t.Context(), refOf(root), request(t, time.Hour)); !errors.Is(err, errEnded) {
			t.Errorf("an ended root signs: %v", err)
		}
		if made, err := u.NewIssuer(t.Context()); err != nil || made.Root.NotAfter.Sub(made.Root.NotBefore).Round(time.Hour) != 100*time.Hour {
			t.Errorf("its successor: %+v, %v", made, err)
		}
	})
}

func TestSuccessors(t *testing.T) {
	f := created(t, CreateOptions{Life: 1000 * time.Hour})
	o := Options{Root: f, Successors: filepath.Join(t.TempDir(), "roots [old]"), TrustDomain: domain}
	u, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	made, err := u.NewIssuer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if life := made.Root.NotAfter.Sub(made.Root.NotBefore); made.Named || made.Ref != refOf(made.Root) || life < 999*time.Hour || life > 1001*time.Hour {
		t.Errorf("made %+v, life %s", made, life)
	}
	again, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range []*Upstream{u, again} {
		all, err := u.Issuers(t.Context())
		if err != nil || len(all) != 2 || !all[0].Named || all[1].Named || !all[1].Root.Equal(made.Root) {
			t.Fatalf("issuers %+v, %v", all, err)
		}
		for _, i := range all {
			chain, err := u.SignIntermediate(t.Context(), i.Ref, request(t, time.Hour))
			if err != nil || chain[0].CheckSignatureFrom(i.Root) != nil {
				t.Errorf("%s: %v", i.Name, err)
			}
		}
		if _, err := u.SignIntermediate(t.Context(), "another", request(t, time.Hour)); err == nil {
			t.Error("a root that is not there signs")
		}
	}
	for _, e := range []string{f.Key, f.Cert} {
		if filepath.Dir(e) == o.Successors {
			t.Errorf("%s lies among the successors", e)
		}
	}
	if _, err := (&Upstream{o: Options{Root: f}}).NewIssuer(t.Context()); err == nil {
		t.Error("made a successor without a place for it")
	}
}

// What was replaced may be taken away: the named root or a successor, its key or all of it.
func TestWhatWasReplacedMayBeGone(t *testing.T) {
	for name, c := range map[string]struct {
		gone  func(named, made Files) []string
		fault int // whose
		root  bool
	}{
		"the named one's key": {func(named, _ Files) []string { return []string{named.Key} }, 0, true},
		"the named one":       {func(named, _ Files) []string { return []string{named.Key, named.Cert} }, 0, false},
		"a successor's key":   {func(_, made Files) []string { return []string{made.Key} }, 1, true},
	} {
		t.Run(name, func(t *testing.T) {
			f := created(t, CreateOptions{})
			o := Options{Root: f, Successors: filepath.Join(t.TempDir(), "roots"), TrustDomain: domain}
			made := Files{Cert: filepath.Join(o.Successors, "b.crt"), Key: filepath.Join(o.Successors, "b.key")}
			if _, err := Create(made, CreateOptions{TrustDomain: domain}); err != nil {
				t.Fatal(err)
			}
			for _, file := range c.gone(f, made) {
				if err := os.Remove(file); err != nil {
					t.Fatal(err)
				}
			}
			u, err := Open(o)
			if err != nil {
				t.Fatal(err)
			}
			all, err := u.Issuers(t.Context())
			if err != nil || len(all) != 2 || !errors.Is(all[c.fault].Fault, fs.ErrNotExist) || (all[c.fault].Root != nil) != c.root || all[1-c.fault].Fault != nil || !all[0].Named {
				t.Fatalf("issuers %+v, %v", all, err)
			}
			if _, err := u.SignIntermediate(t.Context(), all[1-c.fault].Ref, request(t, time.Hour)); err != nil {
				t.Errorf("what is there does not sign: %v", err)
			}
			if _, err := u.SignIntermediate(t.Context(), all[c.fault].Ref, request(t, time.Hour)); err == nil || c.root && !strings.Contains(err.Error(), "certctl ca rotate root") {
				t.Errorf("what is gone: %v", err)
			}
			if _, err := u.NewIssuer(t.Context()); err != nil {
				t.Error(err)
			}
			if err := u.Check(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// A key that is to be gone is often emptied, and what nobody uses is looked after by nobody: whatever is wrong with one root
// keeps no other from signing. It signs nothing itself, and a start where no other is left is none.
func TestWhatIsWrongWithARootIsItsOwnFault(t *testing.T) {
	empty := func(path string) error { return os.Truncate(path, 0) }
	for name, c := range map[string]struct {
		harm func(Files) error
		says string
		root bool
	}{
		"its key can be read by others": {func(f Files) error { return os.Chmod(f.Key, 0o644) }, "chmod 600", true},
		"its key is empty":              {func(f Files) error { return empty(f.Key) }, "is not PEM", true},
		"its certificate is empty":      {func(f Files) error { return empty(f.Cert) }, "the root's certificate", false},
		"its key is another one's": {func(f Files) error {
			return os.WriteFile(f.Key, keyPEM(t, newKey(t)), 0o600)
		}, "does not belong to", true},
		"its key is in a token": {func(f Files) error {
			return os.WriteFile(strings.TrimSuffix(f.Cert, ".crt")+inToken, []byte("pkcs11:token=a;object=root-1\n"), 0o600)
		}, "PKCS #11", true},
	} {
		for whose, harmed := range []string{"named", "successor"} {
			if harmed == "named" && strings.Contains(name, "token") {
				continue
			}
			t.Run(harmed+": "+name, func(t *testing.T) {
				o := Options{Root: created(t, CreateOptions{}), Successors: filepath.Join(t.TempDir(), "roots"), TrustDomain: domain}
				made := Files{Cert: filepath.Join(o.Successors, "b.crt"), Key: filepath.Join(o.Successors, "b.key")}
				if _, err := Create(made, CreateOptions{TrustDomain: domain}); err != nil {
					t.Fatal(err)
				}
				both := []Files{o.Root, made}
				if err := c.harm(both[whose]); err != nil {
					t.Fatal(err)
				}
				u, err := Open(o)
				if err != nil {
					t.Fatal(err)
				}
				all, err := u.Issuers(t.Context())
				if err != nil || len(all) != 2 || all[1-whose].Fault != nil || (all[whose].Root != nil) != c.root {
					t.Fatalf("issuers %+v, %v", all, err)
				}
				if err := all[whose].Fault; err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("its fault: %v", err)
				}
				if _, err := u.SignIntermediate(t.Context(), all[1-whose].Ref, request(t, time.Hour)); err != nil {
					t.Errorf("the other one does not sign: %v", err)
				}
				if _, err := u.SignIntermediate(t.Context(), all[whose].Ref, request(t, time.Hour)); err == nil {
					t.Error("it signs")
				}
				if err := empty(both[1-whose].Key); err != nil {
					t.Fatal(err)
				}
				if _, err := Open(o); err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "is not PEM") {
					t.Errorf("a start where none can sign: %v", err)
				}
			})
		}
	}
}

// Where the clock was wrong at the start, a root signs as soon as the clock is right.
func TestARootThatIsNotValidYet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := Options{Root: created(t, CreateOptions{}), Successors: filepath.Join(t.TempDir(), "roots"), TrustDomain: domain}
		key := newKey(t)
		later := put(t, keyPEM(t, key), certificate(t, "root", key, nil, nil, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }))
		o.Root, later = later, o.Root
		if err := os.Mkdir(o.Successors, 0o700); err != nil {
			t.Fatal(err)
		}
		for from, to := range map[string]string{later.Cert: "b.crt", later.Key: "b.key"} {
			if err := os.Rename(from, filepath.Join(o.Successors, to)); err != nil {
				t.Fatal(err)
			}
		}
		u, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		for _, signs := range []bool{false, true} {
			all, err := u.Issuers(t.Context())
			if err != nil || len(all) != 2 || (all[0].Fault == nil) != signs || all[1].Fault != nil {
				t.Fatalf("issuers %+v, %v", all, err)
			}
			if _, err := u.SignIntermediate(t.Context(), all[0].Ref, request(t, time.Minute)); (err == nil) != signs {
				t.Errorf("signs %v, want %v", err, signs)
			}
			time.Sleep(61 * time.Minute)
		}
	})
}

// The configuration may name the successor itself, once that signs.
func TestASuccessorThatIsNamed(t *testing.T) {
	o := Options{Successors: t.TempDir(), TrustDomain: domain}
	o.Root = Files{Cert: filepath.Join(o.Successors, "b.crt"), Key: filepath.Join(o.Successors, "b.key")}
	if _, err := Create(o.Root, CreateOptions{TrustDomain: domain}); err != nil {
		t.Fatal(err)
	}
	u, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	if all, err := u.Issuers(t.Context()); err != nil || len(all) != 1 || !all[0].Named {
		t.Errorf("issuers %+v, %v", all, err)
	}
}

// An old successor that has ended must not keep the CA from starting.
func TestEndedSuccessorsArePassedOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := created(t, CreateOptions{Life: 1000 * time.Hour})
		o := Options{Root: f, Successors: filepath.Join(t.TempDir(), "roots"), TrustDomain: domain}
		ended := Files{Cert: filepath.Join(o.Successors, "a.crt"), Key: filepath.Join(o.Successors, "a.key")}
		if _, err := Create(ended, CreateOptions{TrustDomain: domain, Life: time.Hour}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour)
		u, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		if all, err := u.Issuers(t.Context()); err != nil || len(all) != 1 {
			t.Errorf("issuers %+v, %v", all, err)
		}
	})
}
