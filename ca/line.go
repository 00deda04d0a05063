package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// Line is the power to sign below one root: an intermediate, and behind it the next one. It is a rotation.Subject. It is
// safe for concurrent use.
type Line struct {
	root      Root
	authority *Authority
	current   atomic.Pointer[Signer]
	last      rotation.Current[*attempt]
	wake      chan struct{}
}

var _ rotation.Subject = (*Line)(nil)

// attempt is how the last renewal ended.
type attempt struct {
	at  time.Time
	err error
}

// Root is what it signs below.
func (l *Line) Root() Root { return l.root }

// Renew makes a new key, has the upstream sign an intermediate for it, checks what came back and puts it into use. The
// old key is dropped at once: everyone holds the root, and the intermediate travels with each leaf.
func (l *Line) Renew(ctx context.Context) (rotation.Term, error) {
	s, err := l.renew(ctx)
	l.last.Set(&attempt{at: time.Now(), err: err})
	if err != nil {
		return rotation.Term{}, err
	}
	for _, c := range s.chain {
		l.authority.adopt(c.PublicKey)
	}
	// gofail: var intermediateSigned struct{}
	l.current.Store(s)
	// gofail: var intermediateInUse struct{}
	now := time.Now()
	left := s.notAfter.Sub(now)
	return rotation.Term{Life: left, Left: left, Received: now}, nil
}

func (l *Line) renew(ctx context.Context) (*Signer, error) {
	c, td := l.authority.c, l.authority.trustDomain
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("ca: making the intermediate's key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: c.CommonName},
		URIs:    []*url.URL{td.ID().URL()},
	}, key)
	if err != nil {
		return nil, fmt.Errorf("ca: requesting the intermediate: %w", err)
	}
	request := IntermediateRequest{PublicKey: key.Public(), TrustDomain: td, Life: c.Life, CommonName: c.CommonName, CSR: csr}
	// gofail: var intermediateAsked struct{}
	chain, err := c.Upstream.SignIntermediate(ctx, l.root.Ref, request)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", refusal.New(refusal.UpstreamUnavailable, "the upstream did not sign an intermediate"), err)
	}
	root, err := c.Trust.root(l.root.ID)
	if err != nil {
		return nil, err
	}
	notAfter, err := checkIntermediate(chain, request, []*x509.Certificate{root}, time.Now())
	if err != nil {
		return nil, fmt.Errorf("ca: the intermediate that the upstream returned: %w", err)
	}
	if left, least := time.Until(notAfter), margin(c.LeafTTL); left <= 2*least {
		return nil, fmt.Errorf("ca: the intermediate that the upstream returned ends in %s, too soon to issue under it: "+
			"look at the ends of the upstream's own certificates", left.Round(time.Second))
	}
	return &Signer{rootSum: fingerprint(root), chain: chain, key: key, notAfter: notAfter}, nil
}

// Wake is for the rotation.Keep of the line: see RenewNow.
func (l *Line) Wake() <-chan struct{} { return l.wake }

// RenewNow has whoever keeps the line renew it, and waits until that succeeded, failed, or ctx ended.
func (l *Line) RenewNow(ctx context.Context) error {
	before, tried := l.last.Get()
	select {
	case l.wake <- struct{}{}:
	default: // somebody else did so a moment ago
	}
	select {
	case <-tried:
	case <-ctx.Done():
		return ctx.Err()
	}
	if now := l.last.Value(); now != before && now.err != nil {
		return now.err
	}
	return nil
}

// Due is half-life.
func (l *Line) Due(t rotation.Term) time.Time { return rotation.HalfLife(t) }

// Expired drops the key.
func (l *Line) Expired() { l.current.Store(nil) }

// signer returns the line's intermediate; see Authority.signer.
func (l *Line) signer(life time.Duration) (*Signer, error) {
	s := l.current.Load()
	if s == nil {
		return nil, refusal.New(refusal.IssuerNotReady, "no intermediate has come from the upstream yet").After(5 * time.Second)
	}
	if left := time.Until(s.notAfter); left < margin(life) {
		return nil, refusal.New(refusal.IssuerEnding, "the intermediate ends in %s", max(left, 0).Round(time.Second)).After(30 * time.Second)
	}
	return s, nil
}

// Ready says why the line could not sign now; nil when it could.
func (l *Line) Ready() error {
	_, err := l.signer(l.authority.c.LeafTTL)
	if err == nil {
		return nil
	}
	if last := l.last.Value(); last != nil && last.err != nil {
		return fmt.Errorf("%w; the last try, at %s: %w", err, last.at.UTC().Format(time.RFC3339), last.err)
	}
	return err
}

// LineStatus is a Line as it is shown to people.
type LineStatus struct {
	Root Root
	// Chain is the intermediate first; empty when there is none.
	Chain []*x509.Certificate
	// NotAfter is the earliest end in the chain, its root's included.
	NotAfter time.Time
	// LastTry is when a renewal was last tried; LastError is how it failed, nil if it did not.
	LastTry   time.Time
	LastError error
}

// Status returns the chain in use and how the last renewal went.
func (l *Line) Status() LineStatus {
	st := LineStatus{Root: l.root}
	if s := l.current.Load(); s != nil {
		st.Chain, st.NotAfter = s.chain, s.notAfter
	}
	if last := l.last.Value(); last != nil {
		st.LastTry, st.LastError = last.at, last.err
	}
	return st
}
