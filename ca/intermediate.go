package ca

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	// maxChain bounds what an upstream may put between a leaf and its root.
	maxChain = 5
	// lifeSlack is how much longer than asked an intermediate may live: clocks differ.
	lifeSlack = 10 * time.Minute
)

// checkIntermediate says whether a chain is what was asked for: our key, a CA of path length 0, the trust domain's URI,
// no longer life than asked, an order in which each is signed by the next, and a root that is trusted. It returns the
// earliest end of all of them, the root included. A shorter life than asked is no fault.
func checkIntermediate(chain []*x509.Certificate, r IntermediateRequest, roots []*x509.Certificate, now time.Time) (time.Time, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return time.Time{}, fmt.Errorf("a chain of %d certificates, and 1 to %d were expected", len(chain), maxChain)
	}
	c := chain[0]
	switch {
	case !samePublicKey(c.PublicKey, r.PublicKey):
		return time.Time{}, errors.New("it certifies another key than ours")
	case !c.BasicConstraintsValid || !c.IsCA:
		return time.Time{}, errors.New("it is no CA certificate (RFC 5280 §4.2.1.9)")
	case c.MaxPathLen != 0 || !c.MaxPathLenZero:
		return time.Time{}, errors.New("its path length is not 0: it could have authorities below it")
	case c.KeyUsage&x509.KeyUsageCertSign == 0:
		return time.Time{}, errors.New("it may not sign certificates (no keyCertSign, SPIFFE X509-SVID §4.3)")
	case len(c.SubjectKeyId) == 0:
		return time.Time{}, errors.New("it has no subject key id (RFC 5280 §4.2.1.2)")
	case len(bytes.TrimSpace(c.RawSubject)) == 0 || isEmptySequence(c.RawSubject):
		return time.Time{}, errors.New("it has no subject, which an issuer needs (RFC 5280 §4.1.2.4)")
	case len(c.URIs) != 1, c.URIs[0].String() != r.TrustDomain.IDString():
		return time.Time{}, fmt.Errorf("its URI SAN is not %s alone (SPIFFE X509-SVID §3.2)", r.TrustDomain.IDString())
	case len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses) > 0:
		return time.Time{}, errors.New("it has other alternative names beside its URI (SPIFFE X509-SVID §3.2)")
	case constrains(c, r.TrustDomain.Name()):
		return time.Time{}, fmt.Errorf("its name constraints (RFC 5280 §4.2.1.10) leave out %s: nobody would accept what it signs", r.TrustDomain.IDString())
	case c.NotAfter.After(now.Add(r.Life + lifeSlack)):
		return time.Time{}, fmt.Errorf("it ends at %s, later than was asked for", c.NotAfter.UTC().Format(time.RFC3339))
	}
	return checkPath(chain, roots, now)
}

// checkPath says whether the chain, in its order and whole, leads to one of the roots by authorities that may be trusted.
func checkPath(chain, roots []*x509.Certificate, now time.Time) (time.Time, error) {
	opts := x509.VerifyOptions{
		Roots:         x509.NewCertPool(),
		Intermediates: x509.NewCertPool(),
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, r := range roots {
		opts.Roots.AddCert(r)
	}
	for _, c := range chain {
		if slices.ContainsFunc(roots, c.Equal) {
			return time.Time{}, errors.New("the chain holds a root, which must not travel with leaves")
		}
	}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	paths, err := chain[0].Verify(opts)
	if err != nil {
		return time.Time{}, fmt.Errorf("it does not lead to a root of the trust bundle: %w", err)
	}
	for _, path := range paths {
		if len(path) == len(chain)+1 && slices.EqualFunc(path[:len(chain)], chain, (*x509.Certificate).Equal) {
			return earliestEnd(path), checkAuthorities(path)
		}
	}
	return time.Time{}, errors.New("its chain is out of order, or holds what does not belong to it")
}

// checkAuthorities says whose key in a path can be broken, and who in it does not allow what SVIDs are for, the root
// included.
func checkAuthorities(path []*x509.Certificate) error {
	for _, c := range path {
		err := CheckIssuerKey(c.PublicKey)
		if err == nil {
			err = CheckIssuerUsage(c)
		}
		if err != nil {
			return fmt.Errorf("%q of its path has %w", c.Subject, err)
		}
	}
	return nil
}

func earliestEnd(path []*x509.Certificate) time.Time {
	end := path[0].NotAfter
	for _, c := range path[1:] {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// constrains reports whether a CA's name constraints leave out the URIs of a trust domain.
func constrains(c *x509.Certificate, trustDomain string) bool {
	within := func(constraint string) bool { // a host, or with a dot before it all below
		return constraint == "" || strings.EqualFold(constraint, trustDomain) ||
			constraint[0] == '.' && len(trustDomain) > len(constraint) && strings.EqualFold(trustDomain[len(trustDomain)-len(constraint):], constraint)
	}
	return len(c.PermittedURIDomains) > 0 && !slices.ContainsFunc(c.PermittedURIDomains, within) || slices.ContainsFunc(c.ExcludedURIDomains, within)
}

// ErrUsage is wrapped by CheckIssuerUsage's errors, which say what an authority has: "extended key usages without
// serverAuth, …".
var ErrUsage = errors.New("and none at all or both of serverAuth and clientAuth are needed: TLS verifiers refuse SVIDs below it")

// CheckIssuerUsage says whether a root, or an intermediate, allows what SVIDs are for. It need not have extended key
// usages; where it has some, Go's verifiers and OpenSSL's hold all below it to them, a root's too, though RFC 5280
// §4.2.1.12 speaks of the certificate itself alone. The error wraps ErrUsage.
func CheckIssuerUsage(c *x509.Certificate) error {
	if len(c.ExtKeyUsage) == 0 && len(c.UnknownExtKeyUsage) == 0 || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) {
		return nil
	}
	var lacks []string
	if !slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) {
		lacks = append(lacks, "serverAuth")
	}
	if !slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		lacks = append(lacks, "clientAuth")
	}
	if len(lacks) == 0 {
		return nil
	}
	return fmt.Errorf("extended key usages without %s, %w", strings.Join(lacks, " and "), ErrUsage)
}
