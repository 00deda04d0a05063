package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
)

// The profiles that the CA issues under; they stand in the ledger.
const (
	ProfileWorkload = "workload"
	ProfileAgent    = "agent"
	ProfileServer   = "server"
)

const (
	// MaxTTL is the longest life of an SVID, and the default.
	MaxTTL = 6 * time.Hour
	// InUse is how long after its issue an SVID may be in use: for as long as one lives, and a day more for those who go by the
	// wall clock, where that was as much ahead. What is dated later is taken by no right clock.
	InUse = MaxTTL + 24*time.Hour
	// MinTTL is the shortest that makes sense: NotAfter has whole seconds, and an agent needs time to fetch and push.
	MinTTL = 5 * time.Second
	// DefaultBackdate is how far NotBefore lies before the moment of issue, for clocks that are behind.
	DefaultBackdate = time.Minute
	// endingMargin is what the issuer's chain must have left for anything to be issued (T/4 if that is less).
	endingMargin = 10 * time.Minute
	// serialBytes is the size of a serial: 128 random bits (RFC 5280 §4.1.2.2 allows 20 octets).
	serialBytes = 16
	// reservedPath is the first segment that belongs to the CA and its agents.
	reservedPath = "/meshca/"
)

// Profile is a kind of SVID: its life, and with it all that is in a certificate and does not come from the grant.
type Profile struct {
	Name string
	// TTL is the life of its SVIDs, by default and at most: at most MaxTTL, at least MinTTL.
	TTL time.Duration
	// Backdate is how far NotBefore lies before the moment of issue, at most T/4. It plays no part in schedules.
	Backdate time.Duration
}

// Profiles returns the three usual profiles with the life ttl; zero is MaxTTL.
func Profiles(ttl time.Duration) []Profile {
	if ttl == 0 {
		ttl = MaxTTL
	}
	return []Profile{
		{Name: ProfileWorkload, TTL: ttl, Backdate: DefaultBackdate},
		{Name: ProfileAgent, TTL: ttl, Backdate: DefaultBackdate},
		{Name: ProfileServer, TTL: ttl, Backdate: DefaultBackdate},
	}
}

func (p Profile) check() error {
	switch {
	case p.Name == "":
		return fmt.Errorf("ca: a profile has no name")
	case p.TTL < MinTTL || p.TTL > MaxTTL:
		return fmt.Errorf("ca: profile %s: the SVIDs' life is %s, and must lie between %s and %s", p.Name, p.TTL, MinTTL, MaxTTL)
	case p.Backdate < 0:
		return fmt.Errorf("ca: profile %s: backdate is negative", p.Name)
	}
	return nil
}

// life is T: what was granted, clamped to the profile's.
func (p Profile) life(granted time.Duration) time.Duration {
	if granted == 0 {
		return p.TTL
	}
	return min(granted, p.TTL)
}

// margin is how much the issuer's chain must have left for a life to be issued under it.
func margin(life time.Duration) time.Duration { return min(endingMargin, life/4) }

// admits holds what no policy may grant, whatever it says.
func (p Profile) admits(g Grant, td spiffeid.TrustDomain) error {
	switch {
	case g.ID.IsZero() || g.ID.Path() == "":
		return refusal.New(refusal.IdentityInvalid, "a leaf's SPIFFE ID needs a path")
	case g.ID.TrustDomain() != td:
		return refusal.New(refusal.IdentityInvalid, "%s is not in the trust domain %s", g.ID, td)
	case g.TTL != 0 && g.TTL < MinTTL:
		return refusal.New(refusal.RequestMalformed, "a life of %s was asked for; the shortest is %s", g.TTL, MinTTL)
	}
	reserved := strings.HasPrefix(g.ID.Path()+"/", reservedPath)
	switch p.Name {
	case ProfileAgent, ProfileServer:
		if !reserved {
			return refusal.New(refusal.IdentityInvalid, "%s is not below %s", g.ID, reservedPath)
		}
	default:
		if reserved {
			return refusal.New(refusal.IdentityReserved, "%s lies under %s", g.ID, reservedPath)
		}
	}
	return nil
}

// template makes the X509-SVID to be. All of it is set here: what the signing library or crypto/x509 would fill in by
// itself is filled in, so that the result can be compared with it.
func (p Profile) template(r Request, s *Signer, now time.Time, life time.Duration) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	keyID, err := subjectKeyID(r.PublicKey)
	if err != nil {
		return nil, err
	}
	// RFC 5280 §4.1.2.5.1: whole seconds. Never beyond any certificate of the chain, never longer than granted.
	notAfter := now.Add(life).UTC().Truncate(time.Second)
	if s.notAfter.Before(notAfter) {
		notAfter = s.notAfter
	}
	usage := x509.KeyUsageDigitalSignature
	if _, ok := r.PublicKey.(*rsa.PublicKey); ok {
		usage |= x509.KeyUsageKeyEncipherment
	}
	return &x509.Certificate{
		PublicKey:    r.PublicKey,
		SerialNumber: serial,
		// No subject: then the SAN is critical (RFC 5280 §4.1.2.6), which crypto/x509 sees to and compare checks.
		NotBefore:             now.Add(-min(p.Backdate, notAfter.Sub(now)/4)).UTC().Truncate(time.Second),
		NotAfter:              notAfter,
		KeyUsage:              usage,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		IsCA:                  false,
		MaxPathLen:            -1,
		SubjectKeyId:          keyID,
		AuthorityKeyId:        s.Certificate().SubjectKeyId,
		URIs:                  []*url.URL{r.Grant.ID.URL()},
		DNSNames:              slices.Clone(r.Grant.DNSNames),
		SignatureAlgorithm:    x509.ECDSAWithSHA256,
	}, nil
}

// newSerial draws 128 random bits; zero is drawn again (RFC 5280 §4.1.2.2 wants a positive number).
func newSerial() (*big.Int, error) {
	var b [serialBytes]byte
	for {
		if _, err := rand.Read(b[:]); err != nil {
			return nil, fmt.Errorf("ca: drawing a serial: %w", err)
		}
		if n := new(big.Int).SetBytes(b[:]); n.Sign() > 0 {
			return n, nil
		}
	}
}

// subjectKeyID is RFC 7093 §2 method 1: the leftmost 160 bits of the SHA-256 of the subjectPublicKey bits.
func subjectKeyID(pub crypto.PublicKey) ([]byte, error) {
	var bits []byte
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		b, err := pub.Bytes()
		if err != nil {
			return nil, refusal.New(refusal.CSRKey, "the public key is no point of its curve")
		}
		bits = b
	case *rsa.PublicKey:
		bits = x509.MarshalPKCS1PublicKey(pub)
	case ed25519.PublicKey:
		bits = pub
	default:
		return nil, refusal.New(refusal.CSRKey, "a public key of type %T", pub)
	}
	sum := sha256.Sum256(bits)
	return sum[:20:20], nil
}
