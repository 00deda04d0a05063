package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/rotation"
)

// ErrConflict is what SwapBundle returns when the stored sequence is not the expected one.
var ErrConflict = errors.New("the stored bundle has another sequence than was expected")

// ErrRootUnknown is wrapped by the error of NewTrust for an upstream whose root is not in the stored bundle.
var ErrRootUnknown = errors.New("the upstream's root is not in the trust bundle")

// errRootEnded is wrapped by the error for a root whose certificate has ended.
var errRootEnded = errors.New("ended")

// ErrTrustDomain is wrapped by NewTrust's error when the store or a root belongs to another trust domain.
var ErrTrustDomain = errors.New("not of this trust domain")

// BundleStore keeps the trust bundle.
type BundleStore interface {
	// Bundle returns what is stored; the zero StoredBundle when nothing is.
	Bundle(ctx context.Context) (StoredBundle, error)
	// SwapBundle replaces the bundle durably if the stored sequence is expected (0: nothing is stored), else it returns
	// ErrConflict. next has a higher sequence.
	SwapBundle(ctx context.Context, expected uint64, next StoredBundle) error
}

// TrustConfig is what a Trust starts from.
type TrustConfig struct {
	TrustDomain spiffeid.TrustDomain
	Store       BundleStore
	// Roots are those of the upstream's issuers that the configuration names. At the first start they become the bundle;
	// later there may be none, where the upstream cannot be asked or has lost them, and one that was replaced may have ended.
	Roots []*x509.Certificate
	// Others are the upstream's further roots. Where Roots are known after the first start, at least one of the upstream's
	// roots must be in the bundle: a store that knows a root never gets another one because the upstream has it.
	Others []*x509.Certificate
	// Anchors are extra roots that the configuration names. What an operator names is trusted: they are added.
	Anchors []*x509.Certificate
}

// Trust is the trust bundle of the trust domain: roots alone, with a sequence that begins with the clock and grows by one with
// each change. It is durable before anyone sees it. It is safe for concurrent use, also by several processes on one store.
type Trust struct {
	td      spiffeid.TrustDomain
	store   BundleStore
	current rotation.Current[*spiffebundle.Bundle]
	// roots are the current bundle's, for reading only.
	roots atomic.Pointer[[]*x509.Certificate]
	// rootKeys are their keys by keyName.
	rootKeys atomic.Pointer[map[string]struct{}]

	mu sync.Mutex // orders publications
}

// NewTrust reads the stored bundle, or makes it at the first start. It refuses an upstream whose root the stored bundle
// does not hold (ErrRootUnknown); the error says what to do.
func NewTrust(ctx context.Context, c TrustConfig) (*Trust, error) {
	if c.TrustDomain.IsZero() || c.Store == nil {
		return nil, errors.New("ca: a trust bundle needs a trust domain and a store")
	}
	t := &Trust{td: c.TrustDomain, store: c.Store}
	stored, err := t.reload(ctx)
	if err != nil {
		return nil, err
	}
	// A CA must not stay down over an anchor that an earlier build took in, and that stays.
	c.Anchors = slices.DeleteFunc(slices.Clone(c.Anchors), func(r *x509.Certificate) bool {
		return CheckIssuerUsage(r) != nil && stored.HasX509Authority(r)
	})
	named := slices.Concat(c.Roots, c.Anchors)
	for i, r := range named {
		if err := checkRoot(r, c.TrustDomain, time.Now()); err != nil && !(i < len(c.Roots) && !stored.Empty() && replaceable(err)) {
			return nil, err
		}
	}
	switch {
	case stored.Empty() && len(c.Roots) == 0:
		return nil, errors.New("ca: there is no root to begin with: the upstream has none that the configuration names")
	case stored.Empty():
		if err := t.AddRoots(ctx, named...); err != nil {
			return nil, err
		}
		return t, nil
	}
	if err := t.CheckUpstream(c.Roots, c.Others); err != nil {
		return nil, err
	}
	if err := t.AddRoots(ctx, c.Anchors...); err != nil {
		return nil, err
	}
	return t, nil
}

// CheckUpstream refuses, with ErrRootUnknown, an upstream of which the bundle has no root, neither one of those issuers
// that the configuration names nor another one. Where nothing is known of the roots that are named, this tells no other
// upstream from one that has lost them.
func (t *Trust) CheckUpstream(named, others []*x509.Certificate) error {
	bundle := t.current.Value()
	if len(named) > 0 && !slices.ContainsFunc(slices.Concat(named, others), bundle.HasX509Authority) {
		return fmt.Errorf("%w: the upstream has %q (SHA-256 %x), the bundle of %s (sequence %d) does not hold it. "+
			"If this is the wrong upstream or the wrong state directory, correct the configuration. A new root comes beside the old "+
			"one: start with the upstream that has the old one, bring the new one there (on disk as NAME.crt and NAME.key in the "+
			"state directory's roots/, in Vault as an issuer of the same mount), and `certctl ca rotate root --issuer REF` goes to "+
			"it. For a root in another upstream, start with the old one, run `certctl ca root import` with the new one's "+
			"certificate, wait until the agents have that bundle, change the upstream, and then rotate to it",
			ErrRootUnknown, named[0].Subject, fingerprint(named[0]), t.td, sequence(bundle))
	}
	return nil
}

// Bundle returns the bundle, which must not be changed, and a channel that closes when it is stale.
func (t *Trust) Bundle() (*spiffebundle.Bundle, <-chan struct{}) { return t.current.Get() }

// Judge says why one of these cannot be a root of the bundle; nil: all can. AddRoots asks the same.
func (t *Trust) Judge(roots ...*x509.Certificate) error {
	for _, r := range roots {
		if err := checkRoot(r, t.td, time.Now()); err != nil {
			return err
		}
	}
	return nil
}

// AddRoots adds roots, and raises the sequence by one if any of them was new.
func (t *Trust) AddRoots(ctx context.Context, roots ...*x509.Certificate) error {
	if err := t.Judge(roots...); err != nil {
		return err
	}
	return t.change(ctx, 0, func(b *spiffebundle.Bundle) {
		for _, r := range roots {
			b.AddX509Authority(r)
		}
	})
}

// RemoveRoot takes a root out, and raises the sequence if it was there. It refuses to take out the last one.
func (t *Trust) RemoveRoot(ctx context.Context, id string) error {
	var last bool
	err := t.change(ctx, 0, func(b *spiffebundle.Bundle) {
		for _, r := range b.X509Authorities() {
			if RootID(r) == id {
				if last = len(b.X509Authorities()) == 1; !last {
					b.RemoveX509Authority(r)
				}
			}
		}
	})
	if err == nil && last {
		return fmt.Errorf("ca: the root %s is the last one of the bundle: without it nobody would trust anybody", id)
	}
	return err
}

// RaiseSequence makes the sequence greater than beyond, if it is not, and returns it. Those who hold a bundle of a lost
// past follow again: between two bundles the higher sequence wins.
func (t *Trust) RaiseSequence(ctx context.Context, beyond uint64) (uint64, error) {
	err := t.change(ctx, beyond, func(*spiffebundle.Bundle) {})
	return sequence(t.current.Value()), err
}

// root finds a root of the bundle by its RootID.
func (t *Trust) root(id string) (*x509.Certificate, error) {
	for _, r := range *t.roots.Load() {
		if RootID(r) == id {
			return r, nil
		}
	}
	return nil, fmt.Errorf("ca: the root %.64s is not in the trust bundle", id)
}

// maxSwaps bounds the tries against other writers of the same store.
const maxSwaps = 16

// change applies edit to a copy of the stored bundle and swaps it in under the next sequence, which is greater than
// beyond; nothing happens when edit changes nothing and the sequence is. It tries again when another process was quicker.
func (t *Trust) change(ctx context.Context, beyond uint64, edit func(*spiffebundle.Bundle)) error {
	for range maxSwaps {
		old, err := t.reload(ctx)
		if err != nil {
			return err
		}
		next := old.Clone()
		edit(next)
		if next.Equal(old) && (beyond == 0 || sequence(old) > beyond) {
			return nil
		}
		following := max(sequence(old), beyond) + 1
		if sequence(old) == 0 {
			following = max(following, firstSequence())
		}
		next.SetSequenceNumber(following)
		data, err := encodeBundle(next)
		if err != nil {
			return err
		}
		// gofail: var bundleMade struct{}
		err = t.store.SwapBundle(ctx, sequence(old), StoredBundle{Sequence: sequence(next), JSON: data})
		switch {
		case errors.Is(err, ErrConflict):
			continue
		case err != nil:
			// It may have taken effect all the same: whoever asks next reads what is stored.
			return fmt.Errorf("ca: storing the trust bundle: %w", err)
		}
		// gofail: var bundleStored struct{}
		t.publish(next)
		// gofail: var bundlePublished struct{}
		return nil
	}
	return fmt.Errorf("ca: storing the trust bundle: %w, %d times", ErrConflict, maxSwaps)
}

// firstSequence is that of a new store: Unix seconds. So a CA that was made anew is newer than the one before, whose sequence
// grew by ones, and agents, which go by the sequence alone, take its bundle from their file.
func firstSequence() uint64 { return uint64(max(1, time.Now().Unix())) }

// reload reads the stored bundle and publishes it if it is newer than ours.
func (t *Trust) reload(ctx context.Context) (*spiffebundle.Bundle, error) {
	stored, err := t.store.Bundle(ctx)
	if err != nil {
		return nil, fmt.Errorf("ca: reading the trust bundle: %w", err)
	}
	b := spiffebundle.New(t.td)
	if stored.Sequence > 0 {
		if b, err = t.decode(stored.JSON); err != nil {
			return nil, err
		}
	}
	b.SetSequenceNumber(stored.Sequence)
	t.publish(b)
	return b, nil
}

// memberTrustDomain stands in the stored bundle beside SPIFFE's own members, which do not name the trust domain: a store,
// its ledger and its root serve one for ever.
const memberTrustDomain = "trust_domain"

func encodeBundle(b *spiffebundle.Bundle) ([]byte, error) {
	data, err := b.Marshal()
	if err != nil {
		return nil, fmt.Errorf("ca: encoding the trust bundle: %w", err)
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(data, &members); err != nil {
		return nil, fmt.Errorf("ca: encoding the trust bundle: %w", err)
	}
	if members[memberTrustDomain], err = json.Marshal(b.TrustDomain().Name()); err != nil {
		return nil, fmt.Errorf("ca: encoding the trust bundle: %w", err)
	}
	return json.Marshal(members)
}

func (t *Trust) decode(data []byte) (*spiffebundle.Bundle, error) {
	b, err := spiffebundle.Parse(t.td, data)
	if err != nil {
		return nil, fmt.Errorf("ca: the stored trust bundle: %w", err)
	}
	of, err := StoredBundle{JSON: data}.TrustDomain()
	if err != nil {
		return nil, err
	}
	if of != t.td.Name() {
		return nil, fmt.Errorf("%w: the store is of trust domain %q, the configuration says %q. A trust domain cannot be renamed: "+
			"correct trustDomain, or give the new trust domain a state directory and a root of its own", ErrTrustDomain, of, t.td.Name())
	}
	return b, nil
}

// TrustDomain is the name of the bundle's trust domain; empty where nothing is stored.
func (b StoredBundle) TrustDomain() (string, error) {
	if len(b.JSON) == 0 {
		return "", nil
	}
	var of struct {
		TrustDomain string `json:"trust_domain"`
	}
	if err := json.Unmarshal(b.JSON, &of); err != nil {
		return "", fmt.Errorf("ca: the stored trust bundle: %w", err)
	}
	return of.TrustDomain, nil
}

// Roots are those of the bundle; none where nothing is stored.
func (b StoredBundle) Roots() ([]*x509.Certificate, error) {
	bundle, err := b.parse()
	if bundle == nil || err != nil {
		return nil, err
	}
	return bundle.X509Authorities(), nil
}

// With is the bundle with further roots, under the sequence that it has.
func (b StoredBundle) With(roots ...*x509.Certificate) (StoredBundle, error) {
	bundle, err := b.parse()
	if err != nil {
		return b, err
	}
	if bundle == nil {
		return b, errors.New("ca: nothing is stored that roots could be added to")
	}
	for _, r := range roots {
		bundle.AddX509Authority(r)
	}
	b.JSON, err = encodeBundle(bundle)
	return b, err
}

// parse is the bundle itself; nil where nothing is stored.
func (b StoredBundle) parse() (*spiffebundle.Bundle, error) {
	name, err := b.TrustDomain()
	if name == "" || err != nil {
		return nil, err
	}
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return nil, fmt.Errorf("ca: the stored trust bundle: %w", err)
	}
	bundle, err := spiffebundle.Parse(td, b.JSON)
	if err != nil {
		return nil, fmt.Errorf("ca: the stored trust bundle: %w", err)
	}
	bundle.SetSequenceNumber(b.Sequence)
	return bundle, nil
}

// publish shows b if nothing newer is shown.
func (t *Trust) publish(b *spiffebundle.Bundle) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if have := t.current.Value(); have == nil || sequence(have) < sequence(b) {
		roots := b.X509Authorities()
		t.roots.Store(&roots)
		keys := make(map[string]struct{}, len(roots))
		for _, r := range roots {
			keys[keyName(r.PublicKey)] = struct{}{}
		}
		t.rootKeys.Store(&keys)
		t.current.Set(b)
	}
}

// replaceable says whether what is wrong with a root is a reason to replace it, over which a CA must not stay down.
func replaceable(err error) bool {
	return errors.Is(err, errRootEnded) || errors.Is(err, ErrWeakKey) || errors.Is(err, ErrUsage)
}

// checkRoot says whether a certificate can be a trust anchor of the trust domain.
func checkRoot(r *x509.Certificate, td spiffeid.TrustDomain, now time.Time) error {
	// X509-SVID §4.1: a signing certificate may have a SPIFFE ID, then one of the trust domain alone. Roots without are common.
	for _, uri := range r.URIs {
		if id, err := spiffeid.FromURI(uri); err == nil && id.TrustDomain() != td {
			return fmt.Errorf("%w: the root %q (SHA-256 %x) is that of %s, the configuration says %s", ErrTrustDomain, r.Subject, fingerprint(r), id, td.IDString())
		}
	}
	switch {
	case !r.BasicConstraintsValid || !r.IsCA:
		return fmt.Errorf("ca: %q (SHA-256 %x) is no CA certificate and cannot be a root", r.Subject, fingerprint(r))
	case r.KeyUsage != 0 && r.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("ca: the root %q (SHA-256 %x) may not sign certificates (no keyCertSign)", r.Subject, fingerprint(r))
	case !bytes.Equal(r.RawIssuer, r.RawSubject):
		return fmt.Errorf("ca: %q (SHA-256 %x) is an intermediate; the bundle holds roots only", r.Subject, fingerprint(r))
	case now.After(r.NotAfter):
		return fmt.Errorf("ca: the root %q (SHA-256 %x) %w at %s", r.Subject, fingerprint(r), errRootEnded, r.NotAfter.Format(time.RFC3339))
	}
	if err := CheckIssuerKey(r.PublicKey); err != nil {
		return fmt.Errorf("ca: the root %q (SHA-256 %x) has %w. Bring one with a stronger key", r.Subject, fingerprint(r), err)
	}
	if err := CheckIssuerUsage(r); err != nil {
		return fmt.Errorf("ca: the root %q (SHA-256 %x) has %w. Bring one that is not so restricted", r.Subject, fingerprint(r), err)
	}
	return nil
}

func sequence(b *spiffebundle.Bundle) uint64 {
	n, _ := b.SequenceNumber()
	return n
}
