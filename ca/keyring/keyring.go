// Package keyring keeps the intermediates of a CA beyond its process: their keys in files or in a PKCS #11 token, their
// certificates in files.
//
// It has one file for each root, ROOT.json with mode 0600 in a directory with mode 0700. A file tells which intermediate
// is kept, and which keys in the token are to go or are not certified yet. It names a key before the token makes it, and
// until the token has deleted it: so whatever a crash leaves is found, and nothing is touched that others put there.
package keyring

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/keyfile"
	"github.com/meshca/meshca/ca/pkcs11"
)

// Config says where keys are.
type Config struct {
	// Dir is the directory of the files.
	Dir string
	// Token is where keys are made; its Object is what their labels begin with. The zero value: they are in the files.
	Token pkcs11.URI
	// Modules reach the token; needed if there is one.
	Modules *pkcs11.Modules
	// Log is told of keys that cannot be destroyed.
	Log *slog.Logger
}

// Ring makes, keeps and destroys keys. It is safe for concurrent use.
type Ring struct {
	c Config

	mu      sync.Mutex // guards what follows, and the files; the token is not asked while it is held
	records map[string]*record
	inHand  map[entry]bool // made or recalled by this process, and not destroyed
}

var _ ca.Keyring = (*Ring)(nil)

var _ ca.ContextSigner = (*key)(nil)

// key is one that a Ring made or recalled.
type key struct {
	crypto.Signer
	root  string
	entry entry
}

// Ready says why the key cannot sign; nil when it can, as far as is known.
func (k *key) Ready() error {
	if s, ok := k.Signer.(interface{ Ready() error }); ok {
		return s.Ready()
	}
	return nil
}

// SignContext has the key sign, and does not wait for a token beyond ctx.
func (k *key) SignContext(ctx context.Context, rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return ca.SignerFor(ctx, k.Signer).Sign(rand, digest, opts)
}

// Open reads the directory, which it makes where there is none. It refuses files that others can use: a key in one may be
// known to them. Retain is to follow, which destroys what nobody needs any more.
func Open(c Config) (*Ring, error) {
	if c.Token != (pkcs11.URI{}) && (c.Modules == nil || c.Token.Object == "") {
		return nil, errors.New("keyring: keys in a token need its modules, and a beginning for their labels")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if err := keyfile.OpenDir(c.Dir); err != nil {
		return nil, fmt.Errorf("the kept intermediates: %w", err)
	}
	records, err := readAll(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("the kept intermediates: %w", err)
	}
	r := &Ring{c: c, records: records, inHand: map[entry]bool{}}
	for root, rec := range records {
		// What was kept where the configuration does not keep keys any more is not used again.
		if rec.Kept != nil && !r.reaches(*rec.Kept) {
			if err := r.Forget(root); err != nil {
				return nil, fmt.Errorf("the kept intermediates: %w", err)
			}
		}
	}
	return r, nil
}

// inToken reports whether new keys are made in a token.
func (r *Ring) inToken() bool { return r.c.Token != (pkcs11.URI{}) }

// reaches reports whether a key is where this configuration keeps keys.
func (r *Ring) reaches(e entry) bool {
	if e.PEM != "" {
		return !r.inToken()
	}
	_, err := r.c.Token.Resolve(e.URI)
	return err == nil
}

// Make makes a key, in the token or in memory: it comes into a file with its certificate.
func (r *Ring) Make(root string) (crypto.Signer, error) {
	if !isRoot(root) {
		return nil, fmt.Errorf("keyring: %.70q names no root", root)
	}
	if !r.inToken() {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		text, err := encodeKey(k)
		if err != nil {
			return nil, err
		}
		return &key{Signer: k, root: root, entry: entry{PEM: text}}, nil
	}
	r.sweep()
	var drawn [8]byte
	if _, err := rand.Read(drawn[:]); err != nil {
		return nil, err
	}
	id := hex.EncodeToString(drawn[:])
	u := r.c.Token.WithKey(r.c.Token.Object+"-"+id, id)
	e := entry{URI: u.String()}
	if err := r.change(root, func(rec *record) { rec.Others = append(rec.Others, e) }, e); err != nil {
		return nil, err
	}
	made, err := r.c.Modules.Make(u)
	if err != nil {
		// It may be there all the same; the next sweep looks.
		r.release(e)
		return nil, err
	}
	return &key{Signer: made, root: root, entry: e}, nil
}

// Keep writes the intermediate down as the one of its root.
func (r *Ring) Keep(root string, kept ca.Kept) error {
	k, ok := kept.Key.(*key)
	if !ok || k.root != root || len(kept.Chain) == 0 {
		return errors.New("keyring: a key that was made elsewhere or for another root, or no chain")
	}
	return r.change(root, func(rec *record) {
		rec.forget()
		rec.Others = slices.DeleteFunc(rec.Others, func(e entry) bool { return e == k.entry })
		rec.Kept, rec.Chain, rec.Received = &k.entry, encodeChain(kept.Chain), kept.Received.UTC()
	})
}

// Recall reads what is kept below a root. A key in the token is not looked for before it is to sign.
func (r *Ring) Recall(root string) (ca.Kept, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.records[root]
	if rec == nil || rec.Kept == nil {
		return ca.Kept{}, nil
	}
	chain, err := decodeChain(rec.Chain)
	if err != nil {
		return ca.Kept{}, err
	}
	k := &key{root: root, entry: *rec.Kept}
	if k.entry.PEM != "" {
		k.Signer, err = decodeKey(k.entry.PEM)
	} else if u, unreachable := r.c.Token.Resolve(k.entry.URI); unreachable == nil {
		k.Signer = r.c.Modules.Known(u, chain[0].PublicKey)
	} else {
		err = unreachable
	}
	if err != nil {
		return ca.Kept{}, err
	}
	r.inHand[k.entry] = true
	return ca.Kept{Key: k, Chain: chain, Received: rec.Received}, nil
}

// Forget takes what is kept below a root off the record. A key in the token stays on it as one that is to go.
func (r *Ring) Forget(root string) error {
	r.mu.Lock()
	rec := r.records[root]
	r.mu.Unlock()
	if rec == nil {
		return nil
	}
	return r.change(root, (*record).forget)
}

// Retain forgets what is kept below other roots than these, and destroys it.
func (r *Ring) Retain(roots ...string) error {
	r.mu.Lock()
	var others []string
	for root := range r.records {
		if !slices.Contains(roots, root) {
			others = append(others, root)
		}
	}
	r.mu.Unlock()
	for _, root := range others {
		if err := r.Forget(root); err != nil {
			return fmt.Errorf("the kept intermediates: %w", err)
		}
	}
	r.sweep()
	for root, e := range r.orphans() {
		if !r.reaches(e) {
			r.c.Log.Warn("a key of a former intermediate is in a PKCS #11 token that the configuration does not name any more: "+
				"delete it with the token's own tools, and then the file that names it", "key", e.URI, "file", path(r.c.Dir, root))
		}
	}
	return nil
}

// Destroy ends a key of this Ring: in the token, and in the files if it is kept.
func (r *Ring) Destroy(signer crypto.Signer) error {
	k, ok := signer.(*key)
	if !ok {
		return errors.New("keyring: the key was made elsewhere")
	}
	err := r.change(k.root, func(rec *record) {
		if rec.Kept != nil && *rec.Kept == k.entry {
			rec.forget()
		}
	})
	r.release(k.entry)
	if err != nil || k.entry.PEM != "" {
		return err
	}
	return r.destroy(k.root, k.entry)
}

// destroy deletes a key from the token, and then from the record.
func (r *Ring) destroy(root string, e entry) error {
	u, err := r.c.Token.Resolve(e.URI)
	if err != nil {
		return err
	}
	if err := r.c.Modules.Destroy(u); err != nil {
		return err
	}
	return r.change(root, func(rec *record) {
		rec.Others = slices.DeleteFunc(rec.Others, func(o entry) bool { return o == e })
	})
}

// orphans are keys in a token that nobody needs, with their roots.
func (r *Ring) orphans() iter.Seq2[string, entry] {
	return func(yield func(string, entry) bool) {
		r.mu.Lock()
		records := maps.Clone(r.records) // a record is replaced, not changed
		inHand := maps.Clone(r.inHand)
		r.mu.Unlock()
		for root, rec := range records {
			for _, e := range rec.Others {
				if !inHand[e] && !yield(root, e) {
					return
				}
			}
		}
	}
}

// sweep destroys keys in the token that nobody needs. What fails is tried again at the next sweep.
func (r *Ring) sweep() {
	for root, e := range r.orphans() {
		if !r.reaches(e) {
			continue
		}
		if err := r.destroy(root, e); err != nil {
			r.c.Log.Warn("a key that no intermediate needs could not be destroyed; it is tried again", "key", e.URI, "err", err)
		}
	}
}

func (r *Ring) release(e entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.inHand, e)
}

// change writes a changed record, and only then counts it as changed. taken come into hand with it.
func (r *Ring) change(root string, edit func(*record), taken ...entry) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := record{Version: version, Root: root}
	if now := r.records[root]; now != nil {
		next = *now
		next.Others = slices.Clone(now.Others)
	}
	edit(&next)
	// gofail: var keyRecordMade struct{}
	if err := next.write(r.c.Dir); err != nil {
		return err
	}
	// gofail: var keyRecordWritten struct{}
	if next.empty() {
		delete(r.records, root)
	} else {
		r.records[root] = &next
	}
	for _, e := range taken {
		r.inHand[e] = true
	}
	return nil
}

// Abandon is for a CA whose keys stay in memory: it destroys what an earlier configuration kept, as far as it can.
func Abandon(dir string, log *slog.Logger) error {
	if there, err := exists(dir); !there {
		return err
	}
	r, err := Open(Config{Dir: dir, Log: log})
	if err != nil {
		return err
	}
	return r.Retain()
}
