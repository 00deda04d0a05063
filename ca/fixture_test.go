package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/ca/lint"
)

var testDomain = spiffeid.RequireTrustDomainFromString("example.org")

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// rootUpstream signs with crypto/x509 alone, and can be told to sign something else than it was asked for.
type rootUpstream struct {
	root *x509.Certificate
	key  crypto.Signer
	life time.Duration // the longest that it gives; zero: what is asked

	mu     sync.Mutex
	edit   func(template *x509.Certificate)                    // before signing
	after  func(chain []*x509.Certificate) []*x509.Certificate // after signing
	fail   error
	signed int
}

func newRoot(t testing.TB, name string, life time.Duration, edits ...func(*x509.Certificate)) *rootUpstream {
	t.Helper()
	key := newKey(t)
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(life),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            -1,
	}
	for _, edit := range edits {
		edit(template)
	}
	return &rootUpstream{root: sign(t, template, template, key.Public(), key), key: key}
}

func sign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (u *rootUpstream) named() Root {
	return Root{ID: RootID(u.root), Ref: "issuer of " + RootID(u.root)}
}

func (u *rootUpstream) Issuers(context.Context) ([]UpstreamIssuer, error) {
	return []UpstreamIssuer{{Ref: u.named().Ref, Root: u.root, NotAfter: u.root.NotAfter, Named: true}}, nil
}

func (u *rootUpstream) SignIntermediate(_ context.Context, ref string, r IntermediateRequest) ([]*x509.Certificate, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.fail != nil {
		return nil, u.fail
	}
	if ref != u.named().Ref {
		return nil, errors.New("no such issuer")
	}
	life := r.Life
	if u.life > 0 {
		life = min(life, u.life)
	}
	u.signed++
	keyID, err := subjectKeyID(r.PublicKey)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(int64(100 + u.signed)),
		Subject:               pkix.Name{CommonName: r.CommonName},
		NotBefore:             now.Add(-time.Minute),
		NotAfter:              now.Add(life).Truncate(time.Second),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		SubjectKeyId:          keyID,
		URIs:                  []*url.URL{r.TrustDomain.ID().URL()},
		PublicKey:             r.PublicKey,
	}
	if u.edit != nil {
		u.edit(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, u.root, template.PublicKey, u.key)
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	chain := []*x509.Certificate{c}
	if u.after != nil {
		chain = u.after(chain)
	}
	return chain, nil
}

// memory is a store at the wire of BundleStore and LedgerStore. It fails before or after an effect when told to.
type memory struct {
	mu      sync.Mutex
	bundle  StoredBundle
	first   uint64 // the sequence of the first bundle
	entries []LedgerEntry
	groups  []int
	before  error // nothing happens
	after   error // it happens, and the caller hears that it did not
	delay   time.Duration
}

// changes is how often the bundle was changed since the first one.
func (m *memory) changes() uint64 { return m.bundle.Sequence - m.first }

func (m *memory) Bundle(context.Context) (StoredBundle, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.bundle, m.before
}

func (m *memory) SwapBundle(_ context.Context, expected uint64, next StoredBundle) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.before != nil {
		return m.before
	}
	if m.bundle.Sequence != expected {
		return ErrConflict
	}
	if expected == 0 {
		m.first = next.Sequence
	}
	m.bundle = StoredBundle{next.Sequence, bytes.Clone(next.JSON)}
	return m.after
}

func (m *memory) AppendLedger(_ context.Context, group []LedgerEntry) error {
	m.mu.Lock()
	before, after, delay := m.before, m.after, m.delay
	m.mu.Unlock()
	time.Sleep(delay)
	if before != nil {
		return before
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.groups = append(m.groups, len(group))
	for _, e := range group {
		e.Index = uint64(len(m.entries) + 1)
		e.TBSDigest = slices.Clone(e.TBSDigest)
		m.entries = append(m.entries, e)
	}
	return after
}

func (m *memory) set(before, after error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.before, m.after = before, after
}

func (m *memory) all() []LedgerEntry {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.entries)
}

func (m *memory) commits() []int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.groups)
}

// direct is a Ledger without a sequencer: one entry, one append.
type direct struct{ *memory }

func (d direct) Append(ctx context.Context, e LedgerEntry) error {
	return d.AppendLedger(ctx, []LedgerEntry{e})
}

// house is a whole CA in memory.
type house struct {
	upstream  *rootUpstream
	store     *memory
	trust     *Trust
	authority *Authority
	line      *Line
	issuer    *Issuer
}

func newHouse(t testing.TB, ttl, life time.Duration) *house {
	t.Helper()
	h := &house{upstream: newRoot(t, "root", 10*365*24*time.Hour), store: &memory{}}
	var err error
	h.trust, err = NewTrust(t.Context(), TrustConfig{TrustDomain: testDomain, Store: h.store, Roots: []*x509.Certificate{h.upstream.root}})
	if err != nil {
		t.Fatal(err)
	}
	h.authority, err = NewAuthority(AuthorityConfig{TrustDomain: testDomain, Upstream: h.upstream, Trust: h.trust, Life: life, LeafTTL: ttl})
	if err != nil {
		t.Fatal(err)
	}
	h.line = h.authority.Prepare(h.upstream.named())
	if _, err := h.line.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.authority.Assign(Assignment{Root: h.line.Root()})
	linter, err := lint.New(lint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	h.issuer, err = NewIssuer(IssuerConfig{Authority: h.authority, Ledger: direct{h.store}, Linter: linter, Profiles: Profiles(ttl)})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func workloadRequest(t testing.TB, dns ...string) Request {
	t.Helper()
	return Request{
		Grant:     Grant{ID: spiffeid.RequireFromPath(testDomain, "/ns/shop/sa/cart"), DNSNames: dns},
		PublicKey: newKey(t).Public(),
		Evidence:  []byte(`{"method":"test"}`),
	}
}
