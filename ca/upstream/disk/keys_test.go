package disk

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
)

// A root whose key can be broken is neither imported nor started with, wherever in the chain it stands.
func TestWeakKeysAreRefused(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	middleKey := newKey(t)
	root := certificate(t, "root", weak, nil, nil, nil)
	for name, c := range map[string]struct {
		from Files
		says string
	}{
		"RSA of 1024 bits":          {put(t, keyPEM(t, weak), root), "certificate 1 (CN=root) has an RSA key of 1024 bits"},
		"P-224":                     {put(t, keyPEM(t, p224), certificate(t, "root", p224, nil, nil, nil)), "certificate 1 (CN=root) has an ECDSA key on the curve P-224"},
		"the root of a good middle": {put(t, keyPEM(t, middleKey), certificate(t, "middle", middleKey, root, weak, nil), root), "certificate 2 (CN=root) has an RSA key of 1024 bits"},
	} {
		t.Run(name, func(t *testing.T) {
			to := filesIn(filepath.Join(t.TempDir(), "state"))
			_, imported := Import(c.from, to)
			_, opened := Open(Options{Root: c.from})
			for what, err := range map[string]error{"import": imported, "start": opened} {
				if !errors.Is(err, ca.ErrWeakKey) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "meshca root create") {
					t.Errorf("%s: %v", what, err)
				}
			}
			if _, err := os.Stat(to.Key); !errors.Is(err, fs.ErrNotExist) {
				t.Error("its key was copied")
			}
		})
	}
}

// Nor is one below which verifiers would accept no SVID.
func TestRestrictedRootsAreRefused(t *testing.T) {
	clients := func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }
	key, middleKey := newKey(t), newKey(t)
	root, good := certificate(t, "root", key, nil, nil, clients), certificate(t, "root", key, nil, nil, nil)
	for name, c := range map[string]struct {
		from Files
		says string
	}{
		"a root":                    {put(t, keyPEM(t, key), root), "certificate 1 (CN=root) has extended key usages without serverAuth,"},
		"a middle":                  {put(t, keyPEM(t, middleKey), certificate(t, "middle", middleKey, good, key, clients), good), "certificate 1 (CN=middle) has extended"},
		"the root of a good middle": {put(t, keyPEM(t, middleKey), certificate(t, "middle", middleKey, root, key, nil), root), "certificate 2 (CN=root) has extended"},
	} {
		t.Run(name, func(t *testing.T) {
			_, imported := Import(c.from, filesIn(filepath.Join(t.TempDir(), "state")))
			_, opened := Open(Options{Root: c.from})
			for what, err := range map[string]error{"import": imported, "start": opened} {
				if !errors.Is(err, ca.ErrUsage) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "meshca root create") {
					t.Errorf("%s: %v", what, err)
				}
			}
		})
	}
}

// Plain `openssl ecparam -genkey` writes the name of the curve before the key. Other blocks are taken off by hand.
func TestKeyFilesOfOpenssl(t *testing.T) {
	key := newKey(t)
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	root := certificate(t, "root", key, nil, nil, nil)
	curve := pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}}) // prime256v1
	plain := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1})
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw})
	for name, c := range map[string]struct {
		file []byte
		says string // empty: it is read
	}{
		"with the curve's name":  {slices.Concat(curve, plain), ""},
		"and words before":       {slices.Concat([]byte("a key of mine\n"), curve, []byte("\n"), plain), ""},
		"the curve's name alone": {curve, "holds no private key"},
		"with a certificate":     {slices.Concat(plain, cert), "holds more than the key: leave that alone in it"},
		"behind a certificate":   {slices.Concat(cert, plain), "holds more than the key: leave that alone in it"},
		"with another key":       {slices.Concat(curve, plain, plain), "openssl pkey -in "},
	} {
		t.Run(name, func(t *testing.T) {
			f := put(t, c.file, root)
			to := filesIn(t.TempDir())
			_, err := Import(f, to)
			if c.says != "" {
				if err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "PRIVATE") {
					t.Errorf("got %v, want a word on %q", err, c.says)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			u, err := Open(Options{Root: to})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := u.SignIntermediate(t.Context(), refOf(root), request(t, time.Hour)); err != nil {
				t.Error(err)
			}
		})
	}
}
