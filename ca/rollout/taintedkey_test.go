package rollout_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.step.sm/crypto/pemutil"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// twin brings another certificate of the first root's key to the upstream, as who prolongs a root makes one, and returns its
// ID. The process starts anew.
func (h *house) twin() (id string) {
	h.t.Helper()
	read, err := pemutil.Read(h.files().Key)
	h.must(err)
	key := read.(crypto.Signer)
	c := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "Prolonged"}, IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10000 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	h.must(err)
	root, err := x509.ParseCertificate(der)
	h.must(err)
	dir := filepath.Join(h.dir, "roots")
	h.must(os.MkdirAll(dir, 0o700))
	_, err = pemutil.Serialize(root, pemutil.ToFile(filepath.Join(dir, "twin.crt"), 0o644))
	h.must(err)
	_, err = pemutil.Serialize(key, pemutil.ToFile(filepath.Join(dir, "twin.key"), 0o600))
	h.must(err)
	h.stop()
	h.open()
	return ca.RootID(root)
}

// crossed brings an issuer to the upstream whose key is the first root's, and whose root is another one, which has certified
// that key: it returns the root. The process starts anew.
func (h *house) crossed() *x509.Certificate {
	h.t.Helper()
	read, err := pemutil.Read(h.files().Key)
	h.must(err)
	stolen := read.(crypto.Signer)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	h.must(err)
	var chain []*x509.Certificate
	template := x509.Certificate{IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10000 * time.Hour)}
	for n, pub := range []crypto.PublicKey{key.Public(), stolen.Public()} {
		c := template
		c.SerialNumber, c.Subject = big.NewInt(int64(n+1)), pkix.Name{CommonName: []string{"Another Root", "Cross-Signed"}[n]}
		parent := &c
		if n > 0 {
			parent = chain[0]
		}
		der, err := x509.CreateCertificate(rand.Reader, &c, parent, pub, key)
		h.must(err)
		parsed, err := x509.ParseCertificate(der)
		h.must(err)
		chain = append([]*x509.Certificate{parsed}, chain...)
	}
	dir := filepath.Join(h.dir, "roots")
	h.must(os.MkdirAll(dir, 0o700))
	var text []byte
	for _, c := range chain {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	h.must(os.WriteFile(filepath.Join(dir, "crossed.crt"), text, 0o600))
	_, err = pemutil.Serialize(stolen, pemutil.ToFile(filepath.Join(dir, "crossed.key"), 0o600))
	h.must(err)
	h.stop()
	h.open()
	return chain[1]
}

// A key that was tainted signs under no other root that has certified it either: such an issuer is not gone to by its name,
// its root is not published for it, and an intermediate that comes from it is not used.
func TestATaintedKeyThatAnotherRootHasCertified(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	root := h.crossed()
	id := ca.RootID(root)
	defer h.run()()
	at := rotation.Party{ID: id, Ref: id, Key: ca.KeyOf(root)}
	publish := func() error {
		_, err := h.roots.Publish(t.Context(), at)
		return err
	}
	renew := func() error {
		_, err := h.auth.Prepare(ca.Root{ID: id, Ref: id}).Renew(t.Context())
		return err
	}
	named := func(within time.Duration) error {
		_, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{By: "test", Issuer: id, Within: within, DryRun: true})
		return err
	}
	h.must(named(0))
	h.must(publish())
	h.must(renew())
	if err := named(bound); refusal.Of(err) != refusal.RootTainted {
		t.Errorf("without the root whose key it is: %v", err)
	}
	h.taint(h.issue("web"))
	h.at(rotation.StepOut)
	for what, do := range map[string]func() error{"named": func() error { return named(0) }, "published": publish, "an intermediate": renew} {
		if err := do(); refusal.Of(err) != refusal.RootTainted || !strings.Contains(err.Error(), "Cross-Signed") {
			t.Errorf("%s: %v", what, err)
		}
	}
	v, err := h.operator.View(t.Context())
	h.must(err)
	if i := slices.IndexFunc(v.Roots, func(r rollout.RootView) bool { return r.ID == id }); i < 0 || refusal.Of(v.Roots[i].Certified) != refusal.RootTainted {
		t.Errorf("its root, which is trusted, is shown as %+v", v.Roots)
	}
	h.must(h.operator.RemoveRoot(t.Context(), id))
	v, err = h.operator.View(t.Context())
	h.must(err)
	if i := slices.IndexFunc(v.Candidates, func(i ca.UpstreamIssuer) bool { return i.Ref == id }); i < 0 || refusal.Of(v.Candidates[i].Fault) != refusal.RootTainted {
		t.Errorf("shown as %+v", v.Candidates)
	}
}

// The key that is tainted is that of the issuer which signs, below another root that has certified it: the view names that root,
// and what to do, from then on and not only when the next intermediate is refused.
func TestTheSigningIssuersKeyIsTainted(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	first := h.auth.Assignment().Root.ID
	other := ca.RootID(h.crossed())
	defer h.run()()
	h.to(other)
	h.at(rotation.StepOut)
	certified := func() (id string, line error) {
		t.Helper()
		v, err := h.operator.View(t.Context())
		h.must(err)
		for _, r := range v.Roots {
			if r.Certified != nil {
				id, line = r.ID, r.Line.LastError
			}
		}
		return id, line
	}
	if id, _ := certified(); id != "" {
		t.Errorf("before the taint it is told of %s", id)
	}
	h.taint(first)
	if id, line := certified(); id != other || refusal.Of(line) != refusal.RootTainted || !strings.Contains(line.Error(), "certctl ca taint root "+other[:12]) {
		t.Errorf("told of %q: %v", id, line)
	}
}

// to begins a rollout to a root of the upstream.
func (h *house) to(id string) {
	h.t.Helper()
	_, err := h.operator.Rotate(h.t.Context(), rollout.RotateOptions{By: "test", Issuer: id})
	h.must(err)
}

// Tainted is the key: whichever of its roots is named, the other ones sign no more and leave, too.
func TestATaintMeansAllRootsOfTheKey(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		// at is how far the one has followed the other; empty: it is trusted, and signs for nobody.
		at rotation.Step
		// first: the first one is named, else the one that followed.
		first bool
	}{
		"the one that goes": {rotation.StepRetired, true}, "the one that stays": {rotation.StepRetired, false},
		"the one that has gone": {rotation.StepOut, true}, "the one that signs": {rotation.StepOut, false},
		"the one that is to come": {rotation.StepPublished, false}, "the one that signs still": {rotation.StepPublished, true},
		"the one that is trusted beside": {"", false}, "the one beside which another is trusted": {"", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			twin := h.twin()
			defer h.run()()
			first := h.issue("web")
			switch c.at {
			case "":
				issuers, err := h.upstream.Issuers(t.Context())
				h.must(err)
				_, err = h.operator.TrustRoots(t.Context(), []*x509.Certificate{issuers[1].Root})
				h.must(err)
			case rotation.StepPublished:
				h.agents.unconfirmed = []string{"agent that is away"}
				h.to(twin)
				h.at(c.at)
			default:
				h.to(twin)
				h.at(c.at)
				h.issue("web")
			}
			named := twin
			if c.first {
				named = first
			}
			third := h.taint(named)
			if s := third.Stays().ID; s == first || s == twin {
				t.Errorf("the key signs on: %+v", third)
			}
			h.agents.confirm()
			h.at(rotation.StepOut)
			h.eventually("the end of both", func() bool { return slices.Equal(h.trusted(), []string{third.Stays().ID}) })
			if by := h.issue("web"); by != third.Stays().ID {
				t.Errorf("%s signs", by)
			}
			h.forbidden(first)
			h.forbidden(twin)
		})
	}
}
