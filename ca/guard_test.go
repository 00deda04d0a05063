package ca

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/meshca/meshca/api/refusal"
)

func newTestGuard(t *testing.T, store *memory) (*guard, *spyKey) {
	key := &spyKey{Signer: newKey(t)}
	return newGuard(t.Context(), key, direct{store}, LedgerEntry{ID: "spiffe://example.org/a"}), key
}

func TestGuardRecordsBeforeItSigns(t *testing.T) {
	store := &memory{}
	g, key := newTestGuard(t, store)
	digest := sha256.Sum256([]byte("tbs"))
	if g.recorded() == digest {
		t.Error("recorded before it was asked")
	}
	if _, err := g.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
		t.Fatal(err)
	}
	entries := store.all()
	if len(entries) != 1 || string(entries[0].TBSDigest) != string(digest[:]) || key.signs != 1 || g.recorded() != digest {
		t.Errorf("%d entries, %d signatures", len(entries), key.signs)
	}
}

// TestGuardSignsByRFC6979: the same key and digest make the same signature.
func TestGuardSignsByRFC6979(t *testing.T) {
	key, digest := newKey(t), sha256.Sum256([]byte("tbs"))
	g := newGuard(t.Context(), key, direct{&memory{}}, LedgerEntry{})
	got, err := g.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	want, err := key.Sign(nil, digest[:], crypto.SHA256)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("another signature than that by RFC 6979, or %v", err)
	}
}

func TestGuardSignsOnce(t *testing.T) {
	store := &memory{}
	g, key := newTestGuard(t, store)
	digest := sha256.Sum256([]byte("tbs"))
	if _, err := g.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
		t.Fatal(err)
	}
	for _, again := range [][]byte{digest[:], make([]byte, 32)} {
		if _, err := g.Sign(rand.Reader, again, crypto.SHA256); !errors.Is(err, errSecondSignature) {
			t.Errorf("a second signature: %v", err)
		}
	}
	if key.signs != 1 || len(store.all()) != 1 {
		t.Errorf("%d signatures, %d entries", key.signs, len(store.all()))
	}
}

func TestGuardFailsWithItsLedger(t *testing.T) {
	for name, store := range map[string]*memory{
		"before the effect": {before: refusal.New(refusal.LedgerUnavailable, "full")},
		"after the effect":  {after: refusal.New(refusal.LedgerUnavailable, "full")},
	} {
		g, key := newTestGuard(t, store)
		digest := sha256.Sum256([]byte("tbs"))
		_, err := g.Sign(rand.Reader, digest[:], crypto.SHA256)
		wantReason(t, err, refusal.LedgerUnavailable)
		// Nor is there a second chance, with the ledger well again.
		store.set(nil, nil)
		if _, err := g.Sign(rand.Reader, digest[:], crypto.SHA256); !errors.Is(err, errSecondSignature) {
			t.Errorf("%s: a second try: %v", name, err)
		}
		if key.signs != 0 || g.recorded() == digest {
			t.Errorf("%s: %d signatures", name, key.signs)
		}
	}
}

func TestGuardSignsSHA256Only(t *testing.T) {
	for _, c := range []struct {
		digest []byte
		hash   crypto.Hash
	}{{make([]byte, 48), crypto.SHA384}, {make([]byte, 20), crypto.SHA1}, {make([]byte, 31), crypto.SHA256}, {make([]byte, 32), 0}} {
		store := &memory{}
		g, key := newTestGuard(t, store)
		if _, err := g.Sign(rand.Reader, c.digest, c.hash); !errors.Is(err, errNotSHA256) {
			t.Errorf("%v: %v", c.hash, err)
		}
		if key.signs != 0 || len(store.all()) != 0 {
			t.Errorf("%v: %d signatures, %d entries", c.hash, key.signs, len(store.all()))
		}
	}
}
