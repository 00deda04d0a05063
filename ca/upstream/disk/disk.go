// Package disk is an upstream whose roots lie in files, two for each: a certificate, and its key with mode 0600. The keys
// may be in a PKCS #11 token instead.
//
// A root is made once, by an explicit step (Create), or brought along (Import); neither ever overwrites a file. Its
// successors, made by NewIssuer when a root is replaced, lie in a directory of their own.
package disk

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	casapi "github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/softcas"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/keyfile"
	"github.com/meshca/meshca/ca/pkcs11"
)

// Files names where a root lies.
type Files struct {
	// Cert is a PEM file: the certificate of the key first. For a key that is itself an intermediate's, what leads to
	// its root follows, the root last.
	Cert string
	// Key is the private key in PEM: PKCS #8, PKCS #1 or SEC 1; mode 0600 or less. Or it is a PKCS #11 URI that names a
	// key, and then Tokens reaches it.
	Key string
	// Passphrase is a file (mode 0600 or less) with the passphrase of an encrypted key; empty for a plain key.
	Passphrase string
	// Tokens is needed for a Key that is a URI.
	Tokens *pkcs11.Modules
}

// backdate is how far the NotBefore of what is signed here lies back, for clocks that are behind.
const backdate = 5 * time.Minute

// Options say where roots lie.
type Options struct {
	// Root is the one that the configuration names.
	Root Files
	// Successors is the directory of those that replace it, in two files each, NAME.crt and NAME.key; it may be missing.
	// Empty: there are none, and none can be made. Where Root's key is in a token those of its successors are there too,
	// and NAME.pkcs11 names each in place of NAME.key.
	Successors string
	// TrustDomain is whose successors are made.
	TrustDomain spiffeid.TrustDomain
}

// Upstream signs intermediates with keys in files or a token. It is safe for concurrent use.
type Upstream struct {
	o Options

	mu      sync.Mutex
	issuers []*issuer // the named one first
}

// issuer is one root, or an intermediate below it that signs in its place.
type issuer struct {
	files Files
	named bool
	ref   string
	chain []*x509.Certificate // the signing certificate first, the root last; empty where the file could not be read
	key   crypto.Signer
	// fault says why it cannot sign, as of when it was read.
	fault error
}

var _ ca.Upstream = (*Upstream)(nil)

// Open reads the roots and checks them: modes, that key and certificate belong together, that it is a CA that can have an
// intermediate below it, that no key in its chain is weak, and that it is valid now. Whatever is wrong with a root is a
// fault of its issuer alone: the key of one that was replaced may be taken away or destroyed. A successor that has ended
// is passed over. It is an error where no root is left that could sign, unless that is because it has ended. A token is
// not asked for its keys before they are to sign, and then they must be those of the certificates: one that is away now
// makes a fault of the issuer, too.
func Open(o Options) (*Upstream, error) {
	named := open(o.Root)
	named.named = true
	u := &Upstream{o: o, issuers: []*issuer{named}}
	if o.Successors != "" {
		if err := u.openSuccessors(); err != nil {
			return nil, err
		}
	}
	var faults []error
	for _, i := range u.issuers {
		if i.fault == nil || errors.Is(i.fault, errEnded) {
			return u, nil
		}
		faults = append(faults, i.fault)
	}
	return nil, errors.Join(faults...)
}

// openSuccessors adds those that replace the root that the configuration names.
func (u *Upstream) openSuccessors() error {
	if err := u.sweep(); err != nil {
		return err
	}
	certs, err := filepath.Glob(filepath.Join(keyfile.Literal(u.o.Successors), "*.crt"))
	if err != nil {
		return fmt.Errorf("looking for successors of the root: %w", err)
	}
	for _, cert := range certs {
		f, err := u.successor(strings.TrimSuffix(cert, ".crt"))
		i := open(f)
		if err != nil {
			i.fault = err
		}
		twice := slices.ContainsFunc(u.issuers, func(x *issuer) bool { return x.ref == i.ref && x.fault == nil })
		if !twice && !errors.Is(i.fault, errEnded) {
			u.issuers = append(u.issuers, i)
		}
	}
	return nil
}

// open reads a root. What is wrong with it is its fault.
func open(f Files) *issuer {
	i, err := read(f)
	i.fault = err
	return i
}

// unfit says why it cannot sign now. What is valid only later becomes so by itself, above all where the clock was wrong.
func (i *issuer) unfit() error {
	if errors.Is(i.fault, errEarly) {
		return check(i.files, i.chain, i.key, time.Now())
	}
	return i.fault
}

// read reads a root that is to sign. With an error it is as much of it as could be read.
func read(f Files) (*issuer, error) {
	i := &issuer{files: f}
	chain, err := readChain(f.Cert)
	if err != nil {
		return i, err
	}
	i.chain, i.ref = chain, refOf(chain[len(chain)-1])
	if i.key, err = openKey(f, chain[0]); err != nil {
		return i, err
	}
	return i, check(f, chain, i.key, time.Now())
}

// refOf is a root's SHA-256, in hex.
func refOf(root *x509.Certificate) string {
	sum := sha256.Sum256(root.Raw)
	return hex.EncodeToString(sum[:])
}

// Issuers returns the root that the configuration names, and its successors.
func (u *Upstream) Issuers(context.Context) ([]ca.UpstreamIssuer, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	all := make([]ca.UpstreamIssuer, len(u.issuers))
	for i, x := range u.issuers {
		all[i] = x.shown()
	}
	return all, nil
}

func (i *issuer) shown() ca.UpstreamIssuer {
	if len(i.chain) == 0 {
		return ca.UpstreamIssuer{Name: i.files.Cert, Named: i.named, Fault: i.unfit()}
	}
	root := i.chain[len(i.chain)-1]
	shown := ca.UpstreamIssuer{Ref: i.ref, Name: root.Subject.CommonName, Root: root, Path: i.chain[:len(i.chain)-1], NotAfter: i.end(), Named: i.named, Fault: i.unfit()}
	if k, ok := i.key.(*pkcs11.Key); ok && shown.Fault == nil {
		shown.Fault = k.Ready()
	}
	return shown
}

// end is the earliest end in its chain.
func (i *issuer) end() time.Time {
	end := i.chain[0].NotAfter
	for _, c := range i.chain {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// life is that of the root that the configuration names, or where that is gone, of another one that is known.
func (u *Upstream) life() time.Duration {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, i := range u.issuers {
		if n := len(i.chain); n > 0 {
			return i.chain[n-1].NotAfter.Sub(i.chain[n-1].NotBefore)
		}
	}
	return 0
}

// NewIssuer makes a root that can replace the one in use, of the same life. It is trusted by nobody yet.
func (u *Upstream) NewIssuer(context.Context) (ca.UpstreamIssuer, error) {
	if u.o.Successors == "" {
		return ca.UpstreamIssuer{}, errors.New("disk upstream: no directory for successors of the root")
	}
	f, err := u.make(CreateOptions{TrustDomain: u.o.TrustDomain, Life: u.life()})
	if err != nil {
		return ca.UpstreamIssuer{}, err
	}
	// gofail: var rootMade struct{}
	i, err := read(f)
	if err != nil {
		return ca.UpstreamIssuer{}, err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.issuers = append(u.issuers, i)
	return i.shown(), nil
}

func (u *Upstream) issuer(ref string) (*issuer, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, i := range u.issuers {
		if i.ref != ref {
			continue
		}
		if err := i.unfit(); err != nil {
			return nil, fmt.Errorf("disk upstream: %w: put that right and restart, or go to another root: `certctl ca rotate root`", err)
		}
		return i, nil
	}
	return nil, fmt.Errorf("disk upstream: no root with the SHA-256 %.64q, neither at %s nor in %s", ref, u.o.Root.Cert, u.o.Successors)
}

// SignIntermediate signs an intermediate of path length 0, never beyond the end of anything above it.
func (u *Upstream) SignIntermediate(ctx context.Context, ref string, r ca.IntermediateRequest) ([]*x509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	by, err := u.issuer(ref)
	if err != nil {
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
	if last := by.end(); last.Before(end) {
		end = last
	}
	if !end.After(now) {
		return nil, fmt.Errorf("disk upstream: the root ended at %s: `certctl ca rotate root` goes to another one", end.UTC().Format(time.RFC3339))
	}
	made, err := (&softcas.SoftCAS{CertificateChain: by.chain, Signer: ca.SignerFor(ctx, by.key)}).CreateCertificate(&casapi.CreateCertificateRequest{
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
	return append([]*x509.Certificate{made.Certificate}, by.chain[:len(by.chain)-1]...), nil
}

// same tells whether two public keys are one.
func same(a, b crypto.PublicKey) bool {
	pub, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && pub.Equal(b)
}

var (
	errEnded = errors.New("ended")
	errEarly = errors.New("is not valid yet")
)

// check says what is wrong with a root as it was read.
func check(f Files, chain []*x509.Certificate, key crypto.Signer, now time.Time) error {
	if !same(chain[0].PublicKey, key.Public()) {
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
			return fmt.Errorf("%s: certificate %d (%s) %w, but from %s on: look at the clock", f.Cert, i+1, c.Subject, errEarly, c.NotBefore.UTC().Format(time.RFC3339))
		case now.After(c.NotAfter):
			return fmt.Errorf("%s: certificate %d (%s) %w at %s", f.Cert, i+1, c.Subject, errEnded, c.NotAfter.UTC().Format(time.RFC3339))
		}
		if err := ca.CheckIssuerKey(c.PublicKey); err != nil {
			return fmt.Errorf("%s: certificate %d (%s) has %w. Bring a root with a stronger key, or make one: meshca root create", f.Cert, i+1, c.Subject, err)
		}
		if err := ca.CheckIssuerUsage(c); err != nil {
			return fmt.Errorf("%s: certificate %d (%s) has %w. Bring a root that is not so restricted, or make one: meshca root create", f.Cert, i+1, c.Subject, err)
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
