package softhsm_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	admin "github.com/meshca/meshca/api/admin/client"
	issuance "github.com/meshca/meshca/api/issuance/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/test/parts"
	"github.com/meshca/meshca/test/softhsm"
)

var domain = spiffeid.RequireTrustDomainFromString("mesh.test")

// limit is how long anything may take that is waited for.
const limit = 90 * time.Second

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// site is a CA, by its own binary with PKCS #11, with root and intermediate in a token.
type site struct {
	*testing.T
	dir, binary string
	store       *softhsm.Store
	token       *softhsm.Token
	issuer      *localissuer.Issuer
	process     *parts.Process
	api, ops    string
	extra       []string // of the environment
}

func newSite(t *testing.T) *site {
	t.Helper()
	softhsm.Need(t)
	dir, err := os.MkdirTemp("", "hsm") // t.TempDir can be too long for a socket
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &site{T: t, dir: dir, binary: filepath.Join(dir, "meshca-pkcs11")}
	parts.SeeSource()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", s.binary, "github.com/meshca/meshca/cmd/meshca")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("the build with PKCS #11: %v\n%s", err, out)
	}
	s.store, err = softhsm.NewStore(dir)
	must(t, err)
	s.token = s.store.NewToken(t, "meshca")
	s.issuer, err = localissuer.Open(dir, "https://tokens.test")
	must(t, err)
	jwks, err := s.issuer.JWKS()
	must(t, err)
	must(t, os.WriteFile(s.file("jwks.json"), jwks, 0o600))
	config := fmt.Sprintf(`
trustDomain: mesh.test
listen: 127.0.0.1:0
opsAddress: 127.0.0.1:0
adminSocket: %[1]s/admin.sock
stateDir: %[1]s/state
bundleFile: %[1]s/bundle.json
upstream: {disk: {keyFile: %[2]q}}
intermediate: {key: {in: pkcs11, uri: %[3]q}}
svid: {ttl: 8s}
audit: {file: %[1]s/audit.log}
clusters: [{name: one, mode: jwks, issuer: "https://tokens.test", jwks: {file: %[1]s/jwks.json}, liveness: none}]
`, dir, s.token.URI("meshca-root"), s.token.URI(""))
	must(t, os.WriteFile(s.file("ca.yaml"), []byte(config), 0o600))
	return s
}

func (s *site) file(name string) string { return filepath.Join(s.dir, name) }

func (s *site) env() []string {
	return append(append(os.Environ(), "SOFTHSM2_CONF="+s.store.Config), s.extra...)
}

// runs is a command of meshca, and what it says.
func (s *site) runs(args ...string) (string, error) {
	cmd := exec.CommandContext(s.Context(), s.binary, args...)
	cmd.Env = s.env()
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// lines collects what a process logs.
type lines struct {
	mu   sync.Mutex
	text string
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text += string(p)
	return len(p), nil
}

// serving finds where the CA serves.
func (l *lines) serving() (api, ops string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text) {
		var m struct{ Msg, Listen, Ops string }
		if json.Unmarshal([]byte(line), &m) == nil && m.Msg == "meshca serves" {
			return m.Listen, m.Ops
		}
	}
	return "", ""
}

func (s *site) start() {
	s.Helper()
	log := &lines{}
	var err error
	s.process, err = parts.Start(parts.Command{Path: s.binary, Args: []string{"serve", "--config", s.file("ca.yaml")}, Env: s.env(), Log: log})
	must(s, err)
	s.Cleanup(s.process.Kill)
	ctx, cancel := context.WithTimeout(s.Context(), limit)
	defer cancel()
	must(s, s.process.Await(ctx, func(context.Context) error {
		if s.api, s.ops = log.serving(); s.api == "" {
			return errors.New("it does not serve yet")
		}
		return nil
	}))
	s.until("ready", func() error { return s.ready("") })
}

// kill ends the CA as a power cut would.
func (s *site) kill() {
	s.Helper()
	must(s, s.process.Signal(syscall.SIGKILL))
	<-s.process.Done()
}

func (s *site) until(what string, try func() error) {
	s.Helper()
	err := try()
	for began := time.Now(); err != nil; err = try() {
		if time.Since(began) > limit {
			s.Fatalf("%s: %v; the CA logged last:\n%s", what, err, s.process.Output())
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// ready wants /readyz to say why it is not; empty: that it is.
func (s *site) ready(why string) error {
	resp, err := http.Get("http://" + s.ops + "/readyz")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || (resp.StatusCode == http.StatusOK) != (why == "") || !strings.Contains(string(body), why) {
		return fmt.Errorf("/readyz says %d %s (%v), want %q", resp.StatusCode, body, err, why)
	}
	return nil
}

func (s *site) bundle() *spiffebundle.Bundle {
	s.Helper()
	b, err := spiffebundle.Load(domain, s.file("bundle.json"))
	must(s, err)
	return b
}

// issue gets a certificate as an agent does, verifies it, and returns its intermediate and its root.
func (s *site) issue() (intermediate, root *x509.Certificate, err error) {
	bundle := s.bundle()
	c, err := issuance.New(issuance.Config{Address: s.api, TrustDomain: domain, Bundle: bundle})
	if err != nil {
		return nil, nil, err
	}
	defer c.Close()
	token, err := s.issuer.Token(localissuer.Subject{
		Namespace: "meshca", ServiceAccount: "meshca-agent", ServiceAccountUID: "sa", Pod: "agent-1", PodUID: "pod", Node: "node1", NodeUID: "uid-node1",
	}, "meshca-agent", time.Hour)
	if err != nil {
		return nil, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(s.Context(), 10*time.Second)
	defer cancel()
	answer, err := c.AttestAgent(ctx, &meshcav1.AttestAgentRequest{Cluster: "one", Token: token, Csr: csr})
	if err != nil {
		return nil, nil, err
	}
	id, verified, err := x509svid.ParseAndVerify(answer.GetSvid().GetChain(), bundle)
	if err != nil || id.String() != "spiffe://mesh.test/meshca/agent/one/node1" {
		return nil, nil, fmt.Errorf("issued to %s: %w", id, err)
	}
	return verified[0][1], verified[0][2], nil
}

// issued wants it to succeed.
func (s *site) issued() (intermediate, root *x509.Certificate) {
	s.Helper()
	s.until("an SVID", func() (err error) { intermediate, root, err = s.issue(); return err })
	return intermediate, root
}

// orders asks the CA's admin socket.
func (s *site) orders(ask func(context.Context, meshcav1.AuthorityServiceClient) error) error {
	ctx, cancel := context.WithTimeout(s.Context(), 30*time.Second)
	defer cancel()
	conn, err := admin.Open(ctx, s.file("admin.sock"))
	if err != nil {
		return err
	}
	defer conn.Close()
	return ask(ctx, conn.Authorities)
}

// notIn returns those of a that b has not.
func notIn(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(x string) bool { return slices.Contains(b, x) })
}

// holds wants so many objects in the token, soon.
func (s *site) holds(n int, why string) []string {
	s.Helper()
	var all []string
	s.until(why, func() error {
		if all = s.token.Objects(s); len(all) != n {
			return fmt.Errorf("the token has %d objects, want %d", len(all), n)
		}
		return nil
	})
	return all
}

// TestRootAndIntermediateInAToken goes through the life of a CA whose keys are all in a token.
func TestRootAndIntermediateInAToken(t *testing.T) {
	s := newSite(t)
	out, err := s.runs("config", "check", s.file("ca.yaml"))
	if err != nil || !strings.Contains(out, "fine") {
		t.Fatalf("config check: %v\n%s", err, out)
	}
	out, err = s.runs("root", "create", "--config", s.file("ca.yaml"))
	if err != nil || !strings.Contains(out, "key          pkcs11:token=meshca;object=meshca-root (it stays in the token") {
		t.Fatalf("root create: %v\n%s", err, out)
	}
	rootObjects := s.holds(2, "the root's key")
	must(t, os.Rename(s.file("state/root.crt"), s.file("state/kept.crt")))
	if out, err := s.runs("root", "create", "--config", s.file("ca.yaml")); err == nil || !strings.Contains(out, "A key is never overwritten") {
		t.Fatalf("root create, again: %v\n%s", err, out)
	}
	// A root whose key is in the token already is imported by its certificate.
	if out, err := s.runs("root", "import", "--config", s.file("ca.yaml"), "--cert", s.file("state/kept.crt")); err != nil || !strings.Contains(out, "imported root") {
		t.Fatalf("root import: %v\n%s", err, out)
	}
	out, err = s.runs("config", "check", "--live", s.file("ca.yaml"))
	if err != nil || !strings.Contains(out, "the token pkcs11:token=meshca takes the PIN") || !strings.Contains(out, "the root can sign") {
		t.Fatalf("config check --live: %v\n%s", err, out)
	}
	s.start()
	first, root := s.issued()
	firstObjects := notIn(s.holds(4, "the intermediate's key"), rootObjects)

	// The intermediate is replaced: its key is gone from the token, and nothing else is.
	must(t, s.orders(func(ctx context.Context, c meshcav1.AuthorityServiceClient) error {
		_, err := c.RotateIntermediate(ctx, &meshcav1.RotateIntermediateRequest{})
		return err
	}))
	second, _ := s.issued()
	now := s.holds(4, "the old key's end")
	if second.Equal(first) || len(notIn(firstObjects, now)) != 2 || len(notIn(rootObjects, now)) != 0 {
		t.Fatalf("the same intermediate: %v; of its objects %d are gone, of the root's %d", second.Equal(first), len(notIn(firstObjects, now)), len(notIn(rootObjects, now)))
	}

	// A power cut: the CA goes on with what it has.
	s.kill()
	s.start()
	if third, _ := s.issued(); !third.Equal(second) || len(notIn(now, s.holds(4, "the same keys"))) != 0 {
		t.Error("behind a restart another intermediate signs, or other keys are in the token")
	}

	s.losesItsToken()
	s.replacesItsRoot(root, rootObjects)
	s.holdsNoKeys()
}

// losesItsToken: signing is refused for as long as the token is away, /readyz says why, and it comes back by itself.
func (s *site) losesItsToken() {
	s.Helper()
	before, _ := s.issued()
	back := s.token.Away(s)
	s.until("a refusal", func() error {
		_, _, err := s.issue()
		if r, ok := refusal.From(err); !ok || r.Reason != refusal.SignerUnavailable || !r.Reason.Passing() {
			return fmt.Errorf("got %v", err)
		}
		return nil
	})
	s.until("not ready", func() error { return s.ready("PKCS #11 pkcs11:token=meshca by ") })
	back()
	s.until("ready again", func() error { return s.ready("") })
	if now, _ := s.issued(); !now.Equal(before) {
		s.Error("another intermediate signs, though its key was away only for a while")
	}
}

// replacesItsRoot by one that is made in the token, to the end; and starts again below it.
func (s *site) replacesItsRoot(old *x509.Certificate, oldObjects []string) {
	s.Helper()
	before := s.token.Objects(s)
	must(s, s.orders(func(ctx context.Context, c meshcav1.AuthorityServiceClient) error {
		_, err := c.RotateRoot(ctx, &meshcav1.RotateRootRequest{})
		return err
	}))
	s.until("the end of the rollout", func() error {
		return s.orders(func(ctx context.Context, c meshcav1.AuthorityServiceClient) error {
			a, err := c.GetAuthorities(ctx, &meshcav1.GetAuthoritiesRequest{})
			if err == nil && (len(a.GetRoots()) != 1 || a.GetRollout().GetStep() != "out") {
				err = fmt.Errorf("%d roots, step %s", len(a.GetRoots()), a.GetRollout().GetStep())
			}
			return err
		})
	})
	intermediate, root := s.issued()
	// The old root's key stays, for whoever wants to go back; the intermediate's below it is gone.
	after := s.holds(6, "two roots and an intermediate")
	if root.Equal(old) || s.bundle().HasX509Authority(old) || len(notIn(oldObjects, after)) != 0 || len(notIn(before, after)) != 2 {
		s.Errorf("the root is the same: %v; %d objects of the old root are gone, %d of all", root.Equal(old), len(notIn(oldObjects, after)), len(notIn(before, after)))
	}
	s.kill()
	s.start()
	if again, by := s.issued(); !again.Equal(intermediate) || !by.Equal(root) {
		s.Error("behind a restart another root or intermediate signs")
	}
	if len(notIn(after, s.token.Objects(s))) != 0 {
		s.Error("a restart took keys out of the token")
	}
}

// holdsNoKeys: nothing that the CA wrote has a private key in it, nor the PIN.
func (s *site) holdsNoKeys() {
	s.Helper()
	seen := 0
	must(s, filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || path == s.binary || strings.HasPrefix(path, s.store.Dir) {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		seen++
		ours := !strings.Contains(filepath.Base(path), "issuer") && filepath.Dir(path) != s.dir
		if ours && strings.Contains(string(data), "PRIVATE KEY") || strings.Contains(string(data), "4711-") {
			s.Errorf("%s holds a key or the PIN", path)
		}
		return nil
	}))
	if seen < 5 || strings.Contains(s.process.Output(), "4711-") {
		s.Errorf("%d files were looked at, or the log holds the PIN", seen)
	}
}
