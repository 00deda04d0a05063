package main

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshca/meshca/api/serial"
)

// certificate is one of a chain, as it is shown.
type certificate struct {
	// Role is leaf, intermediate or root.
	Role               string    `json:"role"`
	SPIFFEID           string    `json:"spiffeId,omitempty"`
	Subject            string    `json:"subject"`
	Issuer             string    `json:"issuer"`
	Serial             string    `json:"serial"`
	NotBefore          time.Time `json:"notBefore"`
	NotAfter           time.Time `json:"notAfter"`
	Key                string    `json:"key"`
	SignatureAlgorithm string    `json:"signatureAlgorithm"`
	KeyUsage           []string  `json:"keyUsage"`
	ExtKeyUsage        []string  `json:"extKeyUsage"`
	DNSNames           []string  `json:"dnsNames"`
	URIs               []string  `json:"uris"`
	CA                 bool      `json:"ca"`
	SubjectKeyID       string    `json:"subjectKeyId"`
	AuthorityKeyID     string    `json:"authorityKeyId"`
	SHA256             string    `json:"sha256"`
}

// idOf is the SPIFFE ID of a certificate: its one URI SAN (X509-SVID §2).
func idOf(cert *x509.Certificate) (spiffeid.ID, error) {
	if len(cert.URIs) != 1 {
		return spiffeid.ID{}, fmt.Errorf("it has %d URI SANs", len(cert.URIs))
	}
	return spiffeid.FromURI(cert.URIs[0])
}

func viewCertificate(cert *x509.Certificate, first bool) certificate {
	v := certificate{
		Subject: cert.Subject.String(), Issuer: cert.Issuer.String(), Serial: serial.String(cert.SerialNumber),
		NotBefore: cert.NotBefore.UTC(), NotAfter: cert.NotAfter.UTC(), Key: keyName(cert.PublicKey), SignatureAlgorithm: cert.SignatureAlgorithm.String(),
		KeyUsage: keyUsages(cert.KeyUsage), ExtKeyUsage: extKeyUsages(cert), DNSNames: append([]string{}, cert.DNSNames...), URIs: []string{},
		CA: cert.IsCA, SubjectKeyID: hex.EncodeToString(cert.SubjectKeyId), AuthorityKeyID: hex.EncodeToString(cert.AuthorityKeyId), SHA256: fingerprint(cert.Raw),
	}
	for _, u := range cert.URIs {
		v.URIs = append(v.URIs, u.String())
	}
	if id, err := idOf(cert); err == nil {
		v.SPIFFEID = id.String()
	}
	switch {
	case first:
		v.Role = "leaf"
	case selfSigned(cert):
		v.Role = "root"
	default:
		v.Role = "intermediate"
	}
	return v
}

func selfSigned(cert *x509.Certificate) bool {
	return string(cert.RawSubject) == string(cert.RawIssuer) && cert.CheckSignatureFrom(cert) == nil
}

func keyName(pub any) string {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return "ECDSA " + k.Curve.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	case ed25519.PublicKey:
		return "Ed25519"
	}
	return fmt.Sprintf("%T", pub)
}

func keyUsages(u x509.KeyUsage) []string {
	names := []string{"digitalSignature", "contentCommitment", "keyEncipherment", "dataEncipherment", "keyAgreement", "keyCertSign", "cRLSign", "encipherOnly", "decipherOnly"}
	out := []string{}
	for i, n := range names {
		if u&(1<<i) != 0 {
			out = append(out, n)
		}
	}
	return out
}

func extKeyUsages(cert *x509.Certificate) []string {
	known := map[x509.ExtKeyUsage]string{
		x509.ExtKeyUsageAny: "any", x509.ExtKeyUsageServerAuth: "serverAuth", x509.ExtKeyUsageClientAuth: "clientAuth",
		x509.ExtKeyUsageCodeSigning: "codeSigning", x509.ExtKeyUsageEmailProtection: "emailProtection",
		x509.ExtKeyUsageTimeStamping: "timeStamping", x509.ExtKeyUsageOCSPSigning: "OCSPSigning",
	}
	out := []string{}
	for _, u := range cert.ExtKeyUsage {
		name, ok := known[u]
		if !ok {
			name = fmt.Sprintf("usage %d", u)
		}
		out = append(out, name)
	}
	for _, oid := range cert.UnknownExtKeyUsage {
		out = append(out, oid.String())
	}
	return out
}

func drawInspection(p *page, x inspection) {
	for i, cert := range x.Chain {
		p.gap()
		title := strings.ToUpper(cert.Role[:1]) + cert.Role[1:]
		if cert.SPIFFEID != "" {
			title += "  " + cert.SPIFFEID
		}
		p.line("%s", title)
		list := []pair{
			{"subject", text(cert.Subject)},
			{"serial", text(cert.Serial)},
			{"valid from", p.moment(cert.NotBefore)},
			{"until", p.ends(timestamppb.New(cert.NotBefore), timestamppb.New(cert.NotAfter))},
			{"key", text(cert.Key)},
			{"usage", text(strings.Join(append(append([]string{}, cert.KeyUsage...), cert.ExtKeyUsage...), ", "))},
			{"DNS names", text(strings.Join(cert.DNSNames, ", "))},
			{"signed by", text(cert.Issuer)},
			{"signed with", text(cert.SignatureAlgorithm)},
			{"SHA-256", text(cert.SHA256)},
		}
		if i > 0 {
			list = append(list[:5], list[7:]...)
		}
		p.pairs(list...)
	}
	p.gap()
	drawFindings(p, x.Findings)
}
