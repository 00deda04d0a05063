package bolt

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"slices"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/rotation"
)

// selfSigned is a root.
func selfSigned(t *testing.T) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	root, err := x509.ParseCertificate(der)
	must(t, err)
	return root
}

// What the store that stands trusts goes on to be trusted by an older backup, for as long as what it signed can live,
// unless it is tainted.
func TestRestoreCutsNobodyOff(t *testing.T) {
	s, path := decided(t)
	old := backup(t, s)
	replaced, stolen := selfSigned(t), selfSigned(t)
	bundle, err := bundleOf(2).With(replaced, stolen)
	must(t, err)
	must(t, s.SwapBundle(t.Context(), 1, bundle))
	_, version, err := s.Rollout(t.Context())
	must(t, err)
	// Its key is tainted, by another certificate.
	must(t, s.SwapRollout(t.Context(), version, rotation.Rollout{Step: rotation.StepOut, Taints: []rotation.Taint{{ID: "another", Key: ca.KeyOf(stolen)}}}))
	closed(t, s)
	now := time.Now()
	for _, dry := range []bool{true, false} {
		r, err := restore(t, old, path, accepting, func(o *RestoreOptions) { o.DryRun = dry })
		must(t, err)
		roots, err := r.State.Bundle.Roots()
		behind := slices.DeleteFunc(r.State.Rollout.Behind, func(b rotation.Behind) bool { return !b.Kept })
		if err != nil || len(roots) != 1 || !roots[0].Equal(replaced) || len(behind) != 1 || behind[0].ID != ca.RootID(replaced) {
			t.Fatalf("dry: %v: %d roots, %v; %+v", dry, len(roots), err, behind)
		}
		if left := behind[0].By.Sub(now); left < ca.MaxTTL || left > ca.MaxTTL+time.Minute {
			t.Errorf("dry: %v: it stays for %s", dry, left)
		}
	}
	s = opened(t, path)
	defer closed(t, s)
	kept, err := s.Bundle(t.Context())
	must(t, err)
	roots, err := kept.Roots()
	if td, tdErr := kept.TrustDomain(); err != nil || tdErr != nil || td != "example.org" || !slices.ContainsFunc(roots, replaced.Equal) || kept.Sequence <= bundle.Sequence {
		t.Errorf("the bundle is %d %s, %v", kept.Sequence, kept.JSON, err)
	}
}
