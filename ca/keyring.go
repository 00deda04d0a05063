package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"time"
)

// Kept is an intermediate as a Keyring keeps it.
type Kept struct {
	Key crypto.Signer
	// Chain is the intermediate first.
	Chain []*x509.Certificate
	// Received is when the intermediate came: its half-life is counted from there.
	Received time.Time
}

// Keyring makes the keys of intermediates, and may keep them, so that a process goes on where another one ended. There is
// one intermediate for each root; roots go by their IDs.
//
// Make, Keep, Forget and Destroy are durable when they return without an error. A key is its maker's until it is
// destroyed; those that nobody destroyed and nothing keeps are gone, at the latest, when the next process has opened the
// Keyring. A key that can lose its power to sign (it is in another machine) has a method Ready() error.
//
// It is safe for concurrent use; Make and Destroy may be slow.
type Keyring interface {
	// Make makes a new ECDSA P-256 key for an intermediate below a root.
	Make(root string) (crypto.Signer, error)
	// Keep makes the intermediate the one that Recall returns for a root. Its predecessor's key stays good until Destroy.
	Keep(root string, k Kept) error
	// Recall returns what is kept below a root; the Key is nil when nothing is. It does not look whether it is any good.
	Recall(root string) (Kept, error)
	// Forget has Recall return nothing below a root any more. What was kept stays good, in this process, until Destroy.
	Forget(root string) error
	// Destroy ends a key that Make or Recall returned.
	Destroy(key crypto.Signer) error
}

// ContextSigner is a key that is asked elsewhere, where an answer may not come.
type ContextSigner interface {
	crypto.Signer
	// SignContext is Sign, and returns when ctx ends at the latest.
	SignContext(ctx context.Context, rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error)
}

// SignerFor is the key, which is not waited for beyond ctx where it is elsewhere.
func SignerFor(ctx context.Context, key crypto.Signer) crypto.Signer {
	if k, ok := key.(ContextSigner); ok {
		return signerFor{k, ctx}
	}
	return key
}

// signerFor is a key on behalf of one call.
type signerFor struct {
	ContextSigner
	ctx context.Context //nolint:containedctx // that of the call whose key this is
}

// Sign has the key sign before ctx ends.
func (s signerFor) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return s.SignContext(s.ctx, rand, digest, opts)
}

// ErrKeyLost is what Ready of a Keyring's key returns when the key is gone for good: see Line.Mend.
var ErrKeyLost = errors.New("the key is gone from where it was kept")

// memoryKeys live as long as the process.
type memoryKeys struct{}

var _ Keyring = memoryKeys{}

// Make makes a key.
func (memoryKeys) Make(string) (crypto.Signer, error) {
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

// Keep does nothing: nothing outlives the process.
func (memoryKeys) Keep(string, Kept) error { return nil }

// Recall returns nothing.
func (memoryKeys) Recall(string) (Kept, error) { return Kept{}, nil }

// Forget has nothing to forget.
func (memoryKeys) Forget(string) error { return nil }

// Destroy leaves the key to the collector: nobody holds it any more.
func (memoryKeys) Destroy(crypto.Signer) error { return nil }

// recall looks whether the line has an intermediate from an earlier process that it can go on with: it is held to all
// that a new one is, but for what is left of its life. It returns nil when there is none, and with an error when there is
// one that is no good; the next one takes its place.
func (l *Line) recall() (*Signer, error) {
	c := l.authority.c
	kept, err := c.Keys.Recall(l.root)
	if err != nil {
		return nil, fmt.Errorf("ca: reading the intermediate that was kept: %w", err)
	}
	if kept.Key == nil {
		return nil, nil
	}
	s, err := l.check(kept)
	if err != nil {
		l.hold(kept.Key)
		return nil, fmt.Errorf("ca: the intermediate that was kept: %w", err)
	}
	return s, nil
}

// hold has the key destroyed when the line has an intermediate.
func (l *Line) hold(key crypto.Signer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.key = key
}

// check says whether what was kept is good.
func (l *Line) check(kept Kept) (*Signer, error) {
	c := l.authority.c
	root, err := c.Trust.root(l.root)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	request := IntermediateRequest{PublicKey: kept.Key.Public(), TrustDomain: l.authority.trustDomain, Life: c.Life}
	notAfter, err := l.vet(kept.Chain, request, root, now)
	switch {
	case err != nil:
		return nil, err
	case notAfter.Sub(now) < margin(c.LeafTTL):
		return nil, fmt.Errorf("it ends at %s, too soon to issue under it", notAfter.UTC().Format(time.RFC3339))
	}
	return newSigner(root, kept, notAfter), nil
}
