package vault

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestNothingShowsACredential: what answers in Vault's place throws all that it was sent back at us.
func TestNothingShowsACredential(t *testing.T) {
	for _, code := range []int{400, 403, 404, 500, 503} {
		for _, at := range []string{"/login", "/issuers", "/sign-intermediate", "/renew-self"} {
			f := newFake(t)
			f.lease = 1
			f.answer = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, at) {
					return false
				}
				path := strings.TrimPrefix(r.URL.Path, "/v1/")
				reply(w, code, map[string]any{"errors": []string{fmt.Sprintf("%s %v %s", path, r.Header, f.bodies[path])}})
				return true
			}
			var log strings.Builder
			c := f.upstream(nil).c
			logger := slog.New(slog.NewJSONHandler(&log, nil)) // calls are observed while it writes: it orders what is written
			u, err := New(c, Options{Log: logger, Observe: func(c Call) { logger.Info("a call", "was", fmt.Sprintf("%+v", c)) }})
			if err != nil {
				t.Fatal(err)
			}
			var told []any
			_, err = u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t))
			told = append(told, err)
			_, err = u.Issuers(t.Context())
			told = append(told, err, u.Check(t.Context()))
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			told = append(told, u.Run(ctx), fmt.Sprintf("%+v %#v", u.Status(), u.login.now.Load()))
			cancel()
			text := fmt.Sprintf("%v %+v", told, told) + log.String()
			for _, credential := range []string{"the-role-id", "the-secret-id", "token-number"} {
				if i := strings.Index(text, credential); i >= 0 {
					t.Fatalf("%d at %s: shown: %s", code, at, text[max(0, i-200):i+len(credential)])
				}
			}
		}
	}
}

// TestWarningsShowNoCredential: Vault's words about a life that it shortened go to the log, and may repeat what it was sent.
func TestWarningsShowNoCredential(t *testing.T) {
	f := newFake(t)
	f.tamper = func(c *x509.Certificate) { c.NotAfter = time.Now().Add(10 * time.Hour) }
	f.warn = func(token string) []string {
		return []string{"too much for " + token, "as the-secret-id of the-role-id"}
	}
	var log strings.Builder
	u, err := New(f.upstream(nil).c, Options{Log: slog.New(slog.NewJSONHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t)); err != nil {
		t.Fatal(err)
	}
	text := log.String()
	if !strings.Contains(text, "too much for [redacted]") {
		t.Errorf("Vault's words are not told: %s", text)
	}
	for _, credential := range []string{"the-role-id", "the-secret-id", "token-number"} {
		if strings.Contains(text, credential) {
			t.Errorf("%s is shown: %s", credential, text)
		}
	}
}

// TestStandbySendsUsOn: a signing that a standby did not take is made by the active Vault, once.
func TestStandbySendsUsOn(t *testing.T) {
	active, standby := newFake(t), newFake(t)
	standby.answer = func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, active.server.URL+r.URL.RequestURI(), http.StatusTemporaryRedirect)
		return true
	}
	if _, err := standby.upstream(nil).SignIntermediate(t.Context(), active.issuers[0].id, newRequest(t)); err != nil {
		t.Fatal(err)
	}
	if n := active.called("pki/issuer/" + active.issuers[0].id + "/sign-intermediate"); n != 1 || standby.called("auth/approle/login") != 1 {
		t.Errorf("the active one signed %d times", n)
	}
	if got := string(active.bodies["auth/approle/login"]); !strings.Contains(got, "the-secret-id") {
		t.Errorf("the active one was sent %q", got)
	}
}

// TestCAFileIsReadAgain: Vault gets a TLS certificate of another CA, and then we get that CA.
func TestCAFileIsReadAgain(t *testing.T) {
	f := newFake(t)
	var served atomic.Pointer[tls.Certificate]
	serve := func() *x509.Certificate {
		key := newKey(t)
		template := &x509.Certificate{SerialNumber: newSerial(), Subject: pkix.Name{CommonName: "vault"}, NotBefore: time.Now().Add(-time.Hour),
			NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
		cert := mustSign(t, template, template, key.Public(), key)
		served.Store(&tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key})
		return cert
	}
	server := httptest.NewUnstartedServer(f)
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	server.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{Certificates: []tls.Certificate{*served.Load()}}, nil
	}}
	file := write(t, filepath.Join(t.TempDir(), "ca.pem"), encode(serve()))
	server.StartTLS()
	defer server.Close()
	u := f.upstream(func(c *Config) { c.Address, c.CAFile = server.URL, file })
	if _, err := u.Issuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	next := serve()
	server.CloseClientConnections()
	if _, err := u.Issuers(t.Context()); KindOf(err) != KindTLS || !strings.Contains(err.Error(), "upstream.vault.caFile") {
		t.Errorf("got %v, want a fault of TLS", err)
	}
	if found := u.Check(t.Context()); len(found) != 1 || !strings.Contains(found[0].Do, "upstream.vault.caFile") {
		t.Errorf("check: %+v", found)
	}
	write(t, file, encode(next))
	if _, err := u.Issuers(t.Context()); err != nil {
		t.Errorf("with the CA in its file: %v", err)
	}
}

// TestRunSeesWhatBecomesOfTheMount: another issuer appears, Vault is away for a while, and is back.
func TestRunSeesWhatBecomesOfTheMount(t *testing.T) {
	f := newFake(t)
	u := f.upstream(nil)
	u.c.Poll.Duration = 20 * time.Millisecond
	start(t, u)
	eventually(t, "the first look", func() bool { known, _ := u.Known(); return len(known) == 1 })
	_, stale := u.Known()
	f.add("root-2", newRoot(t, "root 2", 24*365*time.Hour))
	<-stale
	if known, _ := u.Known(); len(known) != 2 || !known[0].Named || known[1].Named || known[1].Fault != nil {
		t.Errorf("got %+v", known)
	}
	f.set(func() {
		f.answer = func(w http.ResponseWriter, _ *http.Request) bool {
			reply(w, 503, map[string]any{"errors": []string{"Vault is sealed"}})
			return true
		}
	})
	eventually(t, "the seal", func() bool { return u.Status().Sealed })
	if known, _ := u.Known(); len(known) != 2 || KindOf(u.Status().LastError) != KindSealed {
		t.Errorf("sealed: %d issuers, %v", len(known), u.Status().LastError)
	}
	f.set(func() { f.answer = nil })
	eventually(t, "the unsealing", func() bool { st := u.Status(); return !st.Sealed && st.LastError == nil })
}
