package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	casapi "github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/softcas"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
)

// Grant is what the registration authority allows: everything that is signed comes from it, and nothing else does.
type Grant struct {
	ID spiffeid.ID
	// TTL is the life to issue for, from now to NotAfter; already within policy's cap. The profile clamps it. Zero asks
	// for the profile's.
	TTL time.Duration
	// AtLeast is the shortest life that is of use, from now to NotAfter. Where the chain ends before, nothing is signed
	// (ISSUER_ENDING); what was granted is not less, that is the caller's to see. Zero: any life will do.
	AtLeast time.Duration
	// DNSNames are granted DNS SANs, normally none.
	DNSNames []string
}

// Request asks the Issuer for one X509-SVID.
type Request struct {
	Grant Grant
	// Profile names what the SVID is for; empty is ProfileWorkload. Only ProfileAgent and ProfileServer may issue below
	// the reserved path /meshca/.
	Profile string
	// PublicKey is the one thing taken from a CSR.
	PublicKey crypto.PublicKey
	// Evidence goes to the ledger as it is: canonical JSON of what the grant rests on. It holds no secret.
	Evidence []byte
}

// SVID is what was issued.
type SVID struct {
	ID spiffeid.ID
	// Chain is leaf first, then intermediates, never a root.
	Chain []*x509.Certificate
	// IssuedAt and NotAfter bound its life; Life is their difference.
	IssuedAt, NotAfter time.Time
	Life               time.Duration
}

// Linter says whether a certificate made from the template would break a rule; the error names the rule. It is asked
// for every issuance and must not keep or change what it is given.
type Linter interface {
	Lint(ctx context.Context, template, issuer *x509.Certificate, profile string) error
}

// IssuerConfig is what an Issuer needs; all of it.
type IssuerConfig struct {
	Authority *Authority
	Ledger    Ledger
	Linter    Linter
	// Profiles are the kinds of SVID, by name; see Profiles for the usual three.
	Profiles []Profile
}

// Issuer makes SVIDs. It is safe for concurrent use.
type Issuer struct {
	authority *Authority
	ledger    Ledger
	linter    Linter
	profiles  map[string]Profile
	// mismatch is the first one found; it stays until the process ends.
	mismatch atomic.Pointer[refusal.Error]
}

// NewIssuer checks the configuration and returns an Issuer.
func NewIssuer(c IssuerConfig) (*Issuer, error) {
	if c.Authority == nil || c.Ledger == nil || c.Linter == nil || len(c.Profiles) == 0 {
		return nil, errors.New("ca: an issuer needs an authority, a ledger, a linter and profiles")
	}
	i := &Issuer{authority: c.Authority, ledger: c.Ledger, linter: c.Linter, profiles: map[string]Profile{}}
	for _, p := range c.Profiles {
		if err := p.check(); err != nil {
			return nil, err
		}
		if _, twice := i.profiles[p.Name]; twice {
			return nil, fmt.Errorf("ca: two profiles are called %q", p.Name)
		}
		i.profiles[p.Name] = p
	}
	return i, nil
}

// Issue makes one SVID: prepare, lint, record, sign once, compare. It is the only place where the intermediate's key
// is used.
func (i *Issuer) Issue(ctx context.Context, r Request) (SVID, error) {
	// 1. Prepare: a template from the grant and the profile; of the request, the public key alone.
	profile, err := i.profile(r)
	if err != nil {
		return SVID{}, err
	}
	life := profile.life(r.Grant.TTL)
	i.authority.begin()
	defer i.authority.end()
	signer, err := i.authority.signer(r.Grant.ID, life)
	if err != nil {
		return SVID{}, err
	}
	// The moment of issue has whole seconds, as NotAfter has: then a life is exactly what was granted, time after time,
	// and the phases of schedules that are cut from it stay where they are.
	now := time.Now().UTC().Truncate(time.Second)
	template, err := profile.template(r, signer, now, life)
	if err != nil {
		return SVID{}, err
	}
	if got := template.NotAfter.Sub(now); got < r.Grant.AtLeast {
		return SVID{}, refusal.New(refusal.IssuerEnding, "the certificate would end with the intermediate, in %s, and less than %s is of no use", got, r.Grant.AtLeast).
			After(30 * time.Second)
	}

	// 2. Lint: what would break a rule is not recorded and not signed.
	if err := i.linter.Lint(ctx, template, signer.Certificate(), profile.Name); err != nil {
		if ctx.Err() != nil {
			return SVID{}, ctx.Err()
		}
		return SVID{}, refusal.New(refusal.LintFailed, "%w", err)
	}

	// 3. Record and 4. sign, once: the guard is the only signer that softcas sees, and it lets the key sign a digest
	// only when the ledger holds it. softcas writes into its template, so it gets a copy.
	g := newGuard(ctx, signer.key, i.ledger, entryFor(r, profile, template, signer, now))
	given := *template
	made, err := (&softcas.SoftCAS{CertificateChain: signer.chain, Signer: g}).CreateCertificate(
		&casapi.CreateCertificateRequest{Template: &given, Lifetime: template.NotAfter.Sub(now)})
	if err != nil {
		return SVID{}, i.notSigned(g, err)
	}

	// gofail: var leafSigned struct{}

	// 5. Compare: field by field with the template, and the whole with the digest that was recorded.
	if err := compare(made.Certificate, template, signer, g.recorded()); err != nil {
		return SVID{}, i.mismatched(err)
	}
	return SVID{
		ID:       r.Grant.ID,
		Chain:    slices.Concat([]*x509.Certificate{made.Certificate}, signer.chain),
		IssuedAt: now,
		NotAfter: template.NotAfter,
		Life:     template.NotAfter.Sub(now),
	}, nil
}

// Ready says why nothing should be asked of this Issuer: a signer that once returned something else than it was asked
// for, or an authority that cannot sign now.
func (i *Issuer) Ready() error {
	if m := i.mismatch.Load(); m != nil {
		return m
	}
	return i.authority.Ready()
}

// profile finds the request's profile and holds the bounds that no grant may cross.
func (i *Issuer) profile(r Request) (Profile, error) {
	name := r.Profile
	if name == "" {
		name = ProfileWorkload
	}
	p, ok := i.profiles[name]
	if !ok {
		return Profile{}, refusal.New(refusal.Internal, "no profile is called %q", name)
	}
	if err := p.admits(r.Grant, i.authority.trustDomain); err != nil {
		return Profile{}, err
	}
	if err := CheckKey(r.PublicKey); err != nil {
		return Profile{}, err
	}
	if p.Name != ProfileServer && i.authority.IsOwnKey(r.PublicKey) {
		return Profile{}, refusal.New(refusal.CSRKeyIsCA, "the public key is one of the CA's own")
	}
	return p, nil
}

// notSigned sorts the reasons for which softcas returned nothing.
func (i *Issuer) notSigned(g *guard, err error) error {
	switch {
	case g.refused != nil:
		return g.refused
	case errors.Is(g.failed, context.Canceled):
		return g.failed // whoever asked has gone
	case g.failed != nil:
		// It is recorded, and was never signed: a key that is elsewhere can be away.
		return fmt.Errorf("%w: %w", keyAway(), g.failed)
	case g.signed:
		// The key was used, and x509.CreateCertificate did not verify what came back.
		return i.mismatched(err)
	}
	return fmt.Errorf("ca: the signer made nothing: %w", err)
}

func (i *Issuer) mismatched(err error) error {
	// The detail travels to the caller, so it names the field and nothing of the certificate.
	r := refusal.New(refusal.SignerMismatch, "the signer returned something else than it was asked to sign: %w", err)
	i.mismatch.CompareAndSwap(nil, r)
	return r
}

func entryFor(r Request, p Profile, t *x509.Certificate, s *Signer, now time.Time) LedgerEntry {
	return LedgerEntry{
		Serial:         t.SerialNumber.FillBytes(make([]byte, serialBytes)),
		ID:             r.Grant.ID.String(),
		Profile:        p.Name,
		IssuedAt:       now,
		NotAfter:       t.NotAfter,
		AuthorityKeyID: s.Certificate().SubjectKeyId,
		Root:           s.rootSum[:],
		Evidence:       r.Evidence,
	}
}
