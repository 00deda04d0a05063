package ca

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
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
	// Keys makes and keeps the intermediates' keys. By default they live in memory, and end with the process.
	Keys Keyring
	// Barred says why intermediates below a chain must not be used, though it leads to a root that is trusted: one of its keys
	// is not to be. It is asked about certificates above an intermediate, some of them; nil: none is barred.
	Barred func(above []*x509.Certificate) error
	// Log is told what becomes of keys that were kept, and of those that could not be destroyed; nil: nobody is.
	Log *slog.Logger
}

// Authority is this replica's power to sign. Below each root that signs, or is about to, it has a Line: an intermediate
// whose key the Keyring makes, and destroys when its successor has come. Which Line signs for an identity is the
// Assignment's to say. It is safe for concurrent use.
//
// It is also the registry of the CA's own keys: see IsOwnKey.
type Authority struct {
	c           AuthorityConfig
	trustDomain spiffeid.TrustDomain
	plan        atomic.Pointer[plan]
	lines       rotation.Current[[]*Line]
	// issuing is held for reading while something is issued; Assign waits for what began under another assignment.
	issuing sync.RWMutex

	mu     sync.Mutex       // guards used and former, and orders changes of lines and plan
	used   map[any][]string // names of the keys in use, by who uses them: a Line, a Serving
	former []string         // names of those that this process used before, the last of them last

	ownSet atomic.Pointer[map[string]struct{}] // used and former, for reading
}

// Root names a root and the upstream's issuer below it.
type Root struct {
	// ID is the SHA-256 of the root's certificate, in hex: see RootID.
	ID string
	// Ref is the upstream's.
	Ref string
}

// RootID names a root: the SHA-256 of its certificate, in lower-case hex.
func RootID(root *x509.Certificate) string { return fmt.Sprintf("%x", fingerprint(root)) }

// KeyOf names a root's key: the SHA-256 of its SubjectPublicKeyInfo, in lower-case hex. Whoever has stolen a key can make
// another certificate for it.
func KeyOf(root *x509.Certificate) string {
	return fmt.Sprintf("%x", sha256.Sum256(root.RawSubjectPublicKeyInfo))
}

// Assignment says under which root an SVID is signed.
type Assignment struct {
	Root Root
	// Successor signs in place of Root for Share percent of the identities, chosen by hash; zero: there is none.
	Successor Root
	Share     int
}

// Signs reports whether the root with this ID signs for anyone.
func (a Assignment) Signs(id string) bool {
	return id == a.Root.ID || a.Share > 0 && id == a.Successor.ID
}

// plan is an Assignment with its lines.
type plan struct {
	Assignment
	line, successor *Line
}

// NewAuthority returns an Authority that cannot sign before Assign, and then before its Line's first Renew.
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
	if c.Keys == nil {
		c.Keys = memoryKeys{}
	}
	if c.Barred == nil {
		c.Barred = func([]*x509.Certificate) error { return nil }
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Life <= c.LeafTTL {
		return nil, fmt.Errorf("ca: the intermediate's life (%s) must be longer than that of the SVIDs under it (%s)", c.Life, c.LeafTTL)
	}
	return &Authority{c: c, trustDomain: c.TrustDomain, used: map[any][]string{}}, nil
}

// Life is how long an intermediate is asked to live.
func (a *Authority) Life() time.Duration { return a.c.Life }

// Barred says why intermediates below these certificates must not be used; nil when they may.
func (a *Authority) Barred(above []*x509.Certificate) error { return a.c.Barred(above) }

// TrustDomain is the one that it issues in.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.trustDomain }

// Lines returns the lines there are, and a channel that closes when there are others. Each is to be kept
// (rotation.Keep) for as long as it is among them.
func (a *Authority) Lines() ([]*Line, <-chan struct{}) { return a.lines.Get() }

// Prepare makes a line below a root, which signs for nobody before it is assigned to.
func (a *Authority) Prepare(r Root) *Line {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.line(r)
}

// line finds or makes the line below a root; a.mu is held.
func (a *Authority) line(r Root) *Line {
	lines := a.lines.Value()
	for _, l := range lines {
		if l.root == r.ID {
			l.ref.Store(&r.Ref)
			return l
		}
	}
	l := &Line{root: r.ID, authority: a, wake: make(chan struct{}, 1)}
	l.ref.Store(&r.Ref)
	a.lines.Set(append(slices.Clip(lines), l))
	return l
}

// Assign puts an assignment into force. It returns when nothing that was begun under another one is in hand any more; the
// lines of other roots, and their keys, are gone then.
func (a *Authority) Assign(x Assignment) {
	for _, l := range a.assign(x) {
		l.release()
	}
}

// assign does it, but for the keys of the lines that it returns.
func (a *Authority) assign(x Assignment) (dropped []*Line) {
	a.mu.Lock()
	defer a.mu.Unlock()
	next := &plan{Assignment: x, line: a.line(x.Root)}
	if x.Share > 0 {
		next.successor = a.line(x.Successor)
	}
	if now := a.plan.Load(); now != nil && now.Assignment == x && len(a.lines.Value()) == len(next.lines()) {
		return nil
	}
	a.plan.Store(next)
	a.settle()
	var kept []*Line
	for _, l := range a.lines.Value() {
		if l == next.line || l == next.successor {
			kept = append(kept, l)
			continue
		}
		l.drop()
		a.hold(l)
		dropped = append(dropped, l)
	}
	a.lines.Set(kept)
	return dropped
}

// Repoint has intermediates below a root come from another of the upstream's issuers from now on. Those there are stay in
// use: they are below the same root.
func (a *Authority) Repoint(r Root) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, l := range a.lines.Value() {
		if l.root == r.ID {
			l.ref.Store(&r.Ref)
		}
	}
	now := a.plan.Load()
	if now == nil {
		return
	}
	next := *now
	for _, x := range []*Root{&next.Root, &next.Successor} {
		if x.ID == r.ID {
			*x = r
		}
	}
	a.plan.Store(&next)
}

// settle waits until nothing that has begun by now is in hand any more.
func (a *Authority) settle() {
	a.issuing.Lock()
	a.issuing.Unlock() //nolint:staticcheck // a barrier
}

// lines are those that sign.
func (p *plan) lines() []*Line {
	if p.successor != nil {
		return []*Line{p.line, p.successor}
	}
	return []*Line{p.line}
}

// Assignment returns the one in force.
func (a *Authority) Assignment() Assignment {
	if p := a.plan.Load(); p != nil {
		return p.Assignment
	}
	return Assignment{}
}

// signer returns who signs for id, for a life from now, and holds the assignment until done is called. It refuses with
// ISSUER_NOT_READY before the first intermediate came, and while that is not valid yet, and with ISSUER_ENDING when less than ten minutes of its chain are
// left (a quarter of the life if that is less): lives that shrink towards the end would have agents come ever more often.
func (a *Authority) signer(id spiffeid.ID, life time.Duration) (*Signer, error) {
	p := a.plan.Load()
	if p == nil {
		return nil, refusal.New(refusal.IssuerNotReady, "it is not settled yet which root signs").After(5 * time.Second)
	}
	if p.successor != nil && rotation.InShare(id.String(), p.Share) {
		return p.successor.signer(life)
	}
	return p.line.signer(life)
}

// NotAfter is the earliest end in the chains of the lines that sign; zero while one of them has none.
func (a *Authority) NotAfter() time.Time {
	p := a.plan.Load()
	if p == nil {
		return time.Time{}
	}
	end := p.line.Status().NotAfter
	if p.successor != nil {
		if other := p.successor.Status().NotAfter; other.Before(end) {
			end = other
		}
	}
	return end
}

// IssuesUntil is until when SVIDs of the longest life can be issued if no further intermediate comes: the end of what signs,
// less what an issuer must have left. Zero: they cannot now.
func (a *Authority) IssuesUntil() time.Time {
	end := a.NotAfter()
	if end.IsZero() {
		return end
	}
	now := time.Now()
	if end = end.Add(-margin(a.c.LeafTTL)); !end.After(now) || slices.ContainsFunc(a.plan.Load().lines(), func(l *Line) bool { return l.early(now) }) {
		return time.Time{}
	}
	return end
}

// begin holds the assignment in force until end.
func (a *Authority) begin() { a.issuing.RLock() }

func (a *Authority) end() { a.issuing.RUnlock() }

// Ready says why nothing can be signed now; nil when it can.
func (a *Authority) Ready() error {
	p := a.plan.Load()
	if p == nil {
		_, err := a.signer(a.trustDomain.ID(), a.c.LeafTTL)
		return err
	}
	if p.successor != nil {
		if err := p.successor.Ready(); err != nil {
			return err
		}
	}
	return p.line.Ready()
}

// Signer is a line at one moment: a key with its chain. Who took one between begin and end of the Authority may finish an
// issuance under it after its successor came: the key is destroyed behind that.
type Signer struct {
	rootSum  [sha256.Size]byte
	chain    []*x509.Certificate
	key      crypto.Signer
	received time.Time
	// notBefore is the latest beginning in the chain, and notAfter the earliest end, the root's included.
	notBefore, notAfter time.Time
}

// newSigner is a Signer of what was checked: of an intermediate below a root, and the earliest end in its chain.
func newSigner(root *x509.Certificate, k Kept, notAfter time.Time) *Signer {
	return &Signer{
		rootSum: fingerprint(root), chain: k.Chain, key: k.Key, received: k.Received,
		notBefore: later(root.NotBefore, latestBeginning(k.Chain)), notAfter: notAfter,
	}
}

func latestBeginning(chain []*x509.Certificate) (t time.Time) {
	for _, c := range chain {
		t = later(t, c.NotBefore)
	}
	return t
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// Certificate is the intermediate.
func (s *Signer) Certificate() *x509.Certificate { return s.chain[0] }

// NotAfter is the earliest end in the chain, its root's included.
func (s *Signer) NotAfter() time.Time { return s.notAfter }

// ready says why the key cannot sign now; nil when it can, as far as is known.
func (s *Signer) ready() error {
	key, ok := s.key.(interface{ Ready() error })
	if !ok {
		return nil
	}
	if err := key.Ready(); err != nil {
		return fmt.Errorf("%w: %w", keyAway(), err)
	}
	return nil
}

// keyAway is what callers hear of a key that does not sign; the cause is for the log and /readyz.
func keyAway() *refusal.Error {
	return refusal.New(refusal.SignerUnavailable, "the intermediate's key does not answer").After(5 * time.Second)
}

func fingerprint(c *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(c.Raw) }
