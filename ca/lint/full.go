package lint

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	zx509 "github.com/zmap/zcrypto/x509"
	zlint "github.com/zmap/zlint/v3/lint"
	_ "github.com/zmap/zlint/v3/lints/rfc" // puts the RFC lints into zlint's registry; the web PKI's others are not linked
)

// fullSet is zlint's RFC 5280, 5480 and 8813 lints.
type fullSet struct {
	lints  []*zlint.CertificateLint
	config zlint.Configuration
}

func newFullSet() (*fullSet, error) {
	registry, err := zlint.GlobalRegistry().Filter(zlint.FilterOptions{
		IncludeSources: zlint.SourceList{zlint.RFC5280, zlint.RFC5480, zlint.RFC8813},
	})
	if err != nil {
		return nil, fmt.Errorf("lint: choosing zlint's lints: %w", err)
	}
	lints := registry.CertificateLints().Lints()
	if len(lints) == 0 {
		return nil, errors.New("lint: zlint has no RFC lints in this build")
	}
	return &fullSet{lints: lints, config: registry.GetConfiguration()}, nil
}

// lint signs the template with a throwaway key of the issuer's kind, under the issuer's name, and runs all lints on the
// result. Warnings pass: they are about the web.
func (f *fullSet) lint(template, issuer *x509.Certificate) error {
	cert, err := throwaway(template, issuer)
	if err != nil {
		return fmt.Errorf("zlint: making the certificate to look at: %w", err)
	}
	for _, l := range f.lints {
		r := l.Execute(cert, f.config)
		if r.Status == zlint.Error || r.Status == zlint.Fatal {
			return fmt.Errorf("%s (%s, %s): %s", l.Name, l.Source, l.Citation, r.Details)
		}
	}
	return nil
}

func throwaway(template, issuer *x509.Certificate) (*zx509.Certificate, error) {
	key, err := throwawayKey(issuer.PublicKey)
	if err != nil {
		return nil, err
	}
	// Copies: the originals are shared, and CreateCertificate wants the parent's key to be the signer's.
	parent, leaf := *issuer, *template
	parent.PublicKey = key.Public()
	der, err := x509.CreateCertificate(rand.Reader, &leaf, &parent, template.PublicKey, key)
	if err != nil {
		return nil, err
	}
	return zx509.ParseCertificate(der)
}

func throwawayKey(like crypto.PublicKey) (crypto.Signer, error) {
	switch like := like.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.GenerateKey(like.Curve, rand.Reader)
	case *rsa.PublicKey:
		return rsa.GenerateKey(rand.Reader, 2048)
	case ed25519.PublicKey:
		_, key, err := ed25519.GenerateKey(rand.Reader)
		return key, err
	}
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}
