package vault

import (
	"context"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs an Upstream until the test ends or stop is called.
func start(t *testing.T, u *Upstream) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = u.Run(ctx) }()
	stop = func() { cancel(); <-ended }
	t.Cleanup(stop)
	return stop
}

func eventually(t *testing.T, what string, check func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !check(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func TestLoginIsExtended(t *testing.T) {
	f := newFake(t)
	f.lease = 2
	var renewals atomic.Int64
	u := f.upstream(nil, func(c Call) {
		if c.Operation == OpRenew && c.Err == nil {
			renewals.Add(1)
		}
	})
	start(t, u)
	eventually(t, "three renewals", func() bool { return renewals.Load() >= 3 })
	st := u.Status()
	if !st.LoggedIn || st.LoginBy != "appRole" || time.Until(st.LeaseEnds) > 2*time.Second || st.LastError != nil || st.LastContact.IsZero() {
		t.Errorf("status: %+v", st)
	}
	f.set(func() {
		if f.logins != 1 {
			t.Errorf("%d logins, want one that is extended", f.logins)
		}
	})
}

// TestLoginThatIsNotExtended: its watcher gives up before the lease ends, and the next login comes in time.
func TestLoginThatIsNotExtended(t *testing.T) {
	f := newFake(t)
	f.lease = 1
	f.answer = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, renewSelf) {
			reply(w, 403, map[string]any{"errors": []string{"permission denied"}})
			return true
		}
		return false
	}
	u := f.upstream(nil)
	start(t, u)
	eventually(t, "three logins", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return f.logins >= 3 })
	if !u.Status().LoggedIn {
		t.Error("not logged in between two logins")
	}
}

func TestCredentialsAreReadAtEachLogin(t *testing.T) {
	f := newFake(t)
	u := f.upstream(nil)
	if _, err := u.Issuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := string(f.bodies["auth/approle/login"]); got != `{"role_id":"the-role-id","secret_id":"the-secret-id"}` {
		t.Errorf("sent %s", got)
	}
	write(t, u.c.Auth.AppRole.SecretIDFile, "another-one")
	f.set(func() { f.tokens = map[string]bool{} })
	if _, err := u.Issuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := string(f.bodies["auth/approle/login"]); !strings.Contains(got, "another-one") {
		t.Errorf("sent %s", got)
	}
}

func TestTokenFile(t *testing.T) {
	f := newFake(t)
	f.lease = 0
	f.tokens["hvs.first-one"], f.tokens["hvs.second-one"] = true, true
	file := write(t, filepath.Join(t.TempDir(), "token"), "hvs.first-one\n")
	u := f.upstream(func(c *Config) { c.Auth = AuthConfig{TokenFile: file} })
	if _, err := u.Issuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := u.Status(); !st.LoggedIn || !st.LeaseEnds.IsZero() {
		t.Errorf("status of a token without an end: %+v", st)
	}
	write(t, file, "hvs.second-one")
	u.login.follow()
	if _, err := u.Issuers(t.Context()); err != nil || f.headers.Get("X-Vault-Token") != "hvs.second-one" {
		t.Errorf("%v with the token %s, want the file's new one", err, f.headers.Get("X-Vault-Token"))
	}
	if err := u.Close(); err != nil || f.called(revokeSelf) != 0 {
		t.Error("a token that is not ours to give back was revoked")
	}
	write(t, file, "hvs.nobody-knows-it")
	_, err := u.Issuers(t.Context())
	if KindOf(err) != KindLogin || strings.Contains(err.Error(), "nobody-knows-it") || !strings.Contains(err.Error(), file) {
		t.Errorf("got %v, want a fault of the login that names the file", err)
	}
}

func TestLoginFaults(t *testing.T) {
	f := newFake(t)
	f.answer = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/login") {
			reply(w, 400, map[string]any{"errors": []string{"invalid secret id: the-secret-id"}})
			return true
		}
		return false
	}
	u := f.upstream(nil)
	_, err := u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t))
	if KindOf(err) != KindLogin || strings.Contains(err.Error(), "the-secret-id") || !strings.Contains(err.Error(), "vault write -f auth/approle/role/ROLE/secret-id") {
		t.Errorf("got %v", err)
	}
	if st := u.Status(); st.LoggedIn || st.LastError == nil || st.LastErrorAt.IsZero() {
		t.Errorf("status: %+v", st)
	}
	u = f.upstream(func(c *Config) { c.Auth.AppRole.SecretIDFile = "/nowhere/secret-id" })
	if _, err := u.Issuers(t.Context()); KindOf(err) != KindFile {
		t.Errorf("a file that is not there: %v", err)
	}
	u = f.upstream(func(c *Config) { c.CAFile = write(t, filepath.Join(t.TempDir(), "ca"), "none") })
	if _, err := u.Issuers(t.Context()); KindOf(err) != KindFile {
		t.Errorf("a CA file without a certificate: %v", err)
	}
}

// TestEnvironmentIsNotRead: the library would take a token, a namespace and headers from it.
func TestEnvironmentIsNotRead(t *testing.T) {
	t.Setenv("VAULT_TOKEN", "hvs.of-the-environment")
	t.Setenv("VAULT_NAMESPACE", "elsewhere")
	t.Setenv("VAULT_WRAP_TTL", "1m")
	t.Setenv("VAULT_ADDR", "http://127.0.0.1:1")
	t.Setenv("VAULT_HEADERS", `{"x-of-the-environment":"1"}`)
	f := newFake(t)
	if _, err := f.upstream(nil).Issuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, header := range []string{"X-Vault-Namespace", "X-Vault-Wrap-Ttl", "X-Of-The-Environment"} {
		if got := f.headers.Get(header); got != "" {
			t.Errorf("%s: %s", header, got)
		}
	}
	if f.headers.Get("X-Vault-Token") != "hvs.token-number-1" || f.headers.Get("X-Vault-Request") != "true" {
		t.Errorf("sent %v", f.headers)
	}
}

// Vault's library gives up over variables that it cannot read, though what they say is not used: the fault names them.
func TestEnvironmentThatCannotBeRead(t *testing.T) {
	for name, value := range map[string]string{"VAULT_CACERT": "/nonexistent", "VAULT_SKIP_VERIFY": "maybe", "VAULT_CLIENT_TIMEOUT": "x", "VAULT_RATE_LIMIT": "abc", "VAULT_HEADERS": "hvs.not-json-but-a-token"} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			t.Setenv(name, value)
			_, err := f.upstream(nil).Issuers(t.Context())
			if err == nil || !strings.Contains(err.Error(), "unset "+name) || strings.Contains(err.Error(), "files") || strings.Contains(err.Error(), "hvs.") {
				t.Errorf("%v", err)
			}
			found := f.upstream(nil).Check(t.Context())
			if len(found) != 1 || !strings.Contains(found[0].Do, "unset "+name) || strings.Contains(found[0].Do, "caFile") || strings.Contains(found[0].Why, "hvs.") {
				t.Errorf("config check --live says %+v", found)
			}
		})
	}
}

func TestRunPublishesIssuers(t *testing.T) {
	f := newFake(t)
	u := f.upstream(nil)
	_, stale := u.Known()
	stop := start(t, u)
	<-stale
	if known, _ := u.Known(); len(known) != 1 || !known[0].Named {
		t.Errorf("got %+v", known)
	}
	stop()
	if err := u.Close(); err != nil || f.called(revokeSelf) != 1 || u.Status().LoggedIn {
		t.Errorf("%v, %d revocations: the login was not given back", err, f.called(revokeSelf))
	}
}
