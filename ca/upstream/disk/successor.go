package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/meshca/meshca/ca/keyfile"
	"github.com/meshca/meshca/ca/pkcs11"
)

// inToken is the end of a file's name that names a successor's key in the token.
const inToken = ".pkcs11"

// make makes a successor of the root: in files, or where the root's key is in a token, there.
func (u *Upstream) make(o CreateOptions) (Files, error) {
	stamp := time.Now().UTC().Format("20060102T150405.000Z")
	base := filepath.Join(u.o.Successors, "root-"+stamp)
	f := Files{Cert: base + ".crt", Key: base + ".key", Tokens: u.o.Root.Tokens}
	if !pkcs11.IsURI(u.o.Root.Key) {
		_, err := Create(f, o)
		return f, err
	}
	root, err := u.o.Root.uri()
	if err != nil {
		return f, err
	}
	// The file comes first: what it names and has no certificate is found after a crash.
	key := root.WithKey(root.Object+"-"+stamp, pkcs11.IDOf(root.Object+"-"+stamp))
	if err := makeDirs(f); err != nil {
		return f, err
	}
	if err := writeNew(base+inToken, []byte(key.String()+"\n"), 0o600); err != nil {
		return f, fmt.Errorf("naming the root's key: %w", err)
	}
	if f.Key, err = u.uriOf(base + inToken); err != nil {
		return f, err
	}
	_, err = Create(f, o)
	return f, err
}

// successor are the files of one, by its name.
func (u *Upstream) successor(base string) (Files, error) {
	f := Files{Cert: base + ".crt", Key: base + ".key", Tokens: u.o.Root.Tokens}
	if _, err := os.Lstat(base + inToken); errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	var err error
	f.Key, err = u.uriOf(base + inToken)
	return f, err
}

// uriOf reads a file that names a key in the token of the root that the configuration names.
func (u *Upstream) uriOf(file string) (string, error) {
	data, err := keyfile.Read(file)
	if err != nil {
		return "", fmt.Errorf("a successor of the root: %w", err)
	}
	name := strings.TrimSpace(string(data))
	if !pkcs11.IsURI(u.o.Root.Key) {
		return "", fmt.Errorf("%s says that a successor of the root is in a PKCS #11 token (%.200s), and the root's key is a file: "+
			"name the token's key as the root's, or move what belongs to the successor out of %s", file, name, u.o.Successors)
	}
	root, err := u.o.Root.uri()
	if err != nil {
		return "", err
	}
	key, err := root.Resolve(name)
	if err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	return key.Full(), nil
}

// sweep destroys keys in the token that were made for successors which never got a certificate. They sign for nobody, so
// a token that is away now keeps them until the next start.
func (u *Upstream) sweep() error {
	names, err := filepath.Glob(filepath.Join(keyfile.Literal(u.o.Successors), "*"+inToken))
	if err != nil {
		return fmt.Errorf("looking for successors of the root: %w", err)
	}
	for _, file := range names {
		cert := strings.TrimSuffix(file, inToken) + ".crt"
		if _, err := os.Lstat(cert); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := u.destroy(file); err != nil {
			u.issuers = append(u.issuers, &issuer{files: Files{Cert: cert}, fault: err})
		}
	}
	return nil
}

// destroy destroys the key that a file names, and then the file. It is no fault that the token is away: the file stays,
// and with it the way to the key, for the next start.
func (u *Upstream) destroy(file string) error {
	name, err := u.uriOf(file)
	if err != nil {
		return err
	}
	key, err := pkcs11.Parse(name)
	if err != nil {
		return err
	}
	if u.o.Root.Tokens.Destroy(key) == nil {
		err = keyfile.Remove(file)
	}
	return err
}

// Check asks the token for the keys in it, and says which one is missing or another one than the certificate's.
func (u *Upstream) Check(context.Context) error {
	u.mu.Lock()
	issuers := slices.Clone(u.issuers)
	u.mu.Unlock()
	for _, i := range issuers {
		k, ok := i.key.(*pkcs11.Key)
		if !ok {
			continue
		}
		there, err := u.o.Root.Tokens.Find(k.URI())
		if err != nil {
			return err
		}
		if !same(there.Public(), k.Public()) {
			return fmt.Errorf("the key %s is another one than the certificate of %s has", k.URI(), i.chain[0].Subject)
		}
	}
	return nil
}
