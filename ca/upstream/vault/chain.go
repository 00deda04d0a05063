package vault

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
)

const (
	// maxPool bounds the certificates that a chain is looked for in: parsing one is cheap, checking a signature is not.
	maxPool = 64
	// maxPath bounds a chain, its root included.
	maxPath = 6
)

var (
	errNoAnchor    = errors.New("the self-signed end of the chain is not known")
	errManyAnchors = errors.New("several roots could be the end of the chain")
)

// parseCertificates reads PEM: certificates alone, at least one.
func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a PEM block of type %.40q stands where a certificate should", block.Type)
		}
		if len(certs) == maxPool {
			return nil, fmt.Errorf("more than %d certificates", maxPool)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, errors.New("no PEM certificate")
	}
	return certs, nil
}

// pool is the certificates that a chain may lead through, each once.
type pool struct {
	certs   []*x509.Certificate
	anchors []*x509.Certificate // of those, what the configuration names
}

func newPool(anchors []*x509.Certificate) *pool {
	p := &pool{anchors: anchors}
	p.add(anchors...)
	return p
}

func (p *pool) add(certs ...*x509.Certificate) {
	for _, c := range certs {
		if len(p.certs) < maxPool && !slices.ContainsFunc(p.certs, c.Equal) {
			p.certs = append(p.certs, c)
		}
	}
}

// path leads from a certificate to the one self-signed end that it has, both included. Where it has several, the
// configuration's decides, and failing that nothing does. Without any end it is what is known of the way, and
// errNoAnchor.
func (p *pool) path(from *x509.Certificate) ([]*x509.Certificate, error) {
	paths := p.walk(from)
	var ends, named []int
	longest := 0
	for i, path := range paths {
		if end := path[len(path)-1]; selfSigned(end) {
			ends = append(ends, i)
			if slices.ContainsFunc(p.anchors, end.Equal) {
				named = append(named, i)
			}
		}
		if len(path) > len(paths[longest]) {
			longest = i
		}
	}
	switch {
	case len(named) == 1:
		return paths[named[0]], nil
	case len(named) > 1 || len(ends) > 1:
		return nil, errManyAnchors
	case len(ends) == 0:
		return paths[longest], errNoAnchor
	}
	return paths[ends[0]], nil
}

// walk returns the shortest way to each certificate that can be reached upwards. No certificate is visited twice, so it
// costs at most as many signatures as there are pairs with the same name.
func (p *pool) walk(from *x509.Certificate) [][]*x509.Certificate {
	paths := [][]*x509.Certificate{{from}}
	seen := []*x509.Certificate{from}
	for i := 0; i < len(paths); i++ {
		top := paths[i][len(paths[i])-1]
		if selfSigned(top) || len(paths[i]) == maxPath {
			continue
		}
		for _, c := range p.certs {
			if bytes.Equal(top.RawIssuer, c.RawSubject) && !slices.ContainsFunc(seen, c.Equal) && top.CheckSignatureFrom(c) == nil {
				seen = append(seen, c)
				paths = append(paths, append(slices.Clone(paths[i]), c))
			}
		}
	}
	return paths
}

func selfSigned(c *x509.Certificate) bool {
	return bytes.Equal(c.RawIssuer, c.RawSubject) && c.CheckSignatureFrom(c) == nil
}
