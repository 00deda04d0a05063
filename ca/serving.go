package ca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// Serving is the CA's own SVID, spiffe://<trust domain>/meshca/server, that its doors show. It is issued by the same
// Issuer as all others, and it is a rotation.Subject; run it with rotation.Keep. It is safe for concurrent use.
type Serving struct {
	issuer  *Issuer
	id      spiffeid.ID
	current atomic.Pointer[served]
	last    atomic.Pointer[attempt]
}

type served struct {
	svid SVID
	tls  tls.Certificate
}

// servingEvidence stands in the ledger for the CA's own SVID: it rests on nothing but the CA itself.
const servingEvidence = `{"method":"self","door":"server"}`

// NewServing returns a Serving that has no certificate before its first Renew.
func NewServing(i *Issuer) (*Serving, error) {
	if i == nil {
		return nil, errors.New("ca: a serving SVID needs an issuer")
	}
	id, err := ServerID(i.authority.trustDomain)
	if err != nil {
		return nil, err
	}
	if _, ok := i.profiles[ProfileServer]; !ok {
		return nil, fmt.Errorf("ca: the issuer has no profile %q", ProfileServer)
	}
	return &Serving{issuer: i, id: id}, nil
}

// ServerID is the SPIFFE ID of the CA of a trust domain.
func ServerID(td spiffeid.TrustDomain) (spiffeid.ID, error) {
	return spiffeid.FromPath(td, "/meshca/server")
}

// Renew makes a new key and an SVID for it, and serves it from then on.
func (s *Serving) Renew(ctx context.Context) (rotation.Term, error) {
	term, err := s.renew(ctx)
	s.last.Store(&attempt{at: time.Now(), err: err})
	return term, err
}

func (s *Serving) renew(ctx context.Context) (rotation.Term, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return rotation.Term{}, fmt.Errorf("ca: making the serving key: %w", err)
	}
	svid, err := s.issuer.Issue(ctx, Request{
		Grant:     Grant{ID: s.id},
		Profile:   ProfileServer,
		PublicKey: key.Public(),
		Evidence:  []byte(servingEvidence),
	})
	if err != nil {
		return rotation.Term{}, fmt.Errorf("ca: issuing the serving SVID: %w", err)
	}
	s.issuer.authority.adopt(s, key.Public())
	cert := tls.Certificate{PrivateKey: key, Leaf: svid.Chain[0]}
	for _, c := range svid.Chain {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	s.current.Store(&served{svid: svid, tls: cert})
	now := time.Now()
	return rotation.Term{Life: svid.Life, Left: svid.NotAfter.Sub(now), Received: now, NotBefore: latestBeginning(svid.Chain)}, nil
}

// Due is half-life.
func (s *Serving) Due(t rotation.Term) time.Time { return rotation.HalfLife(t) }

// Expired stops serving: clients would refuse it anyway, and say less clearly why.
func (s *Serving) Expired() { s.current.Store(nil) }

// Certificate is for tls.Config.GetCertificate. The handshake fails with ISSUER_NOT_READY while there is none.
func (s *Serving) Certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c := s.current.Load()
	if c == nil {
		return nil, refusal.New(refusal.IssuerNotReady, "the CA has no serving SVID")
	}
	return &c.tls, nil
}

// Status returns the SVID in use (its Chain is empty when there is none) and how the last renewal ended.
func (s *Serving) Status() (svid SVID, lastTry time.Time, lastError error) {
	if c := s.current.Load(); c != nil {
		svid = c.svid
	}
	if last := s.last.Load(); last != nil {
		lastTry, lastError = last.at, last.err
	}
	return svid, lastTry, lastError
}

// Ready says why the CA cannot prove itself to its callers; nil when it can.
func (s *Serving) Ready() error {
	if c := s.current.Load(); c != nil {
		if ahead := time.Until(latestBeginning(c.svid.Chain)); ahead > 0 {
			return refusal.New(refusal.IssuerNotReady, "the CA's serving SVID is valid in %s only: a clock was ahead when it was issued. Another one is made", ahead.Round(time.Second))
		}
		return nil
	}
	if last := s.last.Load(); last != nil && last.err != nil {
		return last.err
	}
	return refusal.New(refusal.IssuerNotReady, "the CA has no serving SVID yet")
}

var _ rotation.Subject = (*Serving)(nil)
