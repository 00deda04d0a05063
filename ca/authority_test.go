package ca

import (
	"context"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
)

func TestAuthorityRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, 6*time.Hour, 72*time.Hour)
		first := h.line.current.Load()
		time.Sleep(36 * time.Hour)
		term, err := h.line.Renew(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		second := h.line.current.Load()
		if samePublicKey(first.key.Public(), second.key.Public()) {
			t.Error("the new intermediate has the old key")
		}
		if term.Life != 72*time.Hour || !term.Received.Equal(time.Now()) {
			t.Errorf("term %+v", term)
		}
		if due := h.line.Due(term); !due.Equal(time.Now().Add(36 * time.Hour)) {
			t.Errorf("due at %s", due)
		}
		// The issuer uses it at once.
		svid, err := h.issuer.Issue(t.Context(), workloadRequest(t))
		if err != nil || !svid.Chain[1].Equal(second.Certificate()) {
			t.Errorf("issued under %v, %v", svid.Chain[1].SerialNumber, err)
		}
		// Both keys stay the CA's own.
		for _, s := range []*Signer{first, second} {
			if !h.authority.IsOwnKey(s.key.Public()) {
				t.Error("forgot a key of its own")
			}
		}
		if h.authority.IsOwnKey(newKey(t).Public()) || h.authority.IsOwnKey(nil) {
			t.Error("takes a stranger's key for its own")
		}
	})
}

func TestFailedRenewalKeepsTheOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, 6*time.Hour, 72*time.Hour)
		before := h.line.current.Load()
		h.upstream.fail = errors.New("vault is sealed")
		_, err := h.line.Renew(t.Context())
		wantReason(t, err, refusal.UpstreamUnavailable)
		if h.line.current.Load() != before {
			t.Error("the old one is gone")
		}
		if err := h.authority.Ready(); err != nil {
			t.Errorf("not ready while the old one lasts: %v", err)
		}
		st := h.line.Status()
		if st.LastError == nil || !strings.Contains(st.LastError.Error(), "sealed") || len(st.Chain) != 1 {
			t.Errorf("status %+v", st)
		}
		time.Sleep(72 * time.Hour)
		err = h.authority.Ready()
		wantReason(t, err, refusal.IssuerEnding)
		if !strings.Contains(err.Error(), "sealed") {
			t.Errorf("not ready, and does not say why: %v", err)
		}
		if d := err.(interface{ Unwrap() []error }).Unwrap()[0].(*refusal.Error).Detail; strings.Contains(d, "sealed") {
			t.Errorf("the upstream's words travel to callers: %q", d)
		}
	})
}

func TestShorterIntermediateIsTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, 6*time.Hour, 72*time.Hour)
		h.upstream.life = 4 * time.Hour
		term, err := h.line.Renew(t.Context())
		if err != nil || term.Life != 4*time.Hour {
			t.Fatalf("%+v, %v", term, err)
		}
		if due := h.line.Due(term); !due.Equal(time.Now().Add(2 * time.Hour)) {
			t.Errorf("due in %s", time.Until(due))
		}
		svid, err := h.issuer.Issue(t.Context(), workloadRequest(t))
		if err != nil || svid.Life != 4*time.Hour {
			t.Errorf("life %s, %v", svid.Life, err)
		}
		// One under which nothing could be issued is no help.
		h.upstream.life = 15 * time.Minute
		if _, err := h.line.Renew(t.Context()); err == nil || !strings.Contains(err.Error(), "too soon") {
			t.Errorf("took an intermediate of 15 minutes: %v", err)
		}
	})
}

func TestAuthorityNeedsALongerLifeThanItsLeaves(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	for _, life := range []time.Duration{time.Hour, 5 * time.Hour, 6 * time.Hour} {
		c := h.authority.c
		c.Life, c.LeafTTL = life, 6*time.Hour
		if _, err := NewAuthority(c); err == nil {
			t.Errorf("an intermediate of %s for SVIDs of 6 h", life)
		}
	}
}

func TestWrongIntermediatesAreRefused(t *testing.T) {
	stranger := newRoot(t, "stranger", time.Hour*1000)
	strangersKey := newKey(t)
	for name, c := range map[string]struct {
		edit  func(*x509.Certificate)
		after func(h *house, chain []*x509.Certificate) []*x509.Certificate
		says  string
	}{
		"another key": {edit: func(c *x509.Certificate) { c.PublicKey = strangersKey.Public() }, says: "another key"},
		"no CA": {edit: func(c *x509.Certificate) {
			c.IsCA = false
			c.MaxPathLenZero = false
			c.KeyUsage = x509.KeyUsageDigitalSignature
		}, says: "no CA"},
		"no path length":  {edit: func(c *x509.Certificate) { c.MaxPathLen = -1 }, says: "path length"},
		"path length 1":   {edit: func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false }, says: "path length"},
		"no keyCertSign":  {edit: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }, says: "keyCertSign"},
		"other domain":    {edit: func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "other.org"}} }, says: "URI SAN"},
		"a path":          {edit: func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/ca"}} }, says: "URI SAN"},
		"no URI":          {edit: func(c *x509.Certificate) { c.URIs = nil }, says: "URI SAN"},
		"two URIs":        {edit: func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }, says: "URI SAN"},
		"a DNS name":      {edit: func(c *x509.Certificate) { c.DNSNames = []string{"example.org"} }, says: "beside its URI"},
		"an address":      {edit: func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv6loopback} }, says: "beside its URI"},
		"a mailbox":       {edit: func(c *x509.Certificate) { c.EmailAddresses = []string{"ca@example.org"} }, says: "beside its URI"},
		"other permitted": {edit: constrained([]string{"other.example"}, nil), says: "leave out spiffe://example.org"},
		"only below":      {edit: constrained([]string{".example.org"}, nil), says: "leave out spiffe://example.org"},
		"excluded":        {edit: constrained(nil, []string{"example.org"}), says: "leave out spiffe://example.org"},
		"all excluded":    {edit: constrained(nil, []string{".org"}), says: "leave out spiffe://example.org"},
		"no subject":      {edit: func(c *x509.Certificate) { c.Subject = pkix.Name{} }, says: "subject"},
		"lives too long":  {edit: func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Hour) }, says: "later than was asked"},
		"has ended":       {edit: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }, says: "root of the trust bundle"},
		"not yet valid":   {edit: func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }, says: "root of the trust bundle"},
		"code signing":    {edit: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }, says: "extended key usages"},
		"nothing":         {after: func(*house, []*x509.Certificate) []*x509.Certificate { return nil }, says: "0 certificates"},
		"with its root":   {after: func(h *house, c []*x509.Certificate) []*x509.Certificate { return append(c, h.upstream.root) }, says: "root, which must not travel"},
		"with a stranger": {after: func(_ *house, c []*x509.Certificate) []*x509.Certificate { return append(c, stranger.root) }, says: "does not belong"},
		"an endless chain": {after: func(_ *house, c []*x509.Certificate) []*x509.Certificate {
			return append(c, c[0], c[0], c[0], c[0], c[0])
		}, says: "6 certificates"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t, time.Hour, 72*time.Hour)
			before := h.line.current.Load()
			h.upstream.edit = c.edit
			if c.after != nil {
				h.upstream.after = func(chain []*x509.Certificate) []*x509.Certificate { return c.after(h, chain) }
			}
			_, err := h.line.Renew(t.Context())
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want a word on %q", err, c.says)
			}
			if h.line.current.Load() != before {
				t.Error("it is in use")
			}
		})
	}
}

func constrained(permitted, excluded []string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.PermittedDNSDomainsCritical, c.PermittedURIDomains, c.ExcludedURIDomains = true, permitted, excluded
	}
}

// An intermediate may be constrained to its own trust domain (SPIFFE X509-SVID §4.2).
func TestConstrainedIntermediateIsTaken(t *testing.T) {
	for _, edit := range []func(*x509.Certificate){
		constrained([]string{"other.example", "example.org"}, nil), constrained([]string{".org"}, []string{"other.example", ".example.org"}),
	} {
		h := newHouse(t, time.Hour, 72*time.Hour)
		h.upstream.edit = edit
		if _, err := h.line.Renew(t.Context()); err != nil {
			t.Error(err)
		}
		svid, err := h.issuer.Issue(t.Context(), workloadRequest(t))
		if err != nil {
			t.Fatal(err)
		}
		roots, between := x509.NewCertPool(), x509.NewCertPool()
		roots.AddCert(h.upstream.root)
		between.AddCert(svid.Chain[1])
		if _, err := svid.Chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between}); err != nil {
			t.Error(err)
		}
	}
}

func TestIntermediateOfAnUntrustedRoot(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	other := newRoot(t, "root", 1000*time.Hour) // of the same name
	h.authority.c.Upstream = other
	next := h.authority.Prepare(other.named())
	if _, err := next.Renew(t.Context()); err == nil || !strings.Contains(err.Error(), "not in the trust bundle") {
		t.Errorf("an intermediate of an untrusted root: %v", err)
	}
	// One that is trusted, but not the one that was asked for, is refused as well.
	if _, err := h.authority.Prepare(Root{ID: RootID(h.upstream.root), Ref: other.named().Ref}).Renew(t.Context()); err == nil || !strings.Contains(err.Error(), "root of the trust bundle") {
		t.Errorf("an intermediate of another root: %v", err)
	}
	// As soon as the root is trusted, it is taken.
	if err := h.trust.AddRoots(t.Context(), other.root); err != nil {
		t.Fatal(err)
	}
	if _, err := next.Renew(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestChainThroughTheUpstreamsIntermediate has the upstream sign with an intermediate of its own, which ends sooner.
func TestChainThroughTheUpstreamsIntermediate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newRoot(t, "root", 1000*time.Hour)
		middleKey := newKey(t)
		middle := sign(t, &x509.Certificate{
			SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "middle"}, SubjectKeyId: []byte{1, 2, 3},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * time.Hour),
			KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: 1,
		}, root.root, middleKey.Public(), root.key)
		upstream := &rootUpstream{root: middle, key: middleKey, after: func(c []*x509.Certificate) []*x509.Certificate { return append(c, middle) }}

		trust, err := NewTrust(t.Context(), TrustConfig{TrustDomain: testDomain, Store: &memory{}, Roots: []*x509.Certificate{root.root}})
		if err != nil {
			t.Fatal(err)
		}
		a, err := NewAuthority(AuthorityConfig{TrustDomain: testDomain, Upstream: upstream, Trust: trust})
		if err != nil {
			t.Fatal(err)
		}
		line := a.Prepare(Root{ID: RootID(root.root), Ref: upstream.named().Ref})
		term, err := line.Renew(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if term.Life != 10*time.Hour || len(line.Status().Chain) != 2 {
			t.Errorf("life %s of a chain whose middle ends in 10 h; %d certificates", term.Life, len(line.Status().Chain))
		}
		upstream.after = func(c []*x509.Certificate) []*x509.Certificate { return c }
		if _, err := line.Renew(t.Context()); err == nil {
			t.Error("a chain with a gap was taken")
		}
	})
}

func TestRootsAreOwnKeys(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	other := newRoot(t, "another", time.Hour)
	if !h.authority.IsOwnKey(h.upstream.root.PublicKey) || h.authority.IsOwnKey(other.root.PublicKey) {
		t.Error("the root's key is not the CA's own, or a stranger's is")
	}
	if err := h.trust.AddRoots(t.Context(), other.root); err != nil {
		t.Fatal(err)
	}
	if !h.authority.IsOwnKey(other.root.PublicKey) {
		t.Error("the key of a root that was added is not the CA's own")
	}
}

// A key in use is the CA's own however many others come and go beside it: the serving SVID takes a new one at each renewal,
// an operator may renew intermediates at will.
func TestKeysInUseAreNeverForgotten(t *testing.T) {
	h := newHouse(t, MinTTL, 72*time.Hour)
	s, err := NewServing(h.issuer)
	if err != nil {
		t.Fatal(err)
	}
	renew := func(subject rotation.Subject) {
		t.Helper()
		if _, err := subject.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(what string, pub crypto.PublicKey) {
		t.Helper()
		r := workloadRequest(t)
		r.PublicKey = pub
		if _, err := h.issuer.Issue(t.Context(), r); refusal.Of(err) != refusal.CSRKeyIsCA {
			t.Errorf("%s: %v", what, err)
		}
	}
	for range 2 * maxFormerKeys {
		renew(s)
	}
	refused("the intermediate's", h.line.current.Load().key.Public())
	for range 2 * maxFormerKeys {
		renew(h.line)
	}
	refused("the serving SVID's", s.current.Load().svid.Chain[0].PublicKey)
	refused("the root's", h.upstream.root.PublicKey)

	// What could not be put into use does not push out what is.
	h.authority.c.Keys = keepsNothing{h.authority.c.Keys}
	inUse := h.line.current.Load().key.Public()
	for range 2 * maxFormerKeys {
		if _, err := h.line.Renew(t.Context()); err == nil {
			t.Fatal("an intermediate that is not kept came into use")
		}
	}
	refused("the intermediate's, when its successors failed", inUse)
}

type keepsNothing struct{ Keyring }

func (keepsNothing) Keep(string, Kept) error { return errors.New("no space left on device") }

// What was in use stays the CA's own for a while, the last of them longest.
func TestFormerKeysAreBounded(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	former := h.line.current.Load().key.Public()
	if _, err := h.line.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range maxFormerKeys {
		h.authority.adopt(t, newKey(t).Public())
	}
	if !h.authority.IsOwnKey(former) {
		t.Error("a former key is forgotten before the bound")
	}
	for range 2 * maxFormerKeys {
		h.authority.adopt(t, newKey(t).Public())
	}
	if n := len(*h.authority.ownSet.Load()); n != maxFormerKeys+2 || h.authority.IsOwnKey(former) {
		t.Errorf("%d keys are remembered", n)
	}
	// A line that is over uses nothing any more.
	last := h.line.current.Load().key.Public()
	next := newRoot(t, "next", 1000*time.Hour)
	h.authority.Assign(Assignment{Root: next.named()})
	if !h.authority.IsOwnKey(last) {
		t.Error("the key of a line that is just over is forgotten")
	}
	for range maxFormerKeys {
		h.authority.adopt(t, newKey(t).Public())
	}
	if n := len(*h.authority.ownSet.Load()); n != maxFormerKeys+1 || h.authority.IsOwnKey(last) {
		t.Errorf("%d keys are remembered when a line is over", n)
	}
}

func TestUpstreamThatHangsEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, time.Hour, 72*time.Hour)
		h.authority.c.Upstream = hanging{h.upstream}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := h.line.Renew(ctx)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		wantReason(t, err, refusal.UpstreamUnavailable)
	})
}

type hanging struct{ Upstream }

func (hanging) SignIntermediate(ctx context.Context, _ string, _ IntermediateRequest) ([]*x509.Certificate, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// An assignment is in force when nothing is in hand any more that was begun under the one before: until then the old key is
// there, and who asked for the change does not go on.
func TestAnAssignmentWaitsForWhatWasBegun(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	next := newRoot(t, "next", 1000*time.Hour)
	h.authority.begin()
	assigned := make(chan struct{})
	go func() { defer close(assigned); h.authority.Assign(Assignment{Root: next.named()}) }()
	for h.authority.Assignment().Root != next.named() {
		time.Sleep(time.Millisecond)
	}
	select {
	case <-assigned:
		t.Error("it did not wait")
	case <-time.After(100 * time.Millisecond): // a slow machine does not fail here
		if h.line.current.Load() == nil {
			t.Error("the line that signs was dropped")
		}
	}
	h.authority.end()
	<-assigned
	if h.line.current.Load() != nil || h.line.key != nil {
		t.Error("the old key is still there")
	}
}

// Another issuer of the same root: what is in use stays, and what comes next comes from there.
func TestRepoint(t *testing.T) {
	h := newHouse(t, time.Hour, 72*time.Hour)
	h.authority.Repoint(Root{ID: "another", Ref: "x"})
	if h.line.Root() != h.upstream.named() || h.authority.Assignment().Root != h.upstream.named() {
		t.Errorf("another root's: %+v", h.authority.Assignment())
	}
	before := h.line.current.Load()
	moved := Root{ID: h.upstream.named().ID, Ref: "elsewhere"}
	h.authority.Repoint(moved)
	if lines, _ := h.authority.Lines(); len(lines) != 1 || lines[0] != h.line || h.line.Root() != moved || h.authority.Assignment() != (Assignment{Root: moved}) {
		t.Errorf("%+v, %+v", h.line.Root(), h.authority.Assignment())
	}
	if _, err := h.line.Renew(t.Context()); err == nil || !strings.Contains(err.Error(), "no such issuer") {
		t.Errorf("the issuer of before was asked: %v", err)
	}
	if h.line.current.Load() != before || h.authority.Ready() != nil {
		t.Error("what was in use is not")
	}
	// An assignment of the same root does the same, as at a restart.
	h.authority.Assign(Assignment{Root: h.upstream.named()})
	if _, err := h.line.Renew(t.Context()); err != nil || h.line.current.Load() == before {
		t.Error(err)
	}
}
