// Package pki is a small CA for tests that need SVIDs and not the CA that issues them.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Root is a self-signed CA of a trust domain.
type Root struct {
	Domain spiffeid.TrustDomain
	Cert   *x509.Certificate
	key    crypto.Signer
}

// NewRoot makes a root that lasts for a day.
func NewRoot(domain string) (*Root, error) {
	td, err := spiffeid.TrustDomainFromString(domain)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	r := &Root{Domain: td, key: key}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: domain + " root"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		URIs: []*url.URL{td.ID().URL()},
	}
	if r.Cert, err = r.sign(template, template, key.Public()); err != nil {
		return nil, err
	}
	return r, nil
}

// SVID issues an SVID with a new P-256 key.
func (r *Root) SVID(path string, life time.Duration) (*x509svid.SVID, error) {
	return r.SVIDOn(elliptic.P256(), path, life)
}

// SVIDOn issues an SVID with a new key on a curve, say one that a proxy does not take.
func (r *Root) SVIDOn(curve elliptic.Curve, path string, life time.Duration) (*x509svid.SVID, error) {
	id, err := spiffeid.FromPath(r.Domain, path)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		return nil, err
	}
	cert, err := r.sign(&x509.Certificate{
		SerialNumber: serial(), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{id.URL()},
	}, r.Cert, key.Public())
	if err != nil {
		return nil, err
	}
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{cert}, PrivateKey: key}, nil
}

// As is the root signing for a trust domain that is not its own.
func (r *Root) As(domain spiffeid.TrustDomain) *Root {
	forger := *r
	forger.Domain = domain
	return &forger
}

// Bundle is the root's trust bundle with a sequence, and further roots of the same trust domain.
func (r *Root) Bundle(sequence uint64, more ...*Root) *spiffebundle.Bundle {
	b := spiffebundle.New(r.Domain)
	b.AddX509Authority(r.Cert)
	for _, other := range more {
		b.AddX509Authority(other.Cert)
	}
	b.SetSequenceNumber(sequence)
	return b
}

func (r *Root) sign(template, parent *x509.Certificate, public crypto.PublicKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, r.key)
	if err != nil {
		return nil, fmt.Errorf("signing a test certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic(err) // crypto/rand does not fail (Go 1.24+)
	}
	return n.Add(n, big.NewInt(1))
}
