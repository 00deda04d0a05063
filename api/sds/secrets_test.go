package sds

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// secretsOf makes Secrets of SVIDs under the fixture's root.
func secretsOf(t *testing.T, sequence uint64, svids ...*x509svid.SVID) *Secrets {
	t.Helper()
	s, err := NewSecrets(SecretsConfig{SVIDs: svids, Bundles: []*spiffebundle.Bundle{fixture().root.Bundle(sequence)}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// open is a secret as a proxy gets it.
func open(t *testing.T, s *Secrets, name string, v validation) *tlsv3.Secret {
	t.Helper()
	r := s.lookup(name, v)
	if r == nil {
		t.Fatalf("%q is not served", name)
	}
	wire, err := r.encoded()
	if err != nil {
		t.Fatal(err)
	}
	secret := &tlsv3.Secret{}
	if err := wire.GetResource().UnmarshalTo(secret); err != nil {
		t.Fatal(err)
	}
	return secret
}

func TestCertificateSecret(t *testing.T) {
	f := fixture()
	for _, name := range []string{NameDefault, webID} {
		for _, v := range []validation{validateSPIFFE, validatePlain} {
			c := open(t, f.first, name, v).GetTlsCertificate()
			pair, err := tls.X509KeyPair(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if !pair.Leaf.Equal(f.web.Certificates[0]) {
				t.Errorf("%s is not the first identity's certificate", name)
			}
		}
	}
}

func TestContextSecret(t *testing.T) {
	f := fixture()
	type domain struct {
		name string
		root *x509.Certificate
	}
	own, other := domain{"td.test", f.root.Cert}, domain{"other.test", f.other.Cert}
	for name, want := range map[string][]domain{
		NameRootCA: {own}, ownTD: {own}, otherTD: {other}, NameAll: {other, own},
	} {
		config := &tlsv3.SPIFFECertValidatorConfig{}
		custom := open(t, f.first, name, validateSPIFFE).GetValidationContext().GetCustomValidatorConfig()
		if custom.GetName() != "envoy.tls.cert_validator.spiffe" {
			t.Fatalf("%s: the validator is %q", name, custom.GetName())
		}
		if err := custom.GetTypedConfig().UnmarshalTo(config); err != nil {
			t.Fatal(err)
		}
		if len(config.GetTrustDomains()) != len(want) {
			t.Fatalf("%s: %d trust domains, want %d", name, len(config.GetTrustDomains()), len(want))
		}
		for i, d := range config.GetTrustDomains() {
			if d.GetName() != want[i].name || !onePEM(t, d.GetTrustBundle().GetInlineBytes()).Equal(want[i].root) {
				t.Errorf("%s: trust domain %d is %s with other roots than its own", name, i, d.GetName())
			}
		}
	}
	for name, want := range map[string]*x509.Certificate{NameRootCA: f.root.Cert, ownTD: f.root.Cert, otherTD: f.other.Cert} {
		got := open(t, f.first, name, validatePlain).GetValidationContext()
		if got.GetCustomValidatorConfig() != nil || !onePEM(t, got.GetTrustedCa().GetInlineBytes()).Equal(want) {
			t.Errorf("%s: the plain form does not hold its own root alone", name)
		}
	}
	if f.first.lookup(NameAll, validatePlain) != nil {
		t.Error("ALL has a plain form for two trust domains: each root could vouch for the other's identities")
	}
	if secretsOf(t, 1, f.web).lookup(NameAll, validatePlain) == nil {
		t.Error("ALL has no plain form for one trust domain")
	}
}

func TestVersionsFollowContent(t *testing.T) {
	f := fixture()
	version := func(s *Secrets, name string) string { return s.lookup(name, validateSPIFFE).version }
	again := secretsOf(t, 7, f.web)
	if version(again, NameDefault) != version(f.first, NameDefault) || version(again, NameRootCA) != version(f.first, NameRootCA) {
		t.Error("the same content has another version")
	}
	if version(f.later, NameDefault) == version(f.first, NameDefault) {
		t.Error("another certificate has the same version")
	}
	if version(f.first, NameDefault) == version(f.first, webID) || version(f.first, NameRootCA) == version(f.first, ownTD) {
		t.Error("two names share a version: a peer that resumes one would be taken to hold the other")
	}
	if f.first.lookup(NameRootCA, validatePlain).version == version(f.first, NameRootCA) {
		t.Error("two forms of a context share a version")
	}
	second := fixture().other
	forth, back := spiffebundle.New(f.root.Domain), spiffebundle.New(f.root.Domain)
	forth.SetX509Authorities([]*x509.Certificate{f.root.Cert, second.Cert})
	back.SetX509Authorities([]*x509.Certificate{second.Cert, f.root.Cert})
	var versions []string
	for _, b := range []*spiffebundle.Bundle{forth, back} {
		s, err := NewSecrets(SecretsConfig{Bundles: []*spiffebundle.Bundle{b}})
		if err != nil {
			t.Fatal(err)
		}
		versions = append(versions, version(s, NameRootCA))
	}
	if versions[0] != versions[1] || versions[0] == version(f.first, NameRootCA) {
		t.Error("the order of roots makes a version, or a further root makes none")
	}
}

func TestSecretsRefuse(t *testing.T) {
	f := fixture()
	mixed := *f.web
	mixed.PrivateKey = f.web2.PrivateKey
	keyless := *f.web
	keyless.PrivateKey = nil
	renamed := *f.web
	renamed.ID = f.admin.ID
	for want, c := range map[string]SecretsConfig{
		"is not the leaf certificate's": {SVIDs: []*x509svid.SVID{&mixed}},
		"it is missing":                 {SVIDs: []*x509svid.SVID{&keyless}},
		"is not one of it":              {SVIDs: []*x509svid.SVID{&renamed}},
		webID + " is given twice":       {SVIDs: []*x509svid.SVID{f.web, f.web2}},
		"without a certificate":         {SVIDs: []*x509svid.SVID{nil}},
		"holds no X.509 root":           {Bundles: []*spiffebundle.Bundle{spiffebundle.New(f.root.Domain)}},
		"td.test is given twice":        {Bundles: []*spiffebundle.Bundle{f.root.Bundle(1), f.root.Bundle(2)}},
		"is nil":                        {Bundles: []*spiffebundle.Bundle{nil}},
	} {
		if _, err := NewSecrets(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error with %q", err, want)
		}
	}
}

func TestSecretsPrintWithoutTheirKeys(t *testing.T) {
	s := secretsOf(t, 1, fixture().web)
	open(t, s, NameDefault, validateSPIFFE)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d"} {
		if got := fmt.Sprintf(verb, s); got != "(secrets)" {
			t.Errorf("%s prints %.40q", verb, got)
		}
	}
}

func TestEncodedOnce(t *testing.T) {
	s := secretsOf(t, 1, fixture().web)
	r := s.lookup(NameDefault, validateSPIFFE)
	results := make(chan any)
	for range 8 {
		go func() {
			wire, err := r.encoded()
			if err != nil {
				results <- err
			}
			results <- wire
		}()
	}
	first := <-results
	for range 7 {
		if got := <-results; got != first {
			t.Fatal("two streams got two encodings")
		}
	}
}

func TestSequence(t *testing.T) {
	if got := secretsOf(t, 42, fixture().web).Sequence(); got != 42 {
		t.Errorf("Sequence() = %d", got)
	}
}

func onePEM(t *testing.T, data []byte) *x509.Certificate {
	t.Helper()
	block, rest := pem.Decode(data)
	if block == nil || len(rest) != 0 {
		t.Fatalf("not one PEM block: %q", data)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newSecretsWith(own *spiffebundle.Bundle, svids ...*x509svid.SVID) (*Secrets, error) {
	return NewSecrets(SecretsConfig{SVIDs: svids, Bundles: []*spiffebundle.Bundle{own}})
}
