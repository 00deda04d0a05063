package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

// Line is the power to sign below one root: an intermediate, and behind it the next one. It is a rotation.Subject. It is
// safe for concurrent use.
type Line struct {
	root      string                 // its ID
	ref       atomic.Pointer[string] // of the upstream's issuer; another one of the same root may take its place
	authority *Authority
	current   atomic.Pointer[Signer]
	last      rotation.Current[*attempt]
	wake      chan struct{}

	// mu orders what Renew brings and the line's end. Behind it only files are written.
	mu      sync.Mutex
	key     crypto.Signer // of the last intermediate, while it exists; its successor has it destroyed
	started bool          // it has had one in use
	dropped bool          // it is over: nothing is put into use any more
}

var _ rotation.Subject = (*Line)(nil)

// attempt is how the last renewal ended.
type attempt struct {
	at  time.Time
	err error
	// recalled: what an earlier process kept was put into use, and nothing new was asked for.
	recalled bool
	// barred: there will be no other one.
	barred bool
}

// Root is what it signs below.
func (l *Line) Root() Root { return Root{ID: l.root, Ref: *l.ref.Load()} }

// Renew makes a new key, has the upstream sign an intermediate for it, checks what came back and puts it into use. The
// old key is destroyed at once: everyone holds the root, and the intermediate travels with each leaf.
//
// The first Renew of a process puts into use what the Keyring has kept, if that is good. The term then says when it came,
// so that its successor is due at its half-life, as always.
func (l *Line) Renew(ctx context.Context) (rotation.Term, error) {
	s, recalled, err := l.renew(ctx)
	l.last.Set(&attempt{at: time.Now(), err: err, recalled: recalled})
	if err != nil {
		return rotation.Term{}, err
	}
	now := time.Now()
	return rotation.Term{Life: s.notAfter.Sub(s.received), Left: s.notAfter.Sub(now), Received: now, NotBefore: s.notBefore}, nil
}

func (l *Line) renew(ctx context.Context) (s *Signer, recalled bool, err error) {
	var unfit error
	if !l.began() {
		if s, unfit = l.recall(); s != nil {
			l.authority.c.Log.Info("the intermediate that was kept is used again", "root", l.root, "received", s.received.UTC(), "ends", s.notAfter.UTC())
			return s, true, l.use(s, true)
		}
		if unfit != nil {
			l.authority.c.Log.Warn("the intermediate that was kept is not used, a new one takes its place", "root", l.root, "err", unfit)
		}
	}
	if s, err = l.obtain(ctx); err != nil {
		if unfit != nil {
			err = fmt.Errorf("%w; and %w", err, unfit)
		}
		return nil, false, err
	}
	return s, false, l.use(s, false)
}

// obtain has the upstream sign an intermediate for a new key.
func (l *Line) obtain(ctx context.Context) (_ *Signer, err error) {
	c, td := l.authority.c, l.authority.trustDomain
	key, err := c.Keys.Make(l.root)
	if err != nil {
		return nil, fmt.Errorf("%w: ca: making the intermediate's key: %w", refusal.New(refusal.SignerUnavailable, "no key could be made"), err)
	}
	defer func() {
		if err != nil {
			l.destroy(key)
		}
	}()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: c.CommonName},
		URIs:    []*url.URL{td.ID().URL()},
	}, SignerFor(ctx, key))
	if err != nil {
		return nil, fmt.Errorf("ca: requesting the intermediate: %w", err)
	}
	request := IntermediateRequest{PublicKey: key.Public(), TrustDomain: td, Life: c.Life, CommonName: c.CommonName, CSR: csr}
	// gofail: var intermediateAsked struct{}
	chain, err := c.Upstream.SignIntermediate(ctx, *l.ref.Load(), request)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", refusal.New(refusal.UpstreamUnavailable, "the upstream did not sign an intermediate"), err)
	}
	root, err := c.Trust.root(l.root)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	notAfter, err := l.vet(chain, request, root, now)
	if err != nil {
		return nil, fmt.Errorf("ca: the intermediate that the upstream returned: %w", err)
	}
	if left := notAfter.Sub(now); l.authority.tooSoon(left) {
		return nil, fmt.Errorf("ca: the intermediate that the upstream returned ends in %s, too soon to issue under it: "+
			"look at the ends of the upstream's own certificates", left.Round(time.Second))
	}
	return newSigner(root, Kept{Key: key, Chain: chain, Received: now}, notAfter), nil
}

// vet says whether a chain is what was asked for, and none of its keys is barred. It returns the earliest end of its
// certificates.
func (l *Line) vet(chain []*x509.Certificate, r IntermediateRequest, root *x509.Certificate, now time.Time) (time.Time, error) {
	end, err := checkIntermediate(chain, r, []*x509.Certificate{root}, now)
	if err != nil {
		return end, err
	}
	return end, l.authority.Barred(chain[1:]) // of the root itself the journal says how long it signs
}

// began reports whether the line has had an intermediate in use.
func (l *Line) began() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.started
}

// use keeps an intermediate, unless it was kept already, puts it into use, and destroys its predecessor's key when
// nothing that was begun with it is in hand any more.
func (l *Line) use(s *Signer, kept bool) error {
	l.authority.adoptChains(l, s)
	// gofail: var intermediateSigned struct{}
	former, err := l.exchange(s, kept)
	l.authority.adoptChains(l, nil)
	if err != nil {
		l.destroy(s.key)
		return err
	}
	// gofail: var intermediateInUse struct{}
	if former != nil {
		l.authority.settle()
		l.destroy(former)
	}
	return nil
}

func (l *Line) exchange(s *Signer, kept bool) (former crypto.Signer, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dropped {
		return nil, errors.New("ca: the root signs no more; the intermediate that came is dropped")
	}
	if kept { // an earlier try may have held the same key
		l.key = nil
	} else {
		if err := l.authority.c.Keys.Keep(l.root, Kept{Key: s.key, Chain: s.chain, Received: s.received}); err != nil {
			return nil, fmt.Errorf("ca: keeping the intermediate: %w", err)
		}
	}
	former, l.key, l.started = l.key, s.key, true
	l.current.Store(s)
	return former, nil
}

// destroy ends a key. What cannot be ended now is ended later, at the next start at the latest: it signs for nobody.
func (l *Line) destroy(key crypto.Signer) {
	if key == nil {
		return
	}
	if err := l.authority.c.Keys.Destroy(key); err != nil {
		l.authority.c.Log.Warn("the key of a former intermediate could not be destroyed; it is tried again", "root", l.root, "err", err)
	}
}

// drop ends the line: it signs no more, and nothing of it is recalled. Its key is there until release.
func (l *Line) drop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dropped = true
	l.current.Store(nil)
	if err := l.Forget(); err != nil {
		l.authority.c.Log.Error("a root signs no more, and the intermediate below it stays on record", "root", l.root, "err", err)
	}
}

// release destroys the key of the line, which signs no more.
func (l *Line) release() {
	l.mu.Lock()
	key := l.key
	l.key = nil
	l.mu.Unlock()
	l.destroy(key)
}

// Forget has no later process use the line's intermediate again: what was stolen must not come back with a restart.
func (l *Line) Forget() error { return l.authority.c.Keys.Forget(l.root) }

// Wake is for the rotation.Keep of the line: see RenewNow.
func (l *Line) Wake() <-chan struct{} { return l.wake }

// RenewNow has whoever keeps the line renew it, and waits until that succeeded, failed, or ctx ended.
func (l *Line) RenewNow(ctx context.Context) error {
	for {
		before, tried := l.last.Get()
		if before != nil && before.barred {
			return before.err
		}
		select {
		case l.wake <- struct{}{}:
		default: // somebody else did so a moment ago
		}
		select {
		case <-tried:
		case <-ctx.Done():
			return ctx.Err()
		}
		now := l.last.Value()
		if now != before && now.recalled {
			continue // what came into use is the old one
		}
		if now != before && now.err != nil {
			return now.err
		}
		return nil
	}
}

// Bar is for whoever would keep the line, and does not: it stays without an intermediate, and says why.
func (l *Line) Bar(why error) { l.last.Set(&attempt{at: time.Now(), err: why, barred: true}) }

// Mend has whoever keeps the line renew it when its key is gone for good: nothing else would before half-life.
func (l *Line) Mend() {
	s := l.current.Load()
	if s == nil || !errors.Is(s.ready(), ErrKeyLost) {
		return
	}
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Due is half-life.
func (l *Line) Due(t rotation.Term) time.Time { return rotation.HalfLife(t) }

// Expired destroys the key.
func (l *Line) Expired() {
	l.current.Store(nil)
	l.release()
}

// signer returns the line's intermediate; see Authority.signer.
func (l *Line) signer(life time.Duration) (*Signer, error) {
	s := l.current.Load()
	if s == nil {
		return nil, refusal.New(refusal.IssuerNotReady, "no intermediate has come from the upstream yet").After(5 * time.Second)
	}
	if ahead := time.Until(s.notBefore); ahead > 0 { // every verifier would refuse the chain
		return nil, refusal.New(refusal.IssuerNotReady, "the intermediate is valid in %s only: a clock was ahead when it was signed. Another one is asked for",
			ahead.Round(time.Second)).After(5 * time.Second)
	}
	if left := time.Until(s.notAfter); left < margin(life) {
		return nil, refusal.New(refusal.IssuerEnding, "the intermediate ends in %s", max(left, 0).Round(time.Second)).After(30 * time.Second)
	}
	return s, nil
}

// early reports whether the line's intermediate is not valid yet.
func (l *Line) early(now time.Time) bool {
	s := l.current.Load()
	return s != nil && now.Before(s.notBefore)
}

// Ready says why the line could not sign now; nil when it could.
func (l *Line) Ready() error {
	s, err := l.signer(l.authority.c.LeafTTL)
	if err == nil {
		return s.ready()
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
	st := LineStatus{Root: l.Root()}
	if s := l.current.Load(); s != nil {
		st.Chain, st.NotAfter = s.chain, s.notAfter
	}
	if last := l.last.Value(); last != nil {
		st.LastTry, st.LastError = last.at, last.err
	}
	return st
}
