package disk

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.step.sm/crypto/pemutil"
)

// maxFile bounds what is read from a certificate, key or passphrase file.
const maxFile = 1 << 20

func readChain(path string) ([]*x509.Certificate, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("the root's certificate: %w", err)
	}
	chain, err := pemutil.ParseCertificateBundle(data)
	if err != nil {
		return nil, fmt.Errorf("the root's certificate %s: %w", path, err)
	}
	return chain, nil
}

// readKey reads the key, with its passphrase where one is named.
func readKey(f Files) (crypto.Signer, error) {
	if err := checkPrivate(f.Key); err != nil {
		return nil, fmt.Errorf("the root's key: %w", err)
	}
	data, err := readFile(f.Key)
	if err != nil {
		return nil, fmt.Errorf("the root's key: %w", err)
	}
	defer clear(data)
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("the root's key %s is not PEM", f.Key)
	}
	options := []pemutil.Options{pemutil.WithFilename(f.Key)}
	encrypted := block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["Proc-Type"] == "4,ENCRYPTED"
	switch {
	case encrypted && f.Passphrase == "":
		return nil, fmt.Errorf("the root's key %s is encrypted: name the file that holds its passphrase, "+
			"or decrypt it: (umask 077; openssl pkey -in %s -out NEW)", f.Key, f.Key)
	case encrypted:
		pass, err := readPassphrase(f.Passphrase)
		if err != nil {
			return nil, err
		}
		defer clear(pass)
		options = append(options, pemutil.WithPassword(pass))
	}
	parsed, err := pemutil.Parse(data, options...)
	if err != nil {
		// The parser's words name the file and the fault, never the content.
		return nil, fmt.Errorf("the root's key: %w", err)
	}
	switch key := parsed.(type) {
	case *ecdsa.PrivateKey:
		return key, nil
	case *rsa.PrivateKey:
		return key, nil
	case ed25519.PrivateKey:
		return key, nil
	}
	return nil, fmt.Errorf("the root's key %s holds no private key that can sign", f.Key)
}

func readPassphrase(path string) ([]byte, error) {
	if err := checkPrivate(path); err != nil {
		return nil, fmt.Errorf("the passphrase of the root's key: %w", err)
	}
	data, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("the passphrase of the root's key: %w", err)
	}
	pass := bytes.TrimRight(data, "\r\n")
	if len(pass) == 0 {
		return nil, fmt.Errorf("the passphrase file %s is empty", path)
	}
	return pass, nil
}

// checkPrivate refuses a secret that others than its owner can read or write.
func checkPrivate(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is no regular file", path)
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s has mode %04o, so others than its owner can use it. Run: chmod 600 %s", path, info.Mode().Perm(), path)
	}
	return nil
}

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxFile {
		return nil, fmt.Errorf("%s has %d bytes, and at most %d are read", path, info.Size(), maxFile)
	}
	return os.ReadFile(path)
}

// writeNew writes a file that must not be there yet, and makes it durable.
func writeNew(path string, data []byte, mode fs.FileMode) (err error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: %s. A root is never overwritten; if it is really to go, move it away yourself", fs.ErrExist, path)
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	if _, err = file.Write(data); err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
