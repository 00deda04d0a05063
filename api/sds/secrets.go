package sds

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Secrets is what one source serves: immutable, each secret with a version that is the hash of its content, encoded at
// most once however many streams send it. It is safe for concurrent use, and prints without what it holds.
type Secrets struct {
	// byName has every name that can be asked for, under each way of validation.
	byName [2]map[string]*resource
	// own are the names that a wildcard stands for: identities and trust domains, no aliases.
	own      []string
	sequence uint64
	end      error
	parting  *Parting
}

// SecretsConfig is what Secrets are made of. Neither it nor what it points to may change afterwards.
type SecretsConfig struct {
	// SVIDs are the identities, the default first: chains with the leaf first and without a root, keys that can be
	// written as PKCS #8. It may be empty.
	SVIDs []*x509svid.SVID
	// Bundles are the trust bundles, the own trust domain's first; none without X.509 roots. It may be empty.
	Bundles []*spiffebundle.Bundle
	// Parting is the last one of this source, and stays in all its Secrets from then on; nil: there was none.
	Parting *Parting
}

// Parting ends the streams that were open when a source took something away from its peers, say because their identity was
// denied: they hear why. Who comes back is served what is left. A source makes a new one each time: which one it is counts,
// not what it says.
type Parting struct{ Why error }

// NewSecrets checks that what it is given belongs together (a key to its leaf, an ID to its certificate) and makes
// Secrets of it. It copies nothing that is large.
func NewSecrets(c SecretsConfig) (*Secrets, error) {
	s := &Secrets{parting: c.Parting}
	for v := range s.byName {
		s.byName[v] = make(map[string]*resource, len(c.SVIDs)+len(c.Bundles)+3)
	}
	for i, svid := range c.SVIDs {
		if err := s.addSVID(svid, i == 0); err != nil {
			return nil, err
		}
	}
	if err := s.addBundles(c.Bundles); err != nil {
		return nil, err
	}
	slices.Sort(s.own)
	return s, nil
}

// End is a value for a source whose peer is no longer served, say because its pod is gone: every stream that comes to
// see it ends with err, and no new one opens.
func End(err error) *Secrets {
	if err == nil {
		err = errors.New("the peer is no longer served")
	}
	return &Secrets{end: err}
}

// Sequence is the own bundle's sequence number, or zero where it has none.
func (s *Secrets) Sequence() uint64 { return s.sequence }

// Format keeps keys out of every print.
func (s *Secrets) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "(secrets)") }

func (s *Secrets) addSVID(svid *x509svid.SVID, first bool) error {
	if svid == nil || len(svid.Certificates) == 0 {
		return errors.New("an identity without a certificate cannot be served")
	}
	id := svid.ID.String()
	if got, err := x509svid.IDFromCert(svid.Certificates[0]); err != nil || got != svid.ID {
		return fmt.Errorf("the certificate given for %s is not one of it", id)
	}
	if s.byName[validateSPIFFE][id] != nil {
		return fmt.Errorf("%s is given twice", id)
	}
	key, err := pkcs8Of(svid)
	if err != nil {
		return fmt.Errorf("the key of %s: %w", id, err)
	}
	names := []string{id}
	if first {
		names = append(names, NameDefault)
	}
	for _, name := range names {
		r := newCertificate(name, svid.Certificates, key)
		s.byName[validateSPIFFE][name], s.byName[validatePlain][name] = r, r
	}
	s.own = append(s.own, id)
	return nil
}

func (s *Secrets) addBundles(bundles []*spiffebundle.Bundle) error {
	all := make([]trusted, 0, len(bundles))
	for i, b := range bundles {
		t, err := trustedOf(b)
		if err != nil {
			return err
		}
		id := t.domain.IDString()
		if s.byName[validateSPIFFE][id] != nil {
			return fmt.Errorf("the bundle of %s is given twice", id)
		}
		names := []string{id}
		if i == 0 {
			names = append(names, NameRootCA)
			s.sequence, _ = b.SequenceNumber()
		}
		for _, name := range names {
			for v := range s.byName {
				s.byName[v][name] = newContext(name, validation(v), t)
			}
		}
		s.own = append(s.own, id)
		all = append(all, t)
	}
	if len(all) == 0 {
		return nil
	}
	slices.SortFunc(all, func(a, b trusted) int { return a.domain.Compare(b.domain) })
	s.byName[validateSPIFFE][NameAll] = newContext(NameAll, validateSPIFFE, all...)
	if len(all) == 1 {
		// A plain trusted_ca cannot say which root stands for which trust domain: of several in one, each could vouch
		// for the others' identities. So ALL has a plain form only while there is one.
		s.byName[validatePlain][NameAll] = newContext(NameAll, validatePlain, all...)
	}
	return nil
}

// trusted is a trust domain with its roots in one order for ever, so that a shuffled bundle is no new content.
type trusted struct {
	domain spiffeid.TrustDomain
	roots  []*x509.Certificate
}

func trustedOf(b *spiffebundle.Bundle) (trusted, error) {
	if b == nil {
		return trusted{}, errors.New("a bundle that is nil cannot be served")
	}
	t := trusted{domain: b.TrustDomain(), roots: slices.Clone(b.X509Authorities())}
	if len(t.roots) == 0 {
		return trusted{}, fmt.Errorf("the bundle of %s holds no X.509 root", t.domain)
	}
	slices.SortFunc(t.roots, func(a, b *x509.Certificate) int { return bytes.Compare(a.Raw, b.Raw) })
	return t, nil
}

// pkcs8Of is the SVID's key, after a check that it is the leaf's.
func pkcs8Of(svid *x509svid.SVID) ([]byte, error) {
	if svid.PrivateKey == nil {
		return nil, errors.New("it is missing")
	}
	public, ok := svid.PrivateKey.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(svid.Certificates[0].PublicKey) {
		return nil, errors.New("it is not the leaf certificate's")
	}
	return x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
}

// lookup finds the secret of a name; nil where there is none, or nothing yet.
func (s *Secrets) lookup(name string, v validation) *resource {
	if s == nil {
		return nil
	}
	return s.byName[v][name]
}

// owns reports whether a wildcard brings the name.
func (s *Secrets) owns(name string) bool {
	if s == nil {
		return false
	}
	_, found := slices.BinarySearch(s.own, name)
	return found
}
