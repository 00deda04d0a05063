package admin

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

func rootPEM(t testing.TB) (*x509.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Another Root"}, IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return c, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func TestRootsAreTrustedAndRemoved(t *testing.T) {
	f := start(t, "rules: []")
	root, encoded := rootPEM(t)
	// As many bytes as are taken come through the socket.
	padded := append(bytes.Repeat([]byte("x\n"), (maxRootsPEM-2*len(encoded))/2), append(encoded, encoded...)...)
	answer, err := f.Authorities.TrustRoot(t.Context(), &meshcav1.TrustRootRequest{Pem: padded})
	if err != nil || len(answer.GetAdded()) != 1 || answer.GetAdded()[0] != ca.RootID(root) {
		t.Errorf("%v, %v", answer, err)
	}
	if _, err := f.Authorities.RemoveRoot(t.Context(), &meshcav1.RemoveRootRequest{Id: ca.RootID(root)}); err != nil {
		t.Error(err)
	}
	if got := strings.Join(f.operator.told, "; "); got != "trust 2 roots; remove "+ca.RootID(root) {
		t.Errorf("it was told %s", got)
	}
	f.operator.broken = errors.New("it is needed")
	if _, err := f.Authorities.RemoveRoot(t.Context(), &meshcav1.RemoveRootRequest{Id: "ab"}); err == nil || !strings.Contains(err.Error(), "it is needed") {
		t.Errorf("got %v", err)
	}
	lines := f.audited()
	for _, want := range []string{"ca root import uid ", "added=[" + ca.RootID(root) + "] subjects=[CN=Another Root", "outcome=done", "ca root remove uid ", "id=" + ca.RootID(root), "id=ab message=it is needed"} {
		if !strings.Contains(lines, want) {
			t.Errorf("the audit log lacks %q:\n%s", want, lines)
		}
	}
}

func TestWhatIsNoListOfRoots(t *testing.T) {
	f := start(t, "rules: []")
	root, one := rootPEM(t)
	for name, data := range map[string][]byte{
		"nothing":      nil,
		"DER":          {0x30, 0x82, 1, 1},
		"too large":    append(bytes.Repeat([]byte("\n"), maxRootsPEM), one...),
		"too many":     bytes.Repeat(one, maxNewRoots+1),
		"cut off":      append(bytes.Clone(one), one[:len(one)-20]...),
		"a key beside": append(bytes.Clone(one), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("secret")})...),
		"another type": pem.EncodeToMemory(&pem.Block{Type: "TRUSTED CERTIFICATE", Bytes: root.Raw}),
		"no ASN.1":     pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("hello")}),
	} {
		_, err := f.Authorities.TrustRoot(t.Context(), &meshcav1.TrustRootRequest{Pem: data})
		if refusal.Of(err) != refusal.RequestMalformed {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the key is in the error", name)
		}
	}
	if _, err := f.Authorities.RemoveRoot(t.Context(), &meshcav1.RemoveRootRequest{Id: strings.Repeat("a", 1000)}); refusal.Of(err) != refusal.RequestMalformed {
		t.Errorf("a long ID: %v", err)
	}
	if len(f.operator.told) > 0 {
		t.Errorf("it was told %q", f.operator.told)
	}
	if _, err := parseRoots(bytes.Repeat(one, maxNewRoots)); err != nil {
		t.Errorf("as many as are taken: %v", err)
	}
}

func FuzzParseRoots(f *testing.F) {
	_, one := rootPEM(f)
	f.Add(one)
	f.Add(append(bytes.Clone(one), "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"...))
	f.Fuzz(func(t *testing.T, data []byte) {
		roots, err := parseRoots(data)
		if err == nil && (len(roots) == 0 || len(roots) > maxNewRoots) || err != nil && roots != nil {
			t.Errorf("%d roots, %v", len(roots), err)
		}
	})
}

// A check tells of candidates and of an upstream that does not answer, and what it can when the ledger cannot be read.
func TestCheckAsksTheUpstream(t *testing.T) {
	f := start(t, "rules: []")
	root, _ := rootPEM(t)
	f.operator.view = rollout.View{
		UpstreamErr: errors.New("sealed"),
		Candidates:  []ca.UpstreamIssuer{{Ref: "r3", Name: "third", Root: root}, {Ref: "r4", Name: "broken", Root: root, Fault: errors.New("no key")}},
	}
	findings := func() (all string, failed int) {
		t.Helper()
		c, err := f.CA.Check(t.Context(), &meshcav1.CheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range c.GetFindings() {
			all += x.GetLevel().String() + " " + x.GetSubject() + ": " + x.GetDetail() + "\n"
			if x.GetLevel() == levelError {
				failed++
			}
		}
		return all, failed
	}
	all, failed := findings()
	if failed != 0 || !strings.Contains(all, "LEVEL_WARNING upstream: it could not be asked for its issuers: sealed") ||
		!strings.Contains(all, "LEVEL_OK candidates: ") || !strings.Contains(all, "r3 (third, root "+ca.RootID(root)[:12]+")\n") || strings.Contains(all, "broken") {
		t.Errorf("findings\n%s", all)
	}
	// One that is tainted is to be out when all is over.
	f.operator.view.Roots = []rollout.RootView{{Certificate: root, ID: ca.RootID(root), Tainted: time.Unix(1000, 0)}}
	if all, failed := findings(); failed != 1 || !strings.Contains(all, "is tainted since 1970-01-01T00:16:40Z, and in the trust bundle") {
		t.Errorf("findings\n%s", all)
	}
	// One that has certified a tainted key is trusted for all that the thief signs; where it goes itself, that is told alone.
	f.operator.view.Roots[0].Certified = errors.New("its key, which another root has too")
	if all, failed := findings(); failed != 1 || strings.Contains(all, "has certified") {
		t.Errorf("findings\n%s", all)
	}
	f.operator.view.Roots[0].Tainted = time.Time{}
	if all, failed := findings(); failed != 1 || !strings.Contains(all, "has certified a key that is tainted: its key, which another root has too") {
		t.Errorf("findings\n%s", all)
	}
	f.operator.view.Roots[0].Tainted, f.operator.view.Roots[0].Certified = time.Unix(1000, 0), nil
	under := &f.operator.view.Standing.Rollout
	for wants, r := range map[int]rotation.Rollout{
		0: {Step: rotation.StepRetired, Old: rotation.Party{ID: ca.RootID(root)}, Within: time.Minute},
		1: {Step: rotation.StepRetired, Old: rotation.Party{ID: ca.RootID(root)}}, // as a backup may bring it
	} {
		*under = r
		if all, failed := findings(); failed != wants {
			t.Errorf("while it is under way, within %s: findings\n%s", r.Within, all)
		}
	}
	f.operator.view.Roots, *under = nil, rotation.Rollout{}
	f.operator.broken = errors.New("disk full")
	if all, failed := findings(); failed != 1 || !strings.Contains(all, "LEVEL_ERROR ledger: disk full") || !strings.Contains(all, "it writes") {
		t.Errorf("findings\n%s", all)
	}
}

// A check tells of roots that a restored backup does not know, and of stolen intermediates that sign still.
func TestCheckTellsWhatIsPending(t *testing.T) {
	at := time.Unix(1000, 0)
	root := rollout.RootView{ID: "0123456789abcdef", Certificate: &x509.Certificate{}}
	v := rollout.View{Roots: []rollout.RootView{root}, Standing: rotation.Standing{Rollout: rotation.Rollout{
		Behind: []rotation.Behind{{Party: rotation.Party{ID: root.ID}, By: at, Kept: true}, {Party: rotation.Party{ID: "another"}, By: at}},
		Owed:   []rotation.Owed{{ID: root.ID, At: at}},
	}}}
	var says []string
	for _, f := range rootFindings(v) {
		says = append(says, f.GetLevel().String()+" "+f.GetSubject()+" "+f.GetDetail())
	}
	got := strings.Join(says, "\n")
	if len(says) != 2 || !strings.Contains(got, levelOK.String()+" root ") || !strings.Contains(got, "it is trusted until 1970-01-01T00:16:40Z") ||
		!strings.Contains(got, levelError.String()+" intermediate the one below the root 0123456789ab, whose key was said to be stolen at 1970-01-01T00:16:40Z") {
		t.Errorf("it says\n%s", got)
	}
}
