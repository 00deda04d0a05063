package lint

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Rule is one lint of our own.
type Rule struct {
	// Name is stable: it stands in refusals.
	Name string
	// Citation is where the rule is written.
	Citation string
	// Check returns how a template breaks the rule under its issuer; nil when it does not.
	Check func(template, issuer *x509.Certificate) error
}

// Rules returns the lints that every template of a leaf has to pass, in the order in which they run.
func Rules() []Rule {
	return []Rule{
		{"spiffe_one_uri_san", "SPIFFE X509-SVID §2", oneURI},
		{"spiffe_id_valid", "SPIFFE-ID §2", validID},
		{"spiffe_leaf_id_has_path", "SPIFFE X509-SVID §3.1", idHasPath},
		{"spiffe_same_trust_domain", "SPIFFE X509-SVID §3.2", sameTrustDomain},
		{"spiffe_leaf_is_no_ca", "SPIFFE X509-SVID §4.1", noCA},
		{"spiffe_leaf_key_usage", "SPIFFE X509-SVID §4.3", keyUsage},
		{"spiffe_leaf_extended_key_usage", "SPIFFE X509-SVID §4.4", extendedKeyUsage},
		{"spiffe_no_other_sans", "RFC 5280 §4.2.1.6", noOtherSANs},
		{"dns_names_valid", "RFC 1123 §2.1, RFC 5280 §4.2.1.6", dnsNames},
		{"subject_empty", "RFC 5280 §4.1.2.6", subjectEmpty},
		{"serial_number", "RFC 5280 §4.1.2.2", serialNumber},
		{"validity_order", "RFC 5280 §4.1.2.5", validityOrder},
		{"validity_within_issuer", "RFC 5280 §6.1.3", withinIssuer},
		{"subject_public_key", "RFC 5480 §2.1.1.1, RFC 8017 §3.1, RFC 8410 §3", publicKey},
		{"subject_key_id", "RFC 5280 §4.2.1.2", subjectKeyID},
		{"authority_key_id", "RFC 5280 §4.2.1.1", authorityKeyID},
		{"no_extra_extensions", "RFC 5280 §4.2", noExtraExtensions},
	}
}

func oneURI(t, _ *x509.Certificate) error {
	if len(t.URIs) != 1 {
		return fmt.Errorf("%d URI SANs", len(t.URIs))
	}
	return nil
}

func validID(t, _ *x509.Certificate) error {
	id := t.URIs[0].String()
	if len(id) > maxIDLength {
		return fmt.Errorf("the SPIFFE ID has %d bytes, more than %d", len(id), maxIDLength)
	}
	_, err := spiffeid.FromString(id)
	return err
}

// maxIDLength is SPIFFE-ID §2.3.
const maxIDLength = 2048

func idHasPath(t, _ *x509.Certificate) error {
	if t.URIs[0].Path == "" {
		return errors.New("the SPIFFE ID of a leaf has no path")
	}
	return nil
}

func sameTrustDomain(t, issuer *x509.Certificate) error {
	// A signing certificate need not be an SVID; where it is one, both are of one trust domain here.
	if len(issuer.URIs) == 1 && issuer.URIs[0].Host != t.URIs[0].Host {
		return errors.New("the issuer is of another trust domain")
	}
	return nil
}

func noCA(t, _ *x509.Certificate) error {
	if !t.BasicConstraintsValid || t.IsCA {
		return errors.New("the leaf is not marked as no CA")
	}
	return nil
}

func keyUsage(t, _ *x509.Certificate) error {
	const allowed = x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement
	if t.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return errors.New("digitalSignature is missing")
	}
	if t.KeyUsage&^allowed != 0 {
		return errors.New("a usage beyond digitalSignature, keyEncipherment and keyAgreement")
	}
	return nil
}

func extendedKeyUsage(t, _ *x509.Certificate) error {
	if !slices.Contains(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth) || !slices.Contains(t.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		return errors.New("serverAuth or clientAuth is missing")
	}
	if len(t.ExtKeyUsage) > 2 || len(t.UnknownExtKeyUsage) > 0 {
		return errors.New("a usage beyond serverAuth and clientAuth")
	}
	return nil
}

func noOtherSANs(t, _ *x509.Certificate) error {
	if len(t.EmailAddresses) > 0 || len(t.IPAddresses) > 0 {
		return errors.New("e-mail or IP SANs, which no policy grants")
	}
	return nil
}

func dnsNames(t, _ *x509.Certificate) error {
	for i, n := range t.DNSNames {
		if !isHostName(n) {
			return fmt.Errorf("DNS SAN %d is no host name in lower case", i+1)
		}
		if slices.Contains(t.DNSNames[:i], n) {
			return fmt.Errorf("DNS SAN %d stands there twice", i+1)
		}
	}
	return nil
}

// isHostName takes lower-case LDH labels of 1 to 63 octets, 253 in all; no wildcard, no trailing dot, no underscore.
func isHostName(s string) bool {
	if len(s) == 0 || len(s) > 253 {
		return false
	}
	start := 0
	for i := 0; i <= len(s); i++ {
		if i < len(s) && s[i] != '.' {
			c := s[i]
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
				return false
			}
			continue
		}
		label := s[start:i]
		if len(label) == 0 || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		start = i + 1
	}
	return true
}

func subjectEmpty(t, _ *x509.Certificate) error {
	// With a subject the SAN would not be critical, and the CN would be read as a name by old software.
	if len(t.RawSubject) > 0 || len(t.Subject.Names) > 0 || len(t.Subject.ExtraNames) > 0 || len(t.Subject.ToRDNSequence()) > 0 {
		return errors.New("the leaf has a subject")
	}
	return nil
}

func serialNumber(t, _ *x509.Certificate) error {
	if t.SerialNumber == nil || t.SerialNumber.Sign() <= 0 {
		return errors.New("the serial is not positive")
	}
	// At most 20 octets as an INTEGER, whose first bit is the sign.
	if t.SerialNumber.BitLen() > 159 {
		return errors.New("the serial is longer than 20 octets")
	}
	return nil
}

func validityOrder(t, _ *x509.Certificate) error {
	if !t.NotBefore.Before(t.NotAfter) {
		return errors.New("notAfter is not after notBefore")
	}
	return nil
}

func withinIssuer(t, issuer *x509.Certificate) error {
	if t.NotAfter.After(issuer.NotAfter) {
		return errors.New("the leaf outlives its issuer")
	}
	return nil
}

func publicKey(t, _ *x509.Certificate) error {
	switch pub := t.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if pub.Curve == elliptic.P256() || pub.Curve == elliptic.P384() {
			return nil
		}
	case *rsa.PublicKey:
		if bits := pub.N.BitLen(); bits == 2048 || bits == 3072 || bits == 4096 {
			return nil
		}
	case ed25519.PublicKey:
		if len(pub) == ed25519.PublicKeySize {
			return nil
		}
	}
	return errors.New("the key is not ECDSA P-256 or P-384, RSA of 2048, 3072 or 4096 bits, or Ed25519")
}

func subjectKeyID(t, issuer *x509.Certificate) error {
	switch {
	case len(t.SubjectKeyId) == 0:
		return errors.New("it is missing")
	case bytes.Equal(t.SubjectKeyId, issuer.SubjectKeyId):
		return errors.New("it is the issuer's own")
	}
	return nil
}

func authorityKeyID(t, issuer *x509.Certificate) error {
	if len(issuer.SubjectKeyId) == 0 || !bytes.Equal(t.AuthorityKeyId, issuer.SubjectKeyId) {
		return errors.New("it is not the issuer's subject key id")
	}
	return nil
}

func noExtraExtensions(t, _ *x509.Certificate) error {
	if len(t.ExtraExtensions) > 0 || len(t.Policies) > 0 || len(t.PolicyIdentifiers) > 0 ||
		len(t.OCSPServer) > 0 || len(t.IssuingCertificateURL) > 0 || len(t.CRLDistributionPoints) > 0 ||
		len(t.PermittedDNSDomains) > 0 || len(t.PermittedURIDomains) > 0 {
		return errors.New("an extension that no leaf of ours has")
	}
	return nil
}
