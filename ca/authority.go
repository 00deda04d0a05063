package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// DefaultIntermediateLife is the life of a replica's intermediate.
const DefaultIntermediateLife = 72 * time.Hour

// AuthorityConfig is what an Authority needs. Life, CommonName and LeafTTL have defaults.
type AuthorityConfig struct {
	TrustDomain spiffeid.TrustDomain
	Upstream    Upstream
	Trust       *Trust
	// Life is the intermediate's, 72 h by default; longer than LeafTTL.
	Life time.Duration
	// CommonName of the intermediate, "meshca intermediate" by default. It is for people; nothing reads it.
	CommonName string
	// LeafTTL is the longest life that will be asked for, MaxTTL by default: what Ready measures by.
	LeafTTL time.Duration
}

// Authority is this replica's power to sign: an intermediate whose key is made here, stays in memory, and goes with its
// successor. It is a rotation.Subject; run it with rotation.Keep. It is safe for concurrent use.
//
// It is also the registry of the CA's own keys: see IsOwnKey.
type Authority struct {
	c           AuthorityConfig
	trustDomain spiffeid.TrustDomain
	current     atomic.Pointer[Signer]
	last        atomic.Pointer[attempt]

	mu  sync.Mutex
	own []string // names of this process's CA keys, newest last; guarded by mu

	ownSet atomic.Pointer[map[string]struct{}] // own, for reading
}

// attempt is how the last renewal ended.
type attempt struct {
	at  time.Time
	err error
}

// NewAuthority returns an Authority that cannot sign before its first Renew.
func NewAuthority(c AuthorityConfig) (*Authority, error) {
	if c.TrustDomain.IsZero() || c.Upstream == nil || c.Trust == nil {
		return nil, errors.New("ca: an authority needs a trust domain, an upstream and the trust bundle")
	}
	if c.Life == 0 {
		c.Life = DefaultIntermediateLife
	}
	if c.CommonName == "" {
		c.CommonName = "meshca intermediate"
	}
	if c.LeafTTL == 0 {
		c.LeafTTL = MaxTTL
	}
	if c.Life <= c.LeafTTL {
		return nil, fmt.Errorf("ca: the intermediate's life (%s) must be longer than that of the SVIDs under it (%s)", c.Life, c.LeafTTL)
	}
	return &Authority{c: c, trustDomain: c.TrustDomain}, nil
}

// TrustDomain is the one that it issues in.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.trustDomain }

// Renew makes a new key, has the upstream sign an intermediate for it, checks what came back and puts it into use. The
// old key is dropped at once: everyone holds the root, and the intermediate travels with each leaf.
func (a *Authority) Renew(ctx context.Context) (rotation.Term, error) {
	s, err := a.renew(ctx)
	a.last.Store(&attempt{at: time.Now(), err: err})
	if err != nil {
		return rotation.Term{}, err
	}
	for _, c := range s.chain {
		a.adopt(c.PublicKey)
	}
	a.current.Store(s)
	now := time.Now()
	left := s.notAfter.Sub(now)
	return rotation.Term{Life: left, Left: left, Received: now}, nil
}

func (a *Authority) renew(ctx context.Context) (*Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("ca: making the intermediate's key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: a.c.CommonName},
		URIs:    []*url.URL{a.trustDomain.ID().URL()},
	}, key)
	if err != nil {
		return nil, fmt.Errorf("ca: requesting the intermediate: %w", err)
	}
	request := IntermediateRequest{
		PublicKey:   key.Public(),
		TrustDomain: a.trustDomain,
		Life:        a.c.Life,
		CommonName:  a.c.CommonName,
		CSR:         csr,
	}
	chain, err := a.c.Upstream.SignIntermediate(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", refusal.New(refusal.UpstreamUnavailable, "the upstream did not sign an intermediate"), err)
	}
	notAfter, err := checkIntermediate(chain, request, *a.c.Trust.roots.Load(), time.Now())
	if err != nil {
		return nil, fmt.Errorf("ca: the intermediate that the upstream returned: %w", err)
	}
	if left, least := time.Until(notAfter), margin(a.c.LeafTTL); left <= 2*least {
		return nil, fmt.Errorf("ca: the intermediate that the upstream returned ends in %s, too soon to issue under it: "+
			"look at the ends of the upstream's own certificates", left.Round(time.Second))
	}
	return &Signer{chain: chain, key: key, notAfter: notAfter}, nil
}

// Due is half-life.
func (a *Authority) Due(t rotation.Term) time.Time { return rotation.HalfLife(t) }

// Expired drops the key.
func (a *Authority) Expired() { a.current.Store(nil) }

// Signer returns the authority that signs for id, for a life from now. It refuses with ISSUER_NOT_READY before the
// first intermediate came, and with ISSUER_ENDING when less than ten minutes of its chain are left (a quarter of the
// life if that is less): lives that shrink towards the end would have agents come ever more often.
func (a *Authority) Signer(_ spiffeid.ID, life time.Duration) (*Signer, error) {
	s := a.current.Load()
	if s == nil {
		return nil, refusal.New(refusal.IssuerNotReady, "no intermediate has come from the upstream yet").After(5 * time.Second)
	}
	if left := time.Until(s.notAfter); left < margin(life) {
		return nil, refusal.New(refusal.IssuerEnding, "the intermediate ends in %s", max(left, 0).Round(time.Second)).After(30 * time.Second)
	}
	return s, nil
}

// Ready says why nothing can be signed now; nil when it can.
func (a *Authority) Ready() error {
	_, err := a.Signer(a.trustDomain.ID(), a.c.LeafTTL)
	if err == nil {
		return nil
	}
	if last := a.last.Load(); last != nil && last.err != nil {
		return fmt.Errorf("%w; the last try, at %s: %w", err, last.at.UTC().Format(time.RFC3339), last.err)
	}
	return err
}

// AuthorityStatus is an Authority as it is shown to people.
type AuthorityStatus struct {
	// Chain is the intermediate first; empty when there is none.
	Chain []*x509.Certificate
	// NotAfter is the earliest end in the chain, its root's included.
	NotAfter time.Time
	// LastTry is when a renewal was last tried; LastError is how it failed, nil if it did not.
	LastTry   time.Time
	LastError error
}

// Status returns the chain in use and how the last renewal went.
func (a *Authority) Status() AuthorityStatus {
	var st AuthorityStatus
	if s := a.current.Load(); s != nil {
		st.Chain, st.NotAfter = s.chain, s.notAfter
	}
	if last := a.last.Load(); last != nil {
		st.LastTry, st.LastError = last.at, last.err
	}
	return st
}

// maxOwnKeys bounds the memory of keys that this process used: some days of intermediates and serving keys.
const maxOwnKeys = 64

// adopt remembers keys as the CA's own.
func (a *Authority) adopt(keys ...crypto.PublicKey) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, k := range keys {
		if name := keyName(k); !slices.Contains(a.own, name) {
			a.own = append(a.own, name)
		}
	}
	a.own = slices.Clone(a.own[max(0, len(a.own)-maxOwnKeys):])
	set := make(map[string]struct{}, len(a.own))
	for _, name := range a.own {
		set[name] = struct{}{}
	}
	a.ownSet.Store(&set)
}

// IsOwnKey reports whether pub is a key of the CA itself: a root's, one of a chain, the serving SVID's, or one that this
// process used before. It is asked for each issuance.
func (a *Authority) IsOwnKey(pub crypto.PublicKey) bool {
	name := keyName(pub)
	if name == "" {
		return false
	}
	_, root := (*a.c.Trust.rootKeys.Load())[name]
	if own := a.ownSet.Load(); own != nil && !root {
		_, root = (*own)[name]
	}
	return root
}

// Signer is an authority at one moment: a key with its chain. Whoever holds one may finish an issuance under it after
// its successor came.
type Signer struct {
	chain    []*x509.Certificate
	key      crypto.Signer
	notAfter time.Time
}

// Certificate is the intermediate.
func (s *Signer) Certificate() *x509.Certificate { return s.chain[0] }

// NotAfter is the earliest end in the chain, its root's included.
func (s *Signer) NotAfter() time.Time { return s.notAfter }

var _ rotation.Subject = (*Authority)(nil)

func fingerprint(c *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(c.Raw) }
