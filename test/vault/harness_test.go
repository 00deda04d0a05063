package vault_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/store/bolt"
	upstream "github.com/meshca/meshca/ca/upstream/vault"
	"github.com/meshca/meshca/test/parts"
	"github.com/meshca/meshca/test/vault"
)

var domain = spiffeid.RequireTrustDomainFromString("mesh.example")

// shared is a Vault in memory for all tests that only add mounts of their own to it. TestMain owns it.
var shared *vault.Server

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "meshca-vault-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	shared, err = vault.LaunchDev(ctx, dir)
	cancel()
	code := 1
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		code = m.Run()
		shared.Close()
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

var worlds atomic.Int64

// world is a PKI mount of its own with a root "root-1", and an AppRole with the policy of deploy/vault.
type world struct {
	*vault.Server
	t *testing.T
	// mount, approle and policy are names of this world's alone.
	mount, approle, policy string
	dir                    string

	mu    sync.Mutex
	calls []upstream.Call
}

func newWorld(t *testing.T, s *vault.Server) *world {
	t.Helper()
	n := worlds.Add(1)
	w := &world{Server: s, t: t, mount: fmt.Sprintf("pki-%d", n), approle: fmt.Sprintf("approle-%d", n), policy: fmt.Sprintf("meshca-%d", n), dir: t.TempDir()}
	must(t, s.Client.Sys().MountWithContext(t.Context(), w.mount, &api.MountInput{Type: "pki", Config: api.MountConfigInput{MaxLeaseTTL: "87600h"}}))
	w.write(w.mount+"/root/generate/internal", map[string]any{"common_name": "mesh.example root", "issuer_name": "root-1", "exclude_cn_from_sans": true,
		"key_type": "ec", "key_bits": 256, "ttl": "87600h", "max_path_length": 1, "not_before_duration": "1h"})
	w.setPolicy(w.documented())
	must(t, s.Client.Sys().EnableAuthWithOptionsWithContext(t.Context(), w.approle, &api.EnableAuthOptions{Type: "approle"}))
	w.write("auth/"+w.approle+"/role/meshca", map[string]any{"token_policies": w.policy, "token_no_default_policy": true, "token_period": "1h"})
	id := w.read("auth/" + w.approle + "/role/meshca/role-id")
	secret := w.write("auth/"+w.approle+"/role/meshca/secret-id", nil)
	w.file("role-id", id["role_id"].(string))
	w.file("secret-id", secret["secret_id"].(string))
	return w
}

// documented is the policy of deploy/vault, for this world's mount.
func (w *world) documented() string {
	w.t.Helper()
	root, err := parts.Root()
	must(w.t, err)
	text, err := os.ReadFile(filepath.Join(root, "deploy", "vault", "meshca.hcl"))
	must(w.t, err)
	return strings.ReplaceAll(string(text), "pki_mesh", w.mount)
}

func (w *world) setPolicy(text string) {
	w.t.Helper()
	must(w.t, w.Client.Sys().PutPolicyWithContext(w.t.Context(), w.policy, text))
}

func (w *world) write(path string, data map[string]any) map[string]any {
	w.t.Helper()
	answer, err := w.Client.Logical().WriteWithContext(w.t.Context(), path, data)
	must(w.t, err)
	if answer == nil {
		return nil
	}
	return answer.Data
}

func (w *world) read(path string) map[string]any {
	w.t.Helper()
	answer, err := w.Client.Logical().ReadWithContext(w.t.Context(), path)
	must(w.t, err)
	if answer == nil {
		w.t.Fatalf("%s: nothing there", path)
	}
	return answer.Data
}

func (w *world) file(name, text string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	must(w.t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func (w *world) config() upstream.Config {
	return upstream.Config{Address: w.Address, CAFile: w.CAFile, Mount: w.mount, Issuer: "root-1",
		Auth: upstream.AuthConfig{AppRole: &upstream.AppRoleConfig{Path: w.approle,
			RoleIDFile: filepath.Join(w.dir, "role-id"), SecretIDFile: filepath.Join(w.dir, "secret-id")}}}
}

// open makes an Upstream, which is closed with the test.
func (w *world) open(change func(*upstream.Config)) *upstream.Upstream {
	w.t.Helper()
	c := w.config()
	if change != nil {
		change(&c)
	}
	u, err := upstream.New(c, upstream.Options{Observe: w.observe})
	must(w.t, err)
	w.t.Cleanup(func() { _ = u.Close() })
	return u
}

func (w *world) observe(c upstream.Call) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls = append(w.calls, c)
}

// run has an Upstream keep its login until the test ends.
func (w *world) run(u *upstream.Upstream) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = u.Run(ctx) }()
	w.t.Cleanup(func() { cancel(); <-ended })
}

// made counts the calls of a kind that went well.
func (w *world) made(op upstream.Operation) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, c := range w.calls {
		if c.Operation == op && c.Err == nil {
			n++
		}
	}
	return n
}

// named is the issuer that the configuration names.
func named(t *testing.T, u *upstream.Upstream) ca.UpstreamIssuer {
	t.Helper()
	issuers, err := u.Issuers(t.Context())
	must(t, err)
	if !issuers[0].Named || issuers[0].Fault != nil {
		t.Fatalf("the named issuer: %+v", issuers[0])
	}
	return issuers[0]
}

// line is the CA's power to sign below an issuer: what checks all that Vault answers.
func line(t *testing.T, u ca.Upstream, issuer ca.UpstreamIssuer) *ca.Line {
	t.Helper()
	store, err := bolt.Open(filepath.Join(t.TempDir(), "meshca.db"))
	must(t, err)
	t.Cleanup(func() { _ = store.Close() })
	trust, err := ca.NewTrust(t.Context(), ca.TrustConfig{TrustDomain: domain, Store: store, Roots: []*x509.Certificate{issuer.Root}})
	must(t, err)
	authority, err := ca.NewAuthority(ca.AuthorityConfig{TrustDomain: domain, Upstream: u, Trust: trust})
	must(t, err)
	return authority.Prepare(ca.Root{ID: ca.RootID(issuer.Root), Ref: issuer.Ref})
}

// renew has a line renewed, and returns the chain that it got.
func renew(t *testing.T, l *ca.Line) []*x509.Certificate {
	t.Helper()
	_, err := l.Renew(t.Context())
	must(t, err)
	return l.Status().Chain
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, limit time.Duration, check func() error) {
	t.Helper()
	end := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %v still: %v", limit, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
