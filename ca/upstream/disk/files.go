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

	"go.step.sm/crypto/pemutil"

	"github.com/meshca/meshca/ca/keyfile"
	"github.com/meshca/meshca/ca/pkcs11"
)

func readChain(path string) ([]*x509.Certificate, error) {
	data, err := keyfile.Read(path)
	if err != nil {
		return nil, fmt.Errorf("the root's certificate: %w", err)
	}
	chain, err := pemutil.ParseCertificateBundle(data)
	if err != nil {
		return nil, fmt.Errorf("the root's certificate %s: %w", path, err)
	}
	return chain, nil
}

// openKey reads the key, or names the one in the token.
func openKey(f Files, cert *x509.Certificate) (crypto.Signer, error) {
	if !pkcs11.IsURI(f.Key) {
		return readKey(f)
	}
	u, err := f.uri()
	if err != nil {
		return nil, err
	}
	return f.Tokens.Known(u, cert.PublicKey), nil
}

// uri reads the name of a key in a token.
func (f Files) uri() (pkcs11.URI, error) {
	if f.Passphrase != "" {
		return pkcs11.URI{}, errors.New("the root's key is in a PKCS #11 token, which knows no passphrase: its PIN comes from the URI's pin-source")
	}
	u, err := pkcs11.Parse(f.Key)
	if err == nil && u.Object == "" {
		err = errors.New("the URI names no key: ;object=LABEL")
	}
	if err == nil && f.Tokens == nil {
		err = errors.New("nothing is there to reach PKCS #11 tokens with")
	}
	if err != nil {
		return pkcs11.URI{}, fmt.Errorf("the root's key: %w", err)
	}
	return u, nil
}

// readKey reads the key, with its passphrase where one is named.
func readKey(f Files) (crypto.Signer, error) {
	if err := keyfile.Check(f.Key); err != nil {
		return nil, fmt.Errorf("the root's key: %w", err)
	}
	data, err := keyfile.Read(f.Key)
	if err != nil {
		return nil, fmt.Errorf("the root's key: %w", err)
	}
	defer clear(data)
	block, alone, err := keyBlock(f.Key, data)
	if err != nil {
		return nil, err
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
	parsed, err := pemutil.Parse(alone, options...)
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

// keyBlock finds the one PEM block of a key's file, and returns it with its text. The name of a curve may stand before it,
// which `openssl ecparam -genkey` writes there: the key says it too.
func keyBlock(path string, data []byte) (block *pem.Block, text []byte, err error) {
	block, rest := pem.Decode(data)
	if block == nil {
		return nil, nil, fmt.Errorf("the root's key %s is not PEM", path)
	}
	if block.Type == "EC PARAMETERS" {
		data = rest
		if block, rest = pem.Decode(data); block == nil {
			return nil, nil, fmt.Errorf("the root's key %s holds no private key, only the name of a curve", path)
		}
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return nil, nil, fmt.Errorf("the root's key %s holds more than the key: leave that alone in it: (umask 077; openssl pkey -in %s -out NEW)", path, path)
	}
	return block, data, nil
}

func readPassphrase(path string) ([]byte, error) {
	pass, err := keyfile.ReadSecret(path)
	if err != nil {
		return nil, fmt.Errorf("the passphrase of the root's key: %w", err)
	}
	return pass, nil
}

// writeNew writes a file that must not be there yet, and makes it durable.
func writeNew(path string, data []byte, mode fs.FileMode) error {
	err := keyfile.WriteNew(path, data, mode)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: %s. A root is never overwritten; if it is really to go, move it away yourself", fs.ErrExist, path)
	}
	return err
}
