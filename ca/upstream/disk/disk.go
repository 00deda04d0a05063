// Package disk is an upstream whose root lies in two files: a certificate, and its key with mode 0600.
//
// A root is made once, by an explicit step (Create), or brought along (Import); neither ever overwrites a file. Open
// only reads.
package disk

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"time"

	casapi "github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/softcas"

	"github.com/meshca/meshca/ca"
)

// Files names where a root lies.
type Files struct {
	// Cert is a PEM file: the certificate of the key first. For a key that is itself an intermediate's, what leads to
	// its root follows, the root last.
	Cert string
	// Key is the private key in PEM: PKCS #8, PKCS #1 or SEC 1; mode 0600 or less.
	Key string
	// Passphrase is a file (mode 0600 or less) with the passphrase of an encrypted key; empty for a plain key.
	Passphrase string
}

// backdate is how far the NotBefore of what is signed here lies back, for clocks that are behind.
const backdate = 5 * time.Minute

// Upstream signs intermediates with the key in a file. It is safe for concurrent use.
type Upstream struct {
	chain []*x509.Certificate // the signing certificate first, the root last
	key   crypto.Signer
}

var _ ca.Upstream = (*Upstream)(nil)

// Open reads the root and checks it: modes, that key and certificate belong together, that it is a CA that can have an
// intermediate below it, and that it is valid now.
func Open(f Files) (*Upstream, error) {
	chain, err := readChain(f.Cert)
	if err != nil {
		return nil, err
	}
	key, err := readKey(f)
	if err != nil {
		return nil, err
	}
	if err := check(f, chain, key, time.Now()); err != nil {
		return nil, err
	}
	return &Upstream{chain: chain, key: key}, nil
}

// Roots returns the root of the chain.
func (u *Upstream) Roots(context.Context) ([]*x509.Certificate, error) {
	return []*x509.Certificate{u.chain[len(u.chain)-1]}, nil
}

// SignIntermediate signs an intermediate of path length 0, never beyond the end of anything above it.
func (u *Upstream) SignIntermediate(ctx context.Context, r ca.IntermediateRequest) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if r.Life <= 0 {
		return nil, fmt.Errorf("disk upstream: a life of %s was asked for", r.Life)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(r.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("disk upstream: the intermediate's key: %w", err)
	}
	keyID := sha256.Sum256(spki) // RFC 7093 §2 method 4
	now := time.Now()
	end := now.Add(r.Life)
	for _, c := range u.chain {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	if !end.After(now) {
		return nil, fmt.Errorf("disk upstream: the root ended at %s: bring a new one", end.UTC().Format(time.RFC3339))
	}
	made, err := (&softcas.SoftCAS{CertificateChain: u.chain, Signer: u.key}).CreateCertificate(&casapi.CreateCertificateRequest{
		Lifetime: end.Sub(now),
		Template: &x509.Certificate{
			PublicKey:             r.PublicKey,
			SerialNumber:          serial,
			Subject:               pkix.Name{CommonName: r.CommonName, SerialNumber: serial.Text(16)},
			NotBefore:             now.Add(-backdate).UTC().Truncate(time.Second),
			NotAfter:              end.UTC().Truncate(time.Second),
			KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
			BasicConstraintsValid: true,
			IsCA:                  true,
			MaxPathLen:            0,
			MaxPathLenZero:        true,
			SubjectKeyId:          keyID[:20],
			URIs:                  []*url.URL{r.TrustDomain.ID().URL()},
		},
	})
	if err != nil {
		return nil, fmt.Errorf("disk upstream: signing the intermediate: %w", err)
	}
	return append([]*x509.Certificate{made.Certificate}, u.chain[:len(u.chain)-1]...), nil
}

// check says what is wrong with a root as it was read.
func check(f Files, chain []*x509.Certificate, key crypto.Signer, now time.Time) error {
	top := chain[0]
	pub, ok := top.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(key.Public()) {
		return fmt.Errorf("the key in %s does not belong to the certificate in %s", f.Key, f.Cert)
	}
	for i, c := range chain {
		switch {
		case !c.BasicConstraintsValid || !c.IsCA:
			return fmt.Errorf("%s: certificate %d (%s) is no CA", f.Cert, i+1, c.Subject)
		case c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0:
			return fmt.Errorf("%s: certificate %d (%s) may not sign certificates", f.Cert, i+1, c.Subject)
		case c.MaxPathLen >= 0 && c.MaxPathLen < i+1: // parsed: -1 is none
			return fmt.Errorf("%s: certificate %d (%s) has path length %d: there is no room for an intermediate below", f.Cert, i+1, c.Subject, c.MaxPathLen)
		case now.Before(c.NotBefore):
			return fmt.Errorf("%s: certificate %d (%s) is valid from %s only: look at the clock", f.Cert, i+1, c.Subject, c.NotBefore.UTC().Format(time.RFC3339))
		case now.After(c.NotAfter):
			return fmt.Errorf("%s: certificate %d (%s) ended at %s", f.Cert, i+1, c.Subject, c.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	return checkOrder(f, chain)
}

// checkOrder wants each certificate signed by the next, and the last by itself.
func checkOrder(f Files, chain []*x509.Certificate) error {
	for i, c := range chain[:len(chain)-1] {
		if !bytes.Equal(c.RawIssuer, chain[i+1].RawSubject) || c.CheckSignatureFrom(chain[i+1]) != nil {
			return fmt.Errorf("%s: certificate %d is not signed by certificate %d: the order is the key's own first, the root last", f.Cert, i+1, i+2)
		}
	}
	root := chain[len(chain)-1]
	if !bytes.Equal(root.RawIssuer, root.RawSubject) || root.CheckSignatureFrom(root) != nil {
		return fmt.Errorf("%s does not end with a root: put %q behind, which signed the last certificate", f.Cert, root.Issuer)
	}
	if slices.ContainsFunc(chain[:len(chain)-1], root.Equal) {
		return fmt.Errorf("%s holds the root twice", f.Cert)
	}
	return nil
}

// newSerial draws 128 random bits (RFC 5280 §4.1.2.2: positive, at most 20 octets).
func newSerial() (*big.Int, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, fmt.Errorf("drawing a serial: %w", err)
	}
	n := new(big.Int).SetBytes(b[:])
	if n.Sign() == 0 {
		return nil, errors.New("drawing a serial: nothing but zeros came")
	}
	return n, nil
}
