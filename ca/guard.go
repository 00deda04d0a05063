package ca

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"io"
)

var (
	errSecondSignature = errors.New("the guard lets a key sign once for each issuance")
	errNotSHA256       = errors.New("the guard signs SHA-256 digests only: they are what the ledger records")
)

// guard is the crypto.Signer that the signing library gets in place of the intermediate's key. Its Sign appends the
// ledger entry with the digest that it is given, and only then, and only once, lets the key sign that digest. So the
// key cannot sign what is not recorded, whatever the library does.
//
// It serves one issuance and one goroutine.
type guard struct {
	ctx    context.Context
	key    crypto.Signer
	ledger Ledger
	entry  LedgerEntry

	digest  [sha256.Size]byte
	asked   bool
	signed  bool
	refused error
	failed  error // of the key
}

var _ crypto.Signer = (*guard)(nil)

func newGuard(ctx context.Context, key crypto.Signer, l Ledger, e LedgerEntry) *guard {
	return &guard{ctx: ctx, key: key, ledger: l, entry: e}
}

// Public is the key's.
func (g *guard) Public() crypto.PublicKey { return g.key.Public() }

// Sign records, then signs.
func (g *guard) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if g.asked {
		return nil, errSecondSignature
	}
	g.asked = true
	if opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
		return nil, errNotSHA256
	}
	// gofail: var leafPrepared struct{}
	copy(g.digest[:], digest)
	g.entry.TBSDigest = g.digest[:]
	if err := g.ledger.Append(g.ctx, g.entry); err != nil {
		g.refused = err
		return nil, err
	}
	// gofail: var leafRecorded struct{}
	signature, err := SignerFor(g.ctx, g.key).Sign(rand, g.digest[:], opts)
	if err != nil {
		g.failed = err
		return nil, err
	}
	g.signed = true
	return signature, nil
}

// recorded is the digest that the ledger holds; zero when nothing was signed.
func (g *guard) recorded() [sha256.Size]byte {
	if !g.signed {
		return [sha256.Size]byte{}
	}
	return g.digest
}
