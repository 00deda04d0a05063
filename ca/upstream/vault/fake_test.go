package vault

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/ca"
)

var domain = spiffeid.RequireTrustDomainFromString("mesh.example")

// fake is a Vault at the wire: it knows one AppRole, tokens that it gave, and a PKI mount "pki". It holds callers to the
// protocol: a call without a token that it gave is answered with 403.
type fake struct {
	t      *testing.T
	server *httptest.Server
	clock  time.Duration // ahead of ours

	mu       sync.Mutex
	tokens   map[string]bool
	logins   int
	lease    int
	issuers  []*authority
	names    map[string]string // id: name
	default_ string
	calls    map[string]int // by method and path
	bodies   map[string][]byte
	headers  http.Header
	// answer, when set, replies in place of the fake; false: it does not want to.
	answer func(w http.ResponseWriter, r *http.Request) bool
	// warn, when set, makes the warnings of a signing.
	warn func(token string) []string
	// tamper, when set, changes what is signed.
	tamper func(*x509.Certificate)
}

// authority is an issuer: a certificate, its key, what is above it.
type authority struct {
	id      string
	cert    *x509.Certificate
	key     crypto.Signer
	chain   []*x509.Certificate // of the answer, its own included
	usage   string
	keyID   string
	revoked bool
}

func newFake(t *testing.T) *fake {
	f := &fake{t: t, tokens: map[string]bool{}, lease: 3600, names: map[string]string{}, calls: map[string]int{}, bodies: map[string][]byte{}}
	f.server = httptest.NewServer(f)
	t.Cleanup(f.server.Close)
	f.add("root-1", newRoot(t, "root 1", 24*365*time.Hour))
	return f
}

// add gives the mount another issuer.
func (f *fake) add(name string, a *authority) *authority {
	f.mu.Lock()
	defer f.mu.Unlock()
	a.id = fmt.Sprintf("%08d-0000-4000-8000-000000000000", len(f.issuers)+1)
	if a.usage == "" {
		a.usage = "read-only,issuing-certificates,crl-signing"
	}
	f.issuers = append(f.issuers, a)
	f.names[a.id] = name
	return a
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls[path]++
	f.bodies[path] = body
	f.headers = r.Header
	w.Header().Set("Date", time.Now().Add(f.clock).UTC().Format(http.TimeFormat))
	if f.answer != nil && f.answer(w, r) {
		return
	}
	switch path {
	case "sys/health":
		reply(w, 200, map[string]any{"initialized": true, "sealed": false})
		return
	case "auth/approle/login":
		f.logins++
		token := fmt.Sprintf("hvs.token-number-%d", f.logins)
		f.tokens[token] = true
		reply(w, 200, map[string]any{"auth": map[string]any{"client_token": token, "lease_duration": f.lease, "renewable": true}})
		return
	case "pki/issuers":
		f.list(w)
		return
	}
	if !f.tokens[r.Header.Get("X-Vault-Token")] {
		reply(w, 403, map[string]any{"errors": []string{"permission denied"}})
		return
	}
	switch parts := strings.Split(path, "/"); {
	case path == renewSelf:
		reply(w, 200, map[string]any{"auth": map[string]any{"client_token": r.Header.Get("X-Vault-Token"), "lease_duration": f.lease, "renewable": true}})
	case path == lookupSelf:
		reply(w, 200, map[string]any{"data": map[string]any{"ttl": f.lease, "renewable": false}})
	case path == revokeSelf:
		delete(f.tokens, r.Header.Get("X-Vault-Token"))
		w.WriteHeader(204)
	case path == "sys/internal/ui/mounts/pki":
		reply(w, 200, map[string]any{"data": map[string]any{"type": "pki"}})
	case path == "sys/capabilities-self":
		var asked struct{ Paths []string }
		_ = json.Unmarshal(body, &asked)
		all := map[string]any{}
		for _, p := range asked.Paths {
			all[p] = []string{"read", "update"}
		}
		reply(w, 200, map[string]any{"data": all})
	case len(parts) == 3 && parts[0] == "pki":
		f.read(w, parts[2])
	case len(parts) == 4 && parts[3] == "sign-intermediate":
		f.sign(w, parts[2], body)
	default:
		reply(w, 404, map[string]any{"errors": []string{"no handler for route " + path}})
	}
}

func (f *fake) list(w http.ResponseWriter) {
	keys, info := []string{}, map[string]any{}
	for _, a := range f.issuers {
		keys = append(keys, a.id)
		info[a.id] = map[string]any{"issuer_name": f.names[a.id], "is_default": a.id == f.default_}
	}
	reply(w, 200, map[string]any{"data": map[string]any{"keys": keys, "key_info": info}})
}

func (f *fake) issuer(ref string) *authority {
	i := slices.IndexFunc(f.issuers, func(a *authority) bool { return a.id == ref })
	if i < 0 {
		return nil
	}
	return f.issuers[i]
}

func (f *fake) read(w http.ResponseWriter, ref string) {
	a := f.issuer(ref)
	if a == nil {
		reply(w, 404, map[string]any{"errors": []string{}})
		return
	}
	reply(w, 200, map[string]any{"data": map[string]any{"issuer_id": a.id, "issuer_name": f.names[a.id], "key_id": a.keyID,
		"certificate": encode(a.cert), "ca_chain": encodeAll(a.chain), "usage": a.usage, "revoked": a.revoked}})
}

func (f *fake) sign(w http.ResponseWriter, ref string, body []byte) {
	a := f.issuer(ref)
	var o order
	if err := json.Unmarshal(body, &o); err != nil || a == nil {
		reply(w, 400, map[string]any{"errors": []string{"bad request"}})
		return
	}
	block, _ := pem.Decode([]byte(o.CSR))
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	ttl, _ := time.ParseDuration(o.TTL)
	back, _ := time.ParseDuration(o.NotBeforeDuration)
	name, _ := url.Parse(o.URISANs)
	if err != nil || o.UseCSRValues || !o.ExcludeCN {
		reply(w, 400, map[string]any{"errors": []string{"not what a caller should send"}})
		return
	}
	now := time.Now().Add(f.clock)
	template := &x509.Certificate{
		SerialNumber: newSerial(), Subject: pkix.Name{CommonName: o.CommonName}, NotBefore: now.Add(-back), NotAfter: now.Add(ttl),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: o.MaxPathLength, MaxPathLenZero: o.MaxPathLength == 0,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, URIs: []*url.URL{name}, PublicKey: csr.PublicKey,
	}
	if f.tamper != nil {
		f.tamper(template)
	}
	made := mustSign(f.t, template, a.cert, template.PublicKey, a.key)
	var warnings []string
	if f.warn != nil {
		warnings = f.warn(f.headers.Get("X-Vault-Token"))
	}
	reply(w, 200, map[string]any{"warnings": warnings, "data": map[string]any{"certificate": encode(made), "issuing_ca": encode(a.cert),
		"ca_chain": append([]string{encode(made)}, encodeAll(a.chain)...)}})
}

func reply(w http.ResponseWriter, code int, body any) {
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}

func encode(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

func encodeAll(certs []*x509.Certificate) []string {
	var all []string
	for _, c := range certs {
		all = append(all, encode(c))
	}
	return all
}

func newSerial() *big.Int {
	n, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	return n.Add(n, big.NewInt(1))
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func mustSign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newRoot(t testing.TB, name string, life time.Duration) *authority {
	t.Helper()
	a := newBelow(t, nil, name, life)
	a.chain = []*x509.Certificate{a.cert}
	return a
}

// newBelow makes an issuer below another one; nil: a root.
func newBelow(t testing.TB, parent *authority, name string, life time.Duration) *authority {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: newSerial(), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	a := &authority{key: key, keyID: "a-key"}
	if parent == nil {
		a.cert = mustSign(t, template, template, key.Public(), key)
		return a
	}
	a.cert = mustSign(t, template, parent.cert, key.Public(), parent.key)
	a.chain = append([]*x509.Certificate{a.cert}, parent.chain...)
	return a
}

// upstream makes an Upstream of the fake, by AppRole.
func (f *fake) upstream(change func(*Config), observe ...func(Call)) *Upstream {
	f.t.Helper()
	dir := f.t.TempDir()
	c := Config{Address: f.server.URL, Issuer: "root-1", Auth: AuthConfig{AppRole: &AppRoleConfig{
		RoleIDFile: write(f.t, filepath.Join(dir, "role-id"), "the-role-id\n"), SecretIDFile: write(f.t, filepath.Join(dir, "secret-id"), "the-secret-id\n")}}}
	if change != nil {
		change(&c)
	}
	o := Options{}
	for _, told := range observe {
		o.Observe = told
	}
	u, err := New(c, o)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = u.Close() })
	return u
}

func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fake) called(path string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[path]
}

func write(t testing.TB, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// newRequest is what the CA asks for.
func newRequest(t testing.TB) ca.IntermediateRequest {
	t.Helper()
	key := newKey(t)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "meshca intermediate"},
		URIs: []*url.URL{domain.ID().URL()}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return ca.IntermediateRequest{PublicKey: key.Public(), TrustDomain: domain, Life: 72 * time.Hour, CommonName: "meshca intermediate", CSR: csr}
}
