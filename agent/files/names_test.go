package files

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshca/meshca/test/pki"
)

var everySet = []Names{Istio, GKE, TLS, CredentialBundle}

func newRoot(t testing.TB) *pki.Root {
	t.Helper()
	r, err := pki.NewRoot("mesh.test")
	must(t, err)
	return r
}

func newSVID(t testing.TB, r *pki.Root) *x509svid.SVID {
	t.Helper()
	s, err := r.SVID("/ns/shop/sa/web", time.Hour)
	must(t, err)
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestEachSetHasItsNamesAndContent(t *testing.T) {
	r := newRoot(t)
	svid, bundle := newSVID(t, r), r.Bundle(7)
	for set, want := range map[Names]string{
		Istio:            "cert-chain.pem key.pem root-cert.pem",
		GKE:              "ca_certificates.pem certificates.pem private_key.pem trust_bundles.json",
		TLS:              "ca.crt tls.crt tls.key",
		CredentialBundle: "credentialbundle.pem trustbundle.pem",
	} {
		made, err := render([]Names{set}, svid, bundle)
		must(t, err)
		if got := strings.Join(slices.Sorted(maps.Keys(made)), " "); got != want {
			t.Errorf("%s: %s, want %s", set, got, want)
		}
		read, err := parseIdentity(made)
		must(t, err)
		if read.ID != svid.ID || !read.Certificates[0].Equal(svid.Certificates[0]) {
			t.Errorf("%s: it reads as %v", set, read.ID)
		}
		for name, f := range made {
			if holds := bytes.Contains(f.data, []byte("PRIVATE KEY")); holds != f.secret {
				t.Errorf("%s: secret %t, holds a key %t", name, f.secret, holds)
			}
		}
		trust, err := render([]Names{set}, nil, bundle)
		must(t, err)
		for name, f := range trust {
			if f.secret || strings.Contains(string(f.data), svid.ID.String()) || !bytes.Equal(f.data, made[name].data) {
				t.Errorf("%s without an SVID: %s", name, f.data)
			}
		}
		if len(trust) == 0 || len(trust) >= len(made) {
			t.Errorf("%s: %d files without an SVID, %d with one", set, len(trust), len(made))
		}
	}
}

func TestTheCredentialBundleBeginsWithTheKey(t *testing.T) {
	r := newRoot(t)
	made, err := render(everySet, newSVID(t, r), r.Bundle(1))
	must(t, err)
	if !bytes.HasPrefix(made["credentialbundle.pem"].data, []byte("-----BEGIN PRIVATE KEY-----\n")) {
		t.Errorf("it begins %.40s", made["credentialbundle.pem"].data)
	}
	if !bytes.HasSuffix(made["credentialbundle.pem"].data, made["tls.crt"].data) {
		t.Error("it does not end with the chain")
	}
}

func TestRoots(t *testing.T) {
	r, next := newRoot(t), newRoot(t)
	bundle := r.Bundle(7, next)
	must(t, bundle.AddJWTAuthority("a", newSVID(t, r).PrivateKey.Public()))
	made, err := render(everySet, nil, bundle)
	must(t, err)
	pem, err := x509bundle.Parse(r.Domain, made["ca.crt"].data)
	must(t, err)
	if len(pem.X509Authorities()) != 2 {
		t.Errorf("ca.crt holds %d roots", len(pem.X509Authorities()))
	}
	var m struct {
		Domains map[string]json.RawMessage `json:"trust_domains"`
	}
	must(t, json.Unmarshal(made["trust_bundles.json"].data, &m))
	b, err := spiffebundle.Parse(r.Domain, m.Domains["mesh.test"])
	must(t, err)
	if n, _ := b.SequenceNumber(); n != 7 || len(m.Domains) != 1 || len(b.X509Authorities()) != 2 || len(b.JWTAuthorities()) != 0 {
		t.Errorf("the bundle map holds %d domains, sequence %d, %d roots, %d keys of JWTs", len(m.Domains), n, len(b.X509Authorities()), len(b.JWTAuthorities()))
	}
}
