package ca

import (
	"context"
	"time"
)

// LedgerEntry is one intent to sign. Index is given by the store.
type LedgerEntry struct {
	Index          uint64
	Serial         []byte // big-endian, 16 bytes
	ID             string
	Profile        string
	IssuedAt       time.Time
	NotAfter       time.Time
	AuthorityKeyID []byte // SKI of the intermediate
	Root           []byte // SHA-256 of the root above it
	TBSDigest      []byte // SHA-256 of the TBSCertificate
	Evidence       []byte // JSON
}

// Ledger records intent before a key is used.
//
// Append returns nil only when the entry is durable; entries have one order for ever. It is called concurrently and
// groups what comes meanwhile. It returns LEDGER_UNAVAILABLE when nothing can be recorded, and then nothing is signed.
// After an error the entry may stand in the ledger or not: an intent without a certificate does no harm.
type Ledger interface {
	Append(ctx context.Context, e LedgerEntry) error
}

// LedgerStore keeps the ledger.
//
// AppendLedger returns nil only when the whole group is durable (fsync, quorum); it is all or nothing. Indexes are
// given in the group's order, without gaps, starting at 1 for the store's first entry. The store does not keep the
// slices of the entries after it returns.
type LedgerStore interface {
	AppendLedger(ctx context.Context, group []LedgerEntry) error
}
