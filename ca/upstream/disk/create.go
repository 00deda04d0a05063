package disk

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	casapi "github.com/smallstep/certificates/cas/apiv1"
	"github.com/smallstep/certificates/cas/softcas"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/keyutil"
	"go.step.sm/crypto/pemutil"

	"github.com/meshca/meshca/ca/keyfile"
	"github.com/meshca/meshca/ca/pkcs11"
)

// DefaultRootLife is the life of a root that Create makes.
const DefaultRootLife = 10 * 365 * 24 * time.Hour

// CreateOptions describes a root to be made. TrustDomain is needed.
type CreateOptions struct {
	TrustDomain spiffeid.TrustDomain
	// Life is DefaultRootLife by default.
	Life time.Duration
	// CommonName is "meshca root <trust domain>" by default.
	CommonName string
}

// Create makes a root (ECDSA P-256, path length 1) and writes it to f.Cert (0644) and f.Key (0600), in directories that
// it makes with mode 0700 where they are missing. It refuses when either file exists. Where f.Key is a PKCS #11 URI the
// key is made in the token, which must not have one with that label.
func Create(f Files, o CreateOptions) (*x509.Certificate, error) {
	if o.TrustDomain.IsZero() {
		return nil, errors.New("a root needs a trust domain")
	}
	if o.Life == 0 {
		o.Life = DefaultRootLife
	}
	if o.CommonName == "" {
		o.CommonName = "meshca root " + o.TrustDomain.Name()
	}
	if f.Passphrase != "" {
		return nil, errors.New("a root is made with a plain key; encrypt it with openssl afterwards, or import it")
	}
	if err := absent(f); err != nil {
		return nil, err
	}
	if pkcs11.IsURI(f.Key) {
		return createInToken(f, o)
	}
	key, err := keyutil.GenerateSigner("EC", "P-256", 0)
	if err != nil {
		return nil, fmt.Errorf("making the root's key: %w", err)
	}
	root, err := selfSigned(key, o)
	if err != nil {
		return nil, fmt.Errorf("making the root: %w", err)
	}
	return root, write(f, []*x509.Certificate{root}, key)
}

// createInToken makes the root's key in a token, and writes its certificate to f.Cert.
func createInToken(f Files, o CreateOptions) (root *x509.Certificate, err error) {
	u, err := f.uri()
	if err != nil {
		return nil, err
	}
	key, err := f.Tokens.Make(u)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Tokens.Destroy(key.URI()))
		}
	}()
	if root, err = selfSigned(key, o); err != nil {
		return nil, fmt.Errorf("making the root: %w", err)
	}
	if err := makeDirs(f); err != nil {
		return nil, err
	}
	return root, writeCerts(f.Cert, []*x509.Certificate{root})
}

// importFromToken checks a root whose key is in its token already, and copies its certificate.
func importFromToken(from, to Files) (*x509.Certificate, error) {
	if from.Key != "" {
		return nil, errors.New("a key is not put into a PKCS #11 token from here: import it with the token's own tools " +
			"(softhsm2-util --import, pkcs11-tool --write-object), and then leave the key out")
	}
	u, err := to.uri()
	if err != nil {
		return nil, err
	}
	chain, err := readChain(from.Cert)
	if err != nil {
		return nil, err
	}
	key, err := to.Tokens.Find(u)
	if err != nil {
		return nil, err
	}
	if err := check(Files{Cert: from.Cert, Key: u.String()}, chain, key, time.Now()); err != nil {
		return nil, err
	}
	if err := makeDirs(to); err != nil {
		return nil, err
	}
	return chain[len(chain)-1], writeCerts(to.Cert, chain)
}

// Import checks a root that exists elsewhere and copies it to where to says. The key stays as it is, encrypted or not;
// its passphrase is read from from.Passphrase, or where that is empty from to.Passphrase, which is what the CA will read.
// It refuses when either file exists. Where to.Key is a PKCS #11 URI the key must be in the token already, and from.Key
// is empty.
func Import(from, to Files) (*x509.Certificate, error) {
	if from.Passphrase == "" {
		from.Passphrase = to.Passphrase
	}
	if err := absent(to); err != nil {
		return nil, err
	}
	if pkcs11.IsURI(to.Key) {
		return importFromToken(from, to)
	}
	if pkcs11.IsURI(from.Key) {
		return nil, errors.New("a key does not leave its PKCS #11 token: name it as the key of the root in the configuration, and leave it out here")
	}
	i, err := read(from)
	if err != nil {
		return nil, err
	}
	key, err := keyfile.Read(from.Key)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	if err := makeDirs(to); err != nil {
		return nil, err
	}
	return i.chain[len(i.chain)-1], writeBoth(to, i.chain, key)
}

// selfSigned makes the root's certificate.
func selfSigned(key crypto.Signer, o CreateOptions) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	keyID := sha256.Sum256(spki) // RFC 7093 §2 method 4
	now := time.Now().UTC()
	template := &x509.Certificate{
		PublicKey:             key.Public(),
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: o.CommonName},
		NotBefore:             now.Add(-backdate).Truncate(time.Second),
		NotAfter:              now.Add(o.Life).Truncate(time.Second),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            1,
		SubjectKeyId:          keyID[:20],
		URIs:                  []*url.URL{o.TrustDomain.ID().URL()},
	}
	parent := *template
	made, err := (&softcas.SoftCAS{CertificateChain: []*x509.Certificate{&parent}, Signer: key}).CreateCertificate(
		&casapi.CreateCertificateRequest{Template: template, Lifetime: o.Life})
	if err != nil {
		return nil, err
	}
	return made.Certificate, nil
}

// absent refuses when either file is there, so that nothing is made in vain.
func absent(f Files) error {
	for _, path := range f.paths() {
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%w: %s. A root is never overwritten; if it is really to go, move it away yourself", os.ErrExist, path)
		}
	}
	return nil
}

// paths are the files that there are.
func (f Files) paths() []string {
	if pkcs11.IsURI(f.Key) {
		return []string{f.Cert}
	}
	return []string{f.Key, f.Cert}
}

func makeDirs(f Files) error {
	for _, path := range f.paths() {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return fmt.Errorf("the root's directory: %w", err)
		}
	}
	return nil
}

func write(f Files, chain []*x509.Certificate, key crypto.Signer) error {
	if err := makeDirs(f); err != nil {
		return err
	}
	block, err := pemutil.Serialize(key, pemutil.WithPKCS8(true))
	if err != nil {
		return fmt.Errorf("encoding the root's key: %w", err)
	}
	data := pem.EncodeToMemory(block)
	defer clear(data)
	return writeBoth(f, chain, data)
}

// writeBoth writes the key before the certificate: a certificate without its key would look like a root.
func writeBoth(f Files, chain []*x509.Certificate, key []byte) error {
	if err := writeNew(f.Key, key, 0o600); err != nil {
		return fmt.Errorf("writing the root's key: %w", err)
	}
	// gofail: var rootKeyWritten struct{}
	if err := writeCerts(f.Cert, chain); err != nil {
		return errors.Join(err, os.Remove(f.Key))
	}
	return nil
}

func writeCerts(path string, chain []*x509.Certificate) error {
	var certs bytes.Buffer
	for _, c := range chain {
		if err := pem.Encode(&certs, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			return err
		}
	}
	if err := writeNew(path, certs.Bytes(), 0o644); err != nil {
		return fmt.Errorf("writing the root's certificate: %w", err)
	}
	return nil
}
