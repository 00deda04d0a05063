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
// A key in this process signs by RFC 6979: the nonce comes from key and digest, so no weak random source can give the key away,
// and none has to be asked. What that is weak to is a right and a faulty signature of one digest: here a digest is signed once,
// and x509.CreateCertificate lets no signature out that does not verify.
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
func (g *guard) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
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
	signature, err := SignerFor(g.ctx, g.key).Sign(nil, g.digest[:], opts) // nil asks for RFC 6979; what is in a token draws by itself
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
