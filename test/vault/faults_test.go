package vault_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"

	upstream "github.com/meshca/meshca/ca/upstream/vault"
	"github.com/meshca/meshca/test/pki"
	"github.com/meshca/meshca/test/vault"
)

func TestTokenRevokedMidway(t *testing.T) {
	w := newWorld(t, shared)
	u := w.open(nil)
	l := line(t, u, named(t, u))
	renew(t, l)
	w.revokeLogins()
	renew(t, l)
	if w.made(upstream.OpLogin) != 2 {
		t.Errorf("%d logins, want the first and a fresh one", w.made(upstream.OpLogin))
	}
	// The watcher's token is gone, too: it waits out the dead lease, and the poll brings the login back.
	w.run(u)
	eventually(t, 10*time.Second, func() error {
		if st := u.Status(); st.SeenAt.IsZero() || !st.LoggedIn {
			return errors.New("not running yet")
		}
		return nil
	})
	w.revokeLogins()
	if _, err := u.Issuers(t.Context()); err != nil || !u.Status().LoggedIn || u.Status().LastError != nil {
		t.Errorf("after a revocation under way: %v, %+v", err, u.Status())
	}
}

// TestPermissionTakenAway: the error and the check name what lacks, and the text that they print is what helps.
func TestPermissionTakenAway(t *testing.T) {
	w := newWorld(t, shared)
	u := w.open(nil)
	issuer := named(t, u)
	l := line(t, u, issuer)
	renew(t, l)
	w.setPolicy(strings.Replace(w.documented(), `"update"`, `"deny"`, 1)) // the first is that of sign-intermediate
	_, err := l.Renew(t.Context())
	path := w.mount + "/issuer/" + issuer.Ref + "/sign-intermediate"
	if upstream.KindOf(err) != upstream.KindDenied || !strings.Contains(err.Error(), fmt.Sprintf("path %q {\n  capabilities = [\"update\"]\n}", path)) {
		t.Fatalf("got %v, want the capability that lacks", err)
	}
	if l.Ready() != nil {
		t.Errorf("the intermediate in use is gone: %v", l.Ready())
	}
	found := u.Check(t.Context())
	if len(found) != 1 || !strings.Contains(found[0].Why, path) {
		t.Fatalf("check: %+v", found)
	}
	_, text, _ := strings.Cut(found[0].Do, "\n")
	w.setPolicy(strings.Replace(w.documented(), "path \""+w.mount+"/issuer/+/sign-intermediate\" {\n  capabilities = [\"update\"]\n}", text, 1))
	renew(t, l)
	if found := u.Check(t.Context()); len(found) != 0 {
		t.Errorf("check, with the text added: %+v", found)
	}
}

// TestSealedAndKilled: on raft storage; what was given before is good again once Vault is back.
func TestSealedAndKilled(t *testing.T) {
	server := vault.Raft(t)
	w := newWorld(t, server)
	u := w.open(func(c *upstream.Config) { c.Timeout.Duration = 5 * time.Second })
	w.run(u)
	l := line(t, u, named(t, u))
	renew(t, l)
	fails := func(kind upstream.Kind, finding string) {
		t.Helper()
		if _, err := l.Renew(t.Context()); upstream.KindOf(err) != kind {
			t.Errorf("got %v, want %s", err, kind)
		}
		if l.Ready() != nil {
			t.Errorf("the intermediate in use is gone: %v", l.Ready())
		}
		if found := u.Check(t.Context()); len(found) != 1 || !strings.Contains(found[0].Why+found[0].Do, finding) {
			t.Errorf("check: %+v, want one thing that says %q", found, finding)
		}
	}
	works := func() {
		t.Helper()
		eventually(t, 20*time.Second, func() error { _, err := l.Renew(t.Context()); return err })
		if st := u.Status(); st.Sealed || !st.LoggedIn {
			t.Errorf("status: %+v", st)
		}
	}

	must(t, server.Seal(t.Context()))
	fails(upstream.KindSealed, "vault operator unseal")
	if !u.Status().Sealed {
		t.Error("the status does not say that it is sealed")
	}
	must(t, server.Unseal(t.Context()))
	works()

	server.Kill()
	fails(upstream.KindUnreachable, "can be reached from here")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must(t, server.StartAgain(ctx))
	fails(upstream.KindSealed, "vault operator unseal")
	must(t, server.Unseal(ctx))
	works()
}

// TestSlow: each answer takes a minute. A call ends in time, its signing is not sent again, and all is well after.
func TestSlow(t *testing.T) {
	w := newWorld(t, shared)
	proxy := toxiproxy.NewProxy(toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop()), "vault", "127.0.0.1:0", w.Listen())
	must(t, proxy.Start())
	t.Cleanup(proxy.Stop)
	u := w.open(func(c *upstream.Config) { c.Address, c.Timeout.Duration = "https://"+proxy.Listen, 2*time.Second })
	l := line(t, u, named(t, u))
	renew(t, l)
	_, err := proxy.Toxics.AddToxicJson(strings.NewReader(`{"name": "slow", "type": "latency", "stream": "downstream", "attributes": {"latency": 60000}}`))
	must(t, err)
	before := w.certificates()
	began := time.Now()
	_, err = l.Renew(t.Context())
	if took := time.Since(began); upstream.KindOf(err) != upstream.KindTimeout || took > 10*time.Second {
		t.Errorf("got %v after %s, want an end after 2s", err, took)
	}
	if l.Ready() != nil {
		t.Errorf("the intermediate in use is gone: %v", l.Ready())
	}
	if made := w.certificates() - before; made > 1 {
		t.Errorf("%d certificates were made for one call", made)
	}
	if found := u.Check(t.Context()); len(found) != 1 || !strings.Contains(found[0].Why, "in time") {
		t.Errorf("check: %+v", found)
	}
	must(t, proxy.Toxics.RemoveToxic(t.Context(), "slow"))
	eventually(t, 20*time.Second, func() error { _, err := l.Renew(t.Context()); return err })
}

// certificates counts what the mount has signed.
func (w *world) certificates() int {
	w.t.Helper()
	answer, err := w.Client.Logical().ListWithContext(w.t.Context(), w.mount+"/certs")
	must(w.t, err)
	return len(answer.Data["keys"].([]any))
}

// TestWrongCertificateReturned: something at the wire has the real root sign another thing than was asked for.
func TestWrongCertificateReturned(t *testing.T) {
	w := newWorld(t, shared)
	w.write(w.mount+"/roles/leaf", map[string]any{"allow_any_name": true, "enforce_hostnames": false, "key_type": "any", "allowed_uri_sans": "*",
		"issuer_ref": "root-1", "require_cn": false, "not_before_duration": "5m"})
	foreign, err := pki.NewRoot("mesh.example")
	must(t, err)
	for name, c := range map[string]struct {
		ask    func(path *string, body map[string]any)
		answer func(data map[string]any)
		want   string
	}{
		"as asked for": {},
		"another key": {ask: func(_ *string, body map[string]any) {
			body["csr"] = anotherCSR(t)
		}, want: "another key than ours"},
		"another name": {ask: func(_ *string, body map[string]any) {
			body["uri_sans"] = "spiffe://other.example"
		}, want: "its URI SAN is not spiffe://mesh.example alone"},
		"a path too": {ask: func(_ *string, body map[string]any) {
			body["uri_sans"] = "spiffe://mesh.example,spiffe://mesh.example/meshca/server"
		}, want: "its URI SAN is not spiffe://mesh.example alone"},
		"no CA": {ask: func(path *string, body map[string]any) {
			*path = strings.Replace(*path, "sign-intermediate", "sign/leaf", 1)
			body["ttl"] = "1h"
		}, want: "no CA certificate"},
		"a path length": {ask: func(_ *string, body map[string]any) {
			delete(body, "max_path_length")
			body["max_path_length"] = -1
		}, want: "path length"},
		"too long a life": {ask: func(_ *string, body map[string]any) {
			body["ttl"] = "1000h"
		}, want: "later than was asked for"},
		"below another root": {answer: func(data map[string]any) {
			text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: foreign.Cert.Raw}))
			data["certificate"], data["issuing_ca"], data["ca_chain"] = text, text, []string{text}
		}, want: "signed by its own key"},
		"nothing": {answer: func(data map[string]any) { clear(data) }, want: "the new certificate: no PEM certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			u := w.open(func(x *upstream.Config) { x.Address = w.wire(t, c.ask, c.answer) })
			l := line(t, u, named(t, u))
			_, err := l.Renew(t.Context())
			if c.want == "" {
				must(t, err)
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if l.Ready() == nil {
				t.Error("it is in use")
			}
		})
	}
}

// wire is a proxy before Vault that changes what is asked and answered when something is signed.
func (w *world) wire(t *testing.T, ask func(path *string, body map[string]any), answer func(data map[string]any)) string {
	t.Helper()
	to, err := url.Parse(w.Address)
	must(t, err)
	proxy := &httputil.ReverseProxy{
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true},
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			if ask == nil || !strings.HasSuffix(r.In.URL.Path, "/sign-intermediate") {
				return
			}
			var body map[string]any
			_ = json.NewDecoder(r.In.Body).Decode(&body)
			ask(&r.Out.URL.Path, body)
			if !strings.HasSuffix(r.Out.URL.Path, "/sign-intermediate") {
				r.Out.Header.Set("X-Vault-Token", w.RootToken)
			}
			r.Out.Body, r.Out.ContentLength = encoded(body)
		},
		ModifyResponse: func(r *http.Response) error {
			if answer == nil || !strings.HasSuffix(r.Request.URL.Path, "/sign-intermediate") {
				return nil
			}
			var body map[string]any
			if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
				return err
			}
			answer(body["data"].(map[string]any))
			r.Body, r.ContentLength = encoded(body)
			r.Header.Set("Content-Length", fmt.Sprint(r.ContentLength))
			return nil
		},
	}
	server := httptest.NewServer(proxy)
	t.Cleanup(server.Close)
	return server.URL
}

func encoded(body map[string]any) (io.ReadCloser, int64) {
	text, _ := json.Marshal(body)
	return io.NopCloser(bytes.NewReader(text)), int64(len(text))
}

func anotherCSR(t *testing.T) string {
	t.Helper()
	w := newWorld(t, shared)
	return w.write(w.mount+"/intermediate/generate/internal", map[string]any{"common_name": "meshca intermediate", "key_type": "ec"})["csr"].(string)
}

func TestCheckOfWhatIsWrong(t *testing.T) {
	w := newWorld(t, shared)
	kv := w.mount + "-kv"
	must(t, w.Client.Sys().MountWithContext(t.Context(), kv, mountOf("kv")))
	for name, c := range map[string]struct {
		change func(*upstream.Config)
		spoil  func()
		want   string
	}{
		"no such mount": {change: func(c *upstream.Config) { c.Mount = "nowhere" }, want: "vault secrets list"},
		"a mount of keys": {change: func(c *upstream.Config) { c.Mount = kv }, spoil: func() {
			w.setPolicy(w.documented() + fmt.Sprintf("\npath \"%s/*\" {\n  capabilities = [\"read\"]\n}", kv))
		}, want: `it is a mount of type "kv"`},
		"no such issuer": {change: func(c *upstream.Config) { c.Issuer = "root-9" }, want: `"root-1"`},
		"unknown CA":     {change: func(c *upstream.Config) { c.CAFile = foreignCA(t) }, want: "upstream.vault.caFile"},
		"no secret id": {change: func(c *upstream.Config) {
			c.Auth.AppRole.SecretIDFile = w.file("wrong", "b2f3c1de-0000-0000-0000-000000000000")
		}, want: "secret-id"},
		"no role":         {change: func(c *upstream.Config) { c.Auth.AppRole.Path = "nowhere" }, want: "logging in by appRole"},
		"nothing granted": {spoil: func() { w.setPolicy(`path "x/y" { capabilities = ["read"] }`) }, want: w.mount + "/issuer/+/sign-intermediate"},
		"may not read it": {spoil: func() { w.setPolicy(strings.Replace(w.documented(), `"read"`, `"deny"`, 1)) }, want: "# the issuer's chain and usage\npath"},
		"usage taken away": {spoil: func() {
			w.write(w.mount+"/issuer/root-1", map[string]any{"issuer_name": "root-1", "usage": "read-only"})
		}, want: "usage=read-only,issuing-certificates"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.spoil != nil {
				c.spoil()
				defer w.setPolicy(w.documented())
				defer w.write(w.mount+"/issuer/root-1", map[string]any{"issuer_name": "root-1", "usage": "read-only,issuing-certificates,crl-signing"})
			}
			found := w.open(c.change).Check(t.Context())
			if len(found) != 1 || found[0].Warning || !strings.Contains(found[0].What+"\n"+found[0].Why+"\n"+found[0].Do, c.want) {
				t.Errorf("found %+v, want one thing that says %q", found, c.want)
			}
		})
	}
	if found := w.open(nil).Check(t.Context()); len(found) != 0 {
		t.Errorf("found %+v where all is well", found)
	}
}

func foreignCA(t *testing.T) string {
	t.Helper()
	root, err := pki.NewRoot("elsewhere.example")
	must(t, err)
	path := filepath.Join(t.TempDir(), "ca.pem")
	writePEM(t, path, "CERTIFICATE", root.Cert.Raw)
	return path
}
