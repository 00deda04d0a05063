package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshca/meshca/api/refusal"
)

func wantReason(t *testing.T, err error, want refusal.Reason) {
	t.Helper()
	if got := refusal.Of(err); got != want {
		t.Fatalf("refused with %q (%v), want %q", got, err, want)
	}
}

func TestIssueKeyTypes(t *testing.T) {
	h := newHouse(t, 6*time.Hour, 72*time.Hour)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, pub := range map[string]crypto.PublicKey{
		"P-256": newKey(t).Public(), "P-384": p384.Public(), "RSA-2048": rsa2048.Public(), "Ed25519": ed,
	} {
		t.Run(name, func(t *testing.T) {
			r := workloadRequest(t, "cart.shop.svc")
			r.PublicKey = pub
			svid, err := h.issuer.Issue(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			leaf := svid.Chain[0]
			// A relying party's own validation, by go-spiffe.
			id, _, err := x509svid.Verify(svid.Chain, x509bundle.FromX509Authorities(testDomain, []*x509.Certificate{h.upstream.root}))
			if err != nil || id != r.Grant.ID {
				t.Fatalf("a relying party reads %v, %v", id, err)
			}
			if !samePublicKey(leaf.PublicKey, pub) {
				t.Error("the leaf has another key")
			}
			wantUsage := x509.KeyUsageDigitalSignature
			if name == "RSA-2048" {
				wantUsage |= x509.KeyUsageKeyEncipherment
			}
			if leaf.KeyUsage != wantUsage {
				t.Errorf("key usage %b, want %b", leaf.KeyUsage, wantUsage)
			}
			if len(leaf.DNSNames) != 1 || leaf.DNSNames[0] != "cart.shop.svc" || leaf.Subject.String() != "" {
				t.Errorf("names: %v, subject %q", leaf.DNSNames, leaf.Subject)
			}
			// The ledger has what was signed, from before it was signed.
			entries := h.store.all()
			e := entries[len(entries)-1]
			digest := sha256.Sum256(leaf.RawTBSCertificate)
			if !bytes.Equal(e.TBSDigest, digest[:]) || !bytes.Equal(e.Serial, leaf.SerialNumber.FillBytes(make([]byte, 16))) ||
				e.ID != r.Grant.ID.String() || e.Profile != ProfileWorkload || !e.NotAfter.Equal(leaf.NotAfter) ||
				!bytes.Equal(e.AuthorityKeyID, svid.Chain[1].SubjectKeyId) || !bytes.Equal(e.Evidence, r.Evidence) {
				t.Errorf("the ledger has %+v", e)
			}
		})
	}
}

func TestIssueRefuses(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	intermediate := h.line.Status().Chain[0]
	for name, c := range map[string]struct {
		edit func(*Request)
		want refusal.Reason
	}{
		"reserved path":         {func(r *Request) { r.Grant.ID = spiffeid.RequireFromPath(testDomain, "/meshca/server") }, refusal.IdentityReserved},
		"reserved itself":       {func(r *Request) { r.Grant.ID = spiffeid.RequireFromPath(testDomain, "/meshca") }, refusal.IdentityReserved},
		"agent elsewhere":       {func(r *Request) { r.Profile = ProfileAgent }, refusal.IdentityInvalid},
		"no path":               {func(r *Request) { r.Grant.ID = testDomain.ID() }, refusal.IdentityInvalid},
		"no identity":           {func(r *Request) { r.Grant.ID = spiffeid.ID{} }, refusal.IdentityInvalid},
		"other trust domain":    {func(r *Request) { r.Grant.ID = spiffeid.RequireFromString("spiffe://other.org/a") }, refusal.IdentityInvalid},
		"life of a moment":      {func(r *Request) { r.Grant.TTL = time.Second }, refusal.RequestMalformed},
		"negative life":         {func(r *Request) { r.Grant.TTL = -time.Hour }, refusal.RequestMalformed},
		"unknown profile":       {func(r *Request) { r.Profile = "root" }, refusal.Internal},
		"RSA-1024":              {func(r *Request) { r.PublicKey = weak.Public() }, refusal.CSRKey},
		"no key":                {func(r *Request) { r.PublicKey = nil }, refusal.CSRKey},
		"intermediate's key":    {func(r *Request) { r.PublicKey = intermediate.PublicKey }, refusal.CSRKeyIsCA},
		"root's key":            {func(r *Request) { r.PublicKey = h.upstream.root.PublicKey }, refusal.CSRKeyIsCA},
		"DNS name with a space": {func(r *Request) { r.Grant.DNSNames = []string{"a b"} }, refusal.LintFailed},
		"wildcard":              {func(r *Request) { r.Grant.DNSNames = []string{"*.shop.svc"} }, refusal.LintFailed},
	} {
		t.Run(name, func(t *testing.T) {
			r := workloadRequest(t)
			c.edit(&r)
			before := len(h.store.all())
			_, err := h.issuer.Issue(t.Context(), r)
			wantReason(t, err, c.want)
			if after := len(h.store.all()); after != before {
				t.Errorf("%d entries were recorded for what was refused", after-before)
			}
		})
	}
	if err := h.issuer.Ready(); err != nil {
		t.Errorf("refusals made the issuer unready: %v", err)
	}
}

// spyKey counts and can corrupt signatures.
type spyKey struct {
	crypto.Signer
	mu    sync.Mutex
	signs int
	spoil func(sig []byte) []byte
}

func (k *spyKey) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.signs++
	sig, err := k.Signer.Sign(r, digest, o)
	if k.spoil != nil {
		sig = k.spoil(sig)
	}
	return sig, err
}

// spy puts a spyKey in the place of the authority's key.
func (h *house) spy() *spyKey {
	s := *h.line.current.Load()
	k := &spyKey{Signer: s.key}
	s.key = k
	h.line.current.Store(&s)
	return k
}

func TestNothingIsSignedUnrecorded(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	key := h.spy()
	full := errors.New("no space left on device")

	// It failed.
	h.store.set(full, nil)
	_, err := h.issuer.Issue(t.Context(), workloadRequest(t))
	if !errors.Is(err, full) || key.signs != 0 || len(h.store.all()) != 0 {
		t.Fatalf("err %v, %d signatures, %d entries", err, key.signs, len(h.store.all()))
	}
	// It failed after it had taken effect: an intent without a certificate.
	h.store.set(nil, full)
	_, err = h.issuer.Issue(t.Context(), workloadRequest(t))
	if !errors.Is(err, full) || key.signs != 0 || len(h.store.all()) != 1 {
		t.Fatalf("err %v, %d signatures, %d entries", err, key.signs, len(h.store.all()))
	}
	// It works again, by itself.
	h.store.set(nil, nil)
	if _, err := h.issuer.Issue(t.Context(), workloadRequest(t)); err != nil || key.signs != 1 || len(h.store.all()) != 2 {
		t.Fatalf("err %v, %d signatures, %d entries", err, key.signs, len(h.store.all()))
	}
	if err := h.issuer.Ready(); err != nil {
		t.Errorf("a full disk is not the signer's fault: %v", err)
	}
}

func TestSpoiledSignatureIsDropped(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	key := h.spy()
	key.spoil = func([]byte) []byte {
		other, err := newKey(t).Sign(rand.Reader, make([]byte, 32), crypto.SHA256)
		if err != nil {
			t.Error(err)
		}
		return other
	}
	_, err := h.issuer.Issue(t.Context(), workloadRequest(t))
	wantReason(t, err, refusal.SignerMismatch)
	wantReason(t, h.issuer.Ready(), refusal.SignerMismatch)

	// What it then signs rightly is still issued, and the fault is still shown.
	key.spoil = nil
	if _, err := h.issuer.Issue(t.Context(), workloadRequest(t)); err != nil {
		t.Fatal(err)
	}
	wantReason(t, h.issuer.Ready(), refusal.SignerMismatch)
}

// remembering passes everything on and keeps the last template.
type remembering struct {
	Linter
	template *x509.Certificate
}

func (r *remembering) Lint(ctx context.Context, template, issuer *x509.Certificate, profile string) error {
	r.template = template
	return r.Linter.Lint(ctx, template, issuer, profile)
}

// TestWrongCertificateIsDropped has what was asked for and what was signed part ways while the key signs.
func TestWrongCertificateIsDropped(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	seen := &remembering{Linter: h.issuer.linter}
	h.issuer.linter = seen
	key := h.spy()
	key.spoil = func(sig []byte) []byte {
		seen.template.DNSNames = append(seen.template.DNSNames, "pay.shop.svc")
		return sig
	}
	svid, err := h.issuer.Issue(t.Context(), workloadRequest(t))
	wantReason(t, err, refusal.SignerMismatch)
	wantReason(t, h.issuer.Ready(), refusal.SignerMismatch)
	if len(svid.Chain) != 0 {
		t.Error("it was released")
	}
}

func TestLivesAndBackdating(t *testing.T) {
	for _, c := range []struct {
		profile, granted, life, back time.Duration
	}{
		{6 * time.Hour, 0, 6 * time.Hour, time.Minute},
		{6 * time.Hour, 100 * time.Hour, 6 * time.Hour, time.Minute},
		{6 * time.Hour, time.Hour, time.Hour, time.Minute},
		{6 * time.Hour, 4 * time.Minute, 4 * time.Minute, time.Minute},
		{6 * time.Hour, 20 * time.Second, 20 * time.Second, 5 * time.Second},
		{20 * time.Second, 0, 20 * time.Second, 5 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			h := newHouse(t, c.profile, 72*time.Hour)
			now := time.Now()
			r := workloadRequest(t)
			r.Grant.TTL = c.granted
			svid, err := h.issuer.Issue(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			leaf := svid.Chain[0]
			if got := leaf.NotAfter.Sub(now); got != c.life || svid.Life != c.life || !svid.NotAfter.Equal(leaf.NotAfter) || !svid.IssuedAt.Equal(now) {
				t.Errorf("%+v: life %s, reported %s", c, got, svid.Life)
			}
			if got := now.Sub(leaf.NotBefore); got != c.back {
				t.Errorf("%+v: backdated %s", c, got)
			}
		})
	}
}

func TestNotAfterIsClampedToTheChain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, 6*time.Hour, 72*time.Hour)
		end := h.line.Status().NotAfter
		time.Sleep(72*time.Hour - 2*time.Hour)
		svid, err := h.issuer.Issue(t.Context(), workloadRequest(t))
		if err != nil {
			t.Fatal(err)
		}
		if !svid.NotAfter.Equal(end) || svid.Life > 2*time.Hour {
			t.Errorf("ends at %s after %s, its intermediate at %s", svid.NotAfter, svid.Life, end)
		}
		// What the chain cuts short is backdated by its own quarter.
		brief := workloadRequest(t)
		brief.Grant.TTL = time.Minute
		time.Sleep(time.Until(end) - 20*time.Second)
		if svid, err = h.issuer.Issue(t.Context(), brief); err != nil {
			t.Fatal(err)
		}
		if back := svid.IssuedAt.Sub(svid.Chain[0].NotBefore); svid.Life != 20*time.Second || back != 5*time.Second {
			t.Errorf("a life of %s, backdated by %s", svid.Life, back)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, 6*time.Hour, 72*time.Hour)
		end := h.line.Status().NotAfter
		// A life that the chain would cut below what is of use is not signed.
		time.Sleep(time.Until(end) - time.Hour)
		hourly := workloadRequest(t)
		hourly.Grant.AtLeast = time.Hour
		if svid, err := h.issuer.Issue(t.Context(), hourly); err != nil || svid.Life != time.Hour {
			t.Errorf("a life of %s, %v", svid.Life, err)
		}
		time.Sleep(time.Second)
		entries := len(h.store.all())
		_, err := h.issuer.Issue(t.Context(), hourly)
		wantReason(t, err, refusal.IssuerEnding)
		if n := len(h.store.all()); n != entries {
			t.Errorf("the ledger grew by %d", n-entries)
		}
		// Exactly ten minutes are enough, less are not.
		time.Sleep(time.Until(end) - 10*time.Minute)
		if _, err := h.issuer.Issue(t.Context(), workloadRequest(t)); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Second)
		_, err = h.issuer.Issue(t.Context(), workloadRequest(t))
		wantReason(t, err, refusal.IssuerEnding)
		wantReason(t, h.issuer.Ready(), refusal.IssuerEnding)
		// A life of 20 s needs 5 s.
		short := workloadRequest(t)
		short.Grant.TTL = 20 * time.Second
		time.Sleep(time.Until(end) - 6*time.Second)
		if _, err := h.issuer.Issue(t.Context(), short); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Second)
		_, err = h.issuer.Issue(t.Context(), short)
		wantReason(t, err, refusal.IssuerEnding)
		// A new intermediate mends it.
		if _, err := h.line.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := h.issuer.Issue(t.Context(), workloadRequest(t)); err != nil {
			t.Error(err)
		}
	})
}

func TestIssueWithoutAuthority(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	h.line.Expired()
	_, err := h.issuer.Issue(t.Context(), workloadRequest(t))
	wantReason(t, err, refusal.IssuerNotReady)
	wantReason(t, h.issuer.Ready(), refusal.IssuerNotReady)
}

func TestIssueCancelled(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	ledger, err := NewSequencer(SequencerConfig{Store: h.store})
	if err != nil {
		t.Fatal(err)
	}
	defer ledger.Close()
	h.issuer.ledger = ledger
	key := h.spy()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.issuer.Issue(ctx, workloadRequest(t)); !errors.Is(err, context.Canceled) || key.signs != 0 {
		t.Errorf("err %v, %d signatures", err, key.signs)
	}
}

func TestSerialsAreRandom128(t *testing.T) {
	seen := map[string]bool{}
	long := 0
	for range 1000 {
		n, err := newSerial()
		if err != nil || n.Sign() <= 0 || n.BitLen() > 128 {
			t.Fatalf("%v, %v", n, err)
		}
		if n.BitLen() > 120 {
			long++
		}
		seen[n.String()] = true
	}
	if len(seen) != 1000 || long < 950 {
		t.Errorf("%d distinct of 1000, %d of them longer than 120 bits", len(seen), long)
	}
}

func TestNewIssuerRefuses(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	good := IssuerConfig{Authority: h.authority, Ledger: direct{h.store}, Linter: h.issuer.linter, Profiles: Profiles(0)}
	for name, edit := range map[string]func(*IssuerConfig){
		"no ledger":     func(c *IssuerConfig) { c.Ledger = nil },
		"no linter":     func(c *IssuerConfig) { c.Linter = nil },
		"no authority":  func(c *IssuerConfig) { c.Authority = nil },
		"no profile":    func(c *IssuerConfig) { c.Profiles = nil },
		"life too long": func(c *IssuerConfig) { c.Profiles = Profiles(7 * time.Hour) },
		"too short":     func(c *IssuerConfig) { c.Profiles = Profiles(time.Second) },
		"twice":         func(c *IssuerConfig) { c.Profiles = append(Profiles(0), Profiles(0)...) },
		"no name":       func(c *IssuerConfig) { c.Profiles = []Profile{{TTL: time.Hour}} },
		"backdate < 0":  func(c *IssuerConfig) { c.Profiles = []Profile{{Name: "a", TTL: time.Hour, Backdate: -1}} },
	} {
		c := good
		edit(&c)
		if _, err := NewIssuer(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := NewIssuer(good); err != nil {
		t.Error(err)
	}
}
