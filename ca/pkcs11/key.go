package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync/atomic"

	"github.com/meshca/meshca/ca"
)

// Key is a key pair in a token; its private half stays there. It is safe for concurrent use.
type Key struct {
	modules *Modules
	uri     URI
	pub     crypto.PublicKey
	lost    atomic.Bool // the token was asked last, and has it no more
}

var (
	_ crypto.Signer    = (*Key)(nil)
	_ ca.ContextSigner = (*Key)(nil)
)

// Make makes an ECDSA P-256 key in the token, which cannot be taken out of it. Its label is u.Object, its CKA_ID u.ID, or
// where that is empty one made from the label. It refuses with fs.ErrExist when the token has a key with this label.
func (m *Modules) Make(u URI) (*Key, error) {
	if u.Object == "" {
		return nil, errors.New("a key in a token needs a label: object=NAME in its URI")
	}
	if u.ID == "" {
		u.ID = IDOf(u.Object)
	}
	signer, err := call(context.Background(), m, u, func(s *session) (crypto.Signer, error) {
		if _, err := s.device.find(u.Object, ""); !errors.Is(err, errNoKey) {
			if err == nil {
				err = fs.ErrExist
			}
			return nil, err
		}
		return s.device.make(u.Object, u.ID)
	})
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%w: %s. A key is never overwritten; if it is really to go, delete it yourself", fs.ErrExist, u)
	}
	if err != nil {
		return nil, fmt.Errorf("making the key %s: %w", u, err)
	}
	return &Key{modules: m, uri: u, pub: signer.Public()}, nil
}

// IDOf is the CKA_ID of a key that Make makes with this label, where none is named.
func IDOf(object string) string {
	sum := sha256.Sum256([]byte(object))
	return string(sum[:8])
}

// Find looks for a key that is in the token already.
func (m *Modules) Find(u URI) (*Key, error) {
	signer, err := call(context.Background(), m, u, func(s *session) (crypto.Signer, error) { return s.find(u) })
	if err != nil {
		return nil, fmt.Errorf("looking for the key %s: %w", u, err)
	}
	return &Key{modules: m, uri: u, pub: signer.Public()}, nil
}

// Known is a key of which a certificate tells the public half. The token is not asked before it is to sign, and then the
// key must be that one.
func (m *Modules) Known(u URI, pub crypto.PublicKey) *Key { return &Key{modules: m, uri: u, pub: pub} }

// Destroy deletes a key from its token; one that is not there is no error.
func (m *Modules) Destroy(u URI) error {
	if u.Object == "" || u.ID == "" {
		return errors.New("a key is destroyed by its label and its id")
	}
	_, err := call(context.Background(), m, u, func(s *session) (struct{}, error) {
		s.forget(u)
		return struct{}{}, s.device.destroy(u.Object, u.ID)
	})
	if err != nil {
		return fmt.Errorf("destroying the key %s: %w", u, err)
	}
	return nil
}

// URI names the key.
func (k *Key) URI() URI { return k.uri }

// Public is the key's public half.
func (k *Key) Public() crypto.PublicKey { return k.pub }

// Sign is SignContext without an end that is set from outside.
func (k *Key) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.SignContext(context.Background(), rand, digest, opts)
}

// SignContext has the token sign, and waits for it until ctx ends, and not for so long that it counts as silent. A failure
// ends the connection with the token, and the next call makes another one: sessions do not survive a token that was away.
// Nothing is sent twice.
func (k *Key) SignContext(ctx context.Context, rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, tooLong)
	defer cancel()
	digest = bytes.Clone(digest) // the call may outlast this one
	signature, err := call(ctx, k.modules, k.uri, func(s *session) ([]byte, error) {
		signer, err := s.find(k.uri)
		if err != nil {
			return nil, err
		}
		if pub, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(k.pub) {
			return nil, fmt.Errorf("%w: the key of this name is another one than was certified", errNoKey)
		}
		return signer.Sign(rand, digest, opts)
	})
	k.lost.Store(errors.Is(err, errNoKey))
	if err != nil {
		return nil, fmt.Errorf("signing with the key %s: %w", k.uri, err)
	}
	return signature, nil
}

// Ready says why the key cannot sign, as far as is known; nil when it can. Where the token answers and has it no more, the
// error is ca.ErrKeyLost.
func (k *Key) Ready() error {
	if err := k.modules.fault(k.uri); err != nil {
		return err
	}
	if k.lost.Load() {
		return fmt.Errorf("%w: %s", ca.ErrKeyLost, k.uri)
	}
	return nil
}
