package main

import (
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// longLife is beyond what an SVID should live: nothing revokes it.
const longLife = 24 * time.Hour

// examine shows a chain and judges it as an X509-SVID; roots may be nil, then nothing is said of trust.
func (c *cli) examine(source string, chain, roots []*x509.Certificate) inspection {
	x := inspection{Source: source, OK: true, Findings: []finding{}}
	for i, cert := range chain {
		x.Chain = append(x.Chain, viewCertificate(cert, i == 0))
	}
	for _, f := range judgeLeaf(chain[0], c.now()) {
		x.add(f)
	}
	for _, f := range judgeChain(chain, c.now()) {
		x.add(f)
	}
	if len(roots) > 0 {
		x.add(judgeTrust(chain, roots, c.now()))
	}
	if len(x.Findings) == 0 {
		x.add(finding{Subject: "SVID", Level: levelOK, Detail: "nothing is wrong with it as an X509-SVID"})
	}
	return x
}

func (x *inspection) add(f finding) {
	x.Findings = append(x.Findings, f)
	x.OK = x.OK && f.Level != levelError
}

// judgeLeaf holds a leaf to the SPIFFE X509-SVID standard; each finding cites its section.
func judgeLeaf(leaf *x509.Certificate, now time.Time) []finding {
	var list []finding
	wrong := func(subject, hint, format string, args ...any) {
		list = append(list, finding{Subject: subject, Level: levelError, Detail: fmt.Sprintf(format, args...), Hint: hint})
	}
	doubt := func(subject, hint, format string, args ...any) {
		list = append(list, finding{Subject: subject, Level: levelWarning, Detail: fmt.Sprintf(format, args...), Hint: hint})
	}
	switch id, err := idOf(leaf); {
	case len(leaf.URIs) == 0:
		wrong("SPIFFE ID", "It is an ordinary certificate, not an SVID.", "there is no URI SAN (X509-SVID §2)")
	case err != nil:
		wrong("SPIFFE ID", "Relying parties refuse it.", "its URI SAN is no SPIFFE ID: %v (X509-SVID §2)", err)
	case id.Path() == "":
		wrong("SPIFFE ID", "Only signing certificates carry the trust domain's own ID.", "the ID of a leaf has a path, %s has none (X509-SVID §3.1)", id)
	}
	if leaf.IsCA {
		wrong("basic constraints", "It is a signing certificate; look at the one before it in the chain.", "a leaf must not be a CA (X509-SVID §4.1)")
	}
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		wrong("key usage", "TLS 1.3 handshakes fail with it.", "digitalSignature is not set (X509-SVID §4.3)")
	}
	if leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		wrong("key usage", "A leaf's key must not sign certificates.", "keyCertSign or cRLSign is set (X509-SVID §4.3)")
	}
	if ext := extension(leaf, asn1.ObjectIdentifier{2, 5, 29, 15}); leaf.KeyUsage != 0 && (ext == nil || !*ext) {
		wrong("key usage", "Verifiers refuse it.", "the extension is not critical (X509-SVID §4.3)")
	}
	if len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) == 0 {
		doubt("extended key usage", "Some TLS stacks refuse it.", "there is none (X509-SVID §4.4)")
	} else if !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) || !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		wrong("extended key usage", "mTLS needs both: a workload is a server and a client.", "serverAuth and clientAuth are not both there (X509-SVID §4.4)")
	}
	if san := extension(leaf, asn1.ObjectIdentifier{2, 5, 29, 17}); len(leaf.Subject.Names) == 0 && san != nil && !*san {
		wrong("subject", "Strict verifiers refuse it.", "the subject is empty and the SAN extension is not critical (X509-SVID §3.1, RFC 5280 §4.1.2.6)")
	}
	if k, ok := leaf.PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() < 2048 {
		wrong("key", "Make a new key: ECDSA P-256 for choice.", "RSA of %d bits can be broken", k.N.BitLen())
	}
	if life := leaf.NotAfter.Sub(leaf.NotBefore); life > longLife {
		doubt("life", "Nothing revokes an SVID: short lives do.", "it is made to last %s", spell(life))
	}
	return append(list, judgeTimes("the leaf", leaf, now)...)
}

func judgeTimes(name string, cert *x509.Certificate, now time.Time) []finding {
	switch {
	case !now.Before(cert.NotAfter):
		return []finding{{Subject: "validity", Level: levelError, Detail: fmt.Sprintf("%s ended %s ago", name, spell(now.Sub(cert.NotAfter))),
			Hint: "`certctl explain` with its SPIFFE ID, or `certctl explain --agent` on its node, says why it was not renewed."}}
	case now.Before(cert.NotBefore):
		return []finding{{Subject: "validity", Level: levelError, Detail: fmt.Sprintf("%s is valid only in %s", name, spell(cert.NotBefore.Sub(now))),
			Hint: "Compare the clocks: this machine's is behind its issuer's."}}
	}
	return nil
}

// judgeChain looks at what stands behind the leaf, and whether each signed the one before.
func judgeChain(chain []*x509.Certificate, now time.Time) []finding {
	var list []finding
	for i, cert := range chain[1:] {
		name := fmt.Sprintf("certificate %d", i+2)
		below := chain[i]
		switch {
		case !cert.IsCA:
			list = append(list, finding{Subject: "chain", Level: levelError, Detail: name + " is no CA (X509-SVID §4.1)", Hint: "Send the leaf first, then the intermediates in order."})
		case below.CheckSignatureFrom(cert) != nil:
			list = append(list, finding{Subject: "chain", Level: levelError, Detail: fmt.Sprintf("%s did not sign the one before it", name), Hint: "Send the leaf first, then the intermediates in order."})
		}
		list = append(list, judgeTimes(name, cert, now)...)
		if below.NotAfter.After(cert.NotAfter) {
			list = append(list, finding{Subject: "chain", Level: levelWarning, Detail: fmt.Sprintf("%s ends %s before what it signed", name, spell(below.NotAfter.Sub(cert.NotAfter))),
				Hint: "From then on the chain is worth nothing, whatever the leaf says."})
		}
		if id, err := idOf(cert); err == nil && id.Path() != "" {
			list = append(list, finding{Subject: "chain", Level: levelError, Detail: fmt.Sprintf("%s signs and has the ID %s: a signing certificate's has no path (X509-SVID §3.2)", name, id), Hint: "Relying parties may refuse the chain."})
		}
		if selfSigned(cert) {
			list = append(list, finding{Subject: "chain", Level: levelWarning, Detail: name + " is a root", Hint: "Relying parties have it already, and believe none that comes with the chain; leave it out."})
		}
	}
	return list
}

func judgeTrust(chain, roots []*x509.Certificate, now time.Time) finding {
	b := bundleOf(chain, roots)
	if b == nil {
		return finding{Subject: "trust", Level: levelError, Detail: "it names no trust domain, so no bundle can vouch for it"}
	}
	if _, _, err := x509svid.Verify(chain, b, x509svid.WithTime(now)); err != nil {
		return finding{Subject: "trust", Level: levelError, Detail: "it does not lead to a root of the bundle: " + err.Error(),
			Hint: "Compare the issuer with `certctl bundle show`; a root may be missing from the bundle, or an intermediate from the chain."}
	}
	return finding{Subject: "trust", Level: levelOK, Detail: fmt.Sprintf("it leads to a root of the bundle of %s", b.TrustDomain())}
}

// keyFinding compares a key with the leaf; the key itself is never shown.
func keyFinding(leaf *x509.Certificate, key crypto.Signer) finding {
	pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(leaf.PublicKey) {
		return finding{Subject: "key", Level: levelError, Detail: "the private key beside it is another certificate's", Hint: "Handshakes fail with the two."}
	}
	return finding{Subject: "key", Level: levelOK, Detail: "the private key beside it is its own"}
}

// extension is whether an extension is critical; nil when there is none.
func extension(cert *x509.Certificate, id asn1.ObjectIdentifier) *bool {
	for _, e := range cert.Extensions {
		if e.Id.Equal(id) {
			return &e.Critical
		}
	}
	return nil
}
