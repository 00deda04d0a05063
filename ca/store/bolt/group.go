package bolt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/meshca/meshca/ca"
)

// A group is one value of the ledger's bucket; its key is the index of its first entry, big-endian. Layout:
//
//	byte     format version, 2
//	uint64   the latest NotAfter of its entries, Unix seconds, big-endian: what pruning reads
//	uvarint  number of entries, then each:
//	         serial, id, profile, authority key id, root, TBS digest, evidence: uvarint length and bytes
//	         varint IssuedAt, Unix nanoseconds; varint NotAfter, Unix seconds
const groupVersion = 2

// groupHeader is the size of the version and the latest NotAfter.
const groupHeader = 1 + 8

var errGroup = errors.New("the ledger holds a group that cannot be read")

// encodeGroup is the value of a group.
func encodeGroup(group []ca.LedgerEntry) []byte {
	var last int64
	size := groupHeader + binary.MaxVarintLen64
	for i := range group {
		e := &group[i]
		last = max(last, e.NotAfter.Unix())
		size += len(e.Serial) + len(e.ID) + len(e.Profile) + len(e.AuthorityKeyID) + len(e.Root) + len(e.TBSDigest) + len(e.Evidence) +
			9*binary.MaxVarintLen32
	}
	b := append(make([]byte, 0, size), groupVersion)
	b = binary.BigEndian.AppendUint64(b, uint64(last))
	b = binary.AppendUvarint(b, uint64(len(group)))
	for i := range group {
		e := &group[i]
		b = appendBytes(b, e.Serial)
		b = appendBytes(b, e.ID)
		b = appendBytes(b, e.Profile)
		b = appendBytes(b, e.AuthorityKeyID)
		b = appendBytes(b, e.Root)
		b = appendBytes(b, e.TBSDigest)
		b = appendBytes(b, e.Evidence)
		b = binary.AppendVarint(b, e.IssuedAt.UnixNano())
		b = binary.AppendVarint(b, e.NotAfter.Unix())
	}
	return b
}

func appendBytes[T string | []byte](b []byte, v T) []byte {
	b = binary.AppendUvarint(b, uint64(len(v)))
	return append(b, v...)
}

// groupEnd reads the latest NotAfter from a group's header.
func groupEnd(value []byte) (time.Time, error) {
	if len(value) < groupHeader || value[0] != groupVersion {
		return time.Time{}, errGroup
	}
	return time.Unix(int64(binary.BigEndian.Uint64(value[1:])), 0), nil
}

// groupSize reads the number of its entries.
func groupSize(value []byte) (uint64, error) {
	if _, err := groupEnd(value); err != nil {
		return 0, err
	}
	r := reader{b: value[groupHeader:]}
	if n := r.uvarint(); !r.failed {
		return n, nil
	}
	return 0, errGroup
}

// readGroup decodes a group whose first entry has the index first. The entries share no memory with value.
func readGroup(first uint64, value []byte) ([]ca.LedgerEntry, error) {
	if _, err := groupEnd(value); err != nil {
		return nil, err
	}
	r := reader{b: value[groupHeader:]}
	n := r.uvarint()
	// An entry takes at least eight bytes, so a count beyond that is no count.
	if n > uint64(len(r.b))/8 {
		return nil, errGroup
	}
	group := make([]ca.LedgerEntry, 0, n)
	for i := range n {
		e := ca.LedgerEntry{Index: first + i}
		e.Serial = r.bytes()
		e.ID = string(r.bytes())
		e.Profile = string(r.bytes())
		e.AuthorityKeyID = r.bytes()
		e.Root = r.bytes()
		e.TBSDigest = r.bytes()
		e.Evidence = r.bytes()
		e.IssuedAt = time.Unix(0, r.varint()).UTC()
		e.NotAfter = time.Unix(r.varint(), 0).UTC()
		group = append(group, e)
	}
	if r.failed || len(r.b) > 0 {
		return nil, fmt.Errorf("%w: index %d", errGroup, first)
	}
	return group, nil
}

// reader takes values from the front; after a fault it yields zeros.
type reader struct {
	b      []byte
	failed bool
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.fail()
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) varint() int64 {
	v, n := binary.Varint(r.b)
	if n <= 0 {
		r.fail()
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) bytes() []byte {
	n := r.uvarint()
	if n > uint64(len(r.b)) {
		r.fail()
		return nil
	}
	v := append([]byte(nil), r.b[:n]...)
	r.b = r.b[n:]
	return v
}

func (r *reader) fail() { r.failed, r.b = true, nil }
