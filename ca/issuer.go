package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Grant is what the registration authority allows: everything that is signed comes from it, and nothing else does.
type Grant struct {
	ID spiffeid.ID
	// TTL is the life to issue for, from now to NotAfter; already within policy's cap. The profile clamps it.
	TTL time.Duration
	// DNSNames are granted DNS SANs, normally none.
	DNSNames []string
}

// Request asks the Issuer for one X509-SVID.
type Request struct {
	Grant Grant
	// PublicKey is the one thing taken from a CSR.
	PublicKey crypto.PublicKey
	// Evidence goes to the ledger as it is: canonical JSON of what the grant rests on. It holds no secret.
	Evidence []byte
}

// SVID is what was issued.
type SVID struct {
	ID spiffeid.ID
	// Chain is leaf first, then intermediates, never a root.
	Chain []*x509.Certificate
	// IssuedAt and NotAfter bound its life; Life is their difference.
	IssuedAt, NotAfter time.Time
	Life               time.Duration
}

// LedgerEntry is one intent to sign. Index is given by the store.
type LedgerEntry struct {
	Index          uint64
	Serial         []byte // big-endian, 16 bytes
	ID             string
	Profile        string
	IssuedAt       time.Time
	NotAfter       time.Time
	AuthorityKeyID []byte // SKI of the intermediate
	TBSDigest      []byte // SHA-256 of the TBSCertificate
	Evidence       []byte // JSON
}

// Ledger records intent before a key is used.
//
// Append returns nil only when the entry is durable; entries have one order for ever. It is called concurrently and
// groups what comes meanwhile. It returns LEDGER_UNAVAILABLE when nothing can be recorded, and then nothing is signed.
type Ledger interface {
	Append(ctx context.Context, e LedgerEntry) error
}
