package sds

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"sync"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// TypeURL is the one resource type that is served.
const TypeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// spiffeValidator is the name of Envoy's SPIFFE certificate validator.
const spiffeValidator = "envoy.tls.cert_validator.spiffe"

// validation is how a validation context is written for a peer.
type validation int

const (
	// validateSPIFFE binds each root to its trust domain (envoy.tls.cert_validator.spiffe).
	validateSPIFFE validation = iota
	// validatePlain is a bare trusted_ca, for peers without that validator.
	validatePlain
)

// resource is one secret under one name. It is encoded when it is first sent.
type resource struct {
	name string
	// version is the hash of name and content. It is made of public parts only: a leaf fixes its key.
	version string
	// context tells a validation context from a certificate.
	context bool

	secret func() (*tlsv3.Secret, error)
	once   sync.Once
	wire   *discoveryv3.Resource
	err    error
}

// encoded is the resource as delta streams send it; SotW streams send the Any within. All streams share it.
func (r *resource) encoded() (*discoveryv3.Resource, error) {
	r.once.Do(func() {
		secret, err := r.secret()
		if err != nil {
			r.err = err
			return
		}
		r.secret = nil
		value, err := proto.MarshalOptions{Deterministic: true}.Marshal(secret)
		if err != nil {
			r.err = fmt.Errorf("encoding the secret %q: %w", r.name, err)
			return
		}
		r.wire = &discoveryv3.Resource{
			Name: r.name, Version: r.version, Resource: &anypb.Any{TypeUrl: TypeURL, Value: value},
		}
	})
	return r.wire, r.err
}

// newCertificate is a TLS certificate with its PKCS #8 key.
func newCertificate(name string, chain []*x509.Certificate, key []byte) *resource {
	h := newDigest("certificate", name)
	for _, cert := range chain {
		h.add(cert.Raw)
	}
	return &resource{name: name, version: h.String(), secret: func() (*tlsv3.Secret, error) {
		return certificateSecret(name,
			inline(pemOf(chain)),
			inline(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))), nil
	}}
}

// newContext is the validation context of one or several trust domains.
func newContext(name string, v validation, domains ...trusted) *resource {
	h := newDigest("context", name)
	h.add([]byte{byte(v)})
	for _, d := range domains {
		h.add([]byte(d.domain.Name()))
		for _, root := range d.roots {
			h.add(root.Raw)
		}
	}
	return &resource{name: name, version: h.String(), context: true, secret: func() (*tlsv3.Secret, error) {
		if v == validatePlain {
			return contextSecret(name, &tlsv3.CertificateValidationContext{TrustedCa: inline(pemOf(domains[0].roots))}), nil
		}
		config := &tlsv3.SPIFFECertValidatorConfig{}
		for _, d := range domains {
			config.TrustDomains = append(config.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
				Name: d.domain.Name(), TrustBundle: inline(pemOf(d.roots)),
			})
		}
		typed, err := anypb.New(config)
		if err != nil {
			return nil, fmt.Errorf("encoding the validator of %q: %w", name, err)
		}
		return contextSecret(name, &tlsv3.CertificateValidationContext{
			CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: spiffeValidator, TypedConfig: typed},
		}), nil
	}}
}

// newFile is a secret whose content the peer reads by itself. Envoy watches the files' folders and follows their
// rotation, because the secret came by SDS.
func newFile(name string, f fileName) *resource {
	h := newDigest("file", name)
	for _, path := range []string{f.cert, f.key, f.root} {
		h.add([]byte(path))
	}
	return &resource{name: name, version: h.String(), secret: func() (*tlsv3.Secret, error) {
		if f.root != "" {
			return contextSecret(name, &tlsv3.CertificateValidationContext{TrustedCa: filename(f.root)}), nil
		}
		return certificateSecret(name, filename(f.cert), filename(f.key)), nil
	}}
}

func certificateSecret(name string, chain, key *corev3.DataSource) *tlsv3.Secret {
	return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{
		TlsCertificate: &tlsv3.TlsCertificate{CertificateChain: chain, PrivateKey: key},
	}}
}

func contextSecret(name string, c *tlsv3.CertificateValidationContext) *tlsv3.Secret {
	return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: c}}
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

func filename(path string) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_Filename{Filename: path}}
}

func pemOf(certs []*x509.Certificate) []byte {
	var out []byte
	for _, cert := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	return out
}

// digest hashes content into a version: the same in every process, so that a peer that comes back after a restart
// is sent only what changed.
type digest struct{ parts []byte }

func newDigest(kind, name string) *digest {
	d := &digest{}
	d.add([]byte(kind))
	d.add([]byte(name))
	return d
}

// add appends a part with its length before it, so that no two lists of parts run together to the same bytes.
func (d *digest) add(part []byte) {
	d.parts = binary.BigEndian.AppendUint64(d.parts, uint64(len(part)))
	d.parts = append(d.parts, part...)
}

// sizeVersion is the length of a version: the first half of a SHA-256 in hex, 128 bits, enough against chance.
const sizeVersion = sha256.Size

func (d *digest) String() string {
	sum := sha256.Sum256(d.parts)
	return hex.EncodeToString(sum[:sha256.Size/2])
}
