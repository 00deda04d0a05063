package vault

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestCheck(t *testing.T) {
	at := func(path string, code int, body any) func(*fake) {
		return func(f *fake) {
			f.answer = func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path != "/v1/"+path {
					return false
				}
				reply(w, code, body)
				return true
			}
		}
	}
	data := func(v map[string]any) map[string]any { return map[string]any{"data": v} }
	for name, c := range map[string]struct {
		spoil   func(*fake)
		change  func(*Config)
		want    string // in what, why or do of the one finding
		warning bool
	}{
		"all is well":     {},
		"sealed":          {spoil: at("sys/health", 299, map[string]any{"initialized": true, "sealed": true}), want: "vault operator unseal"},
		"not initialised": {spoil: at("sys/health", 299, map[string]any{"initialized": false, "sealed": true}), want: "vault operator init"},
		"no Vault":        {spoil: at("sys/health", 200, "<html>"), want: "does not speak as Vault does"},
		"wrong type":      {spoil: at("sys/internal/ui/mounts/pki", 200, data(map[string]any{"type": "kv"})), want: `a mount of type "kv"`},
		"no mount":        {spoil: at("sys/internal/ui/mounts/pki", 403, nil), want: "there is no such mount"},
		"no such issuer":  {change: func(c *Config) { c.Issuer = "root-9" }, want: `"root-1"`},
		"no policy": {spoil: at("sys/capabilities-self", 200, data(map[string]any{
			"pki/issuer/00000001-0000-4000-8000-000000000000": []string{"read"}, renewSelf: []string{"update"},
		})), want: "# to have it sign\npath \"pki/issuer/00000001-0000-4000-8000-000000000000/sign-intermediate\" {\n  capabilities = [\"update\"]\n}"},
		"clock ahead":   {spoil: func(f *fake) { f.clock = 10 * time.Minute }, want: "ahead of ours: what it signs is not valid yet here"},
		"clock behind":  {spoil: func(f *fake) { f.clock = -10 * time.Minute }, want: "behind ours", warning: true},
		"ends soon":     {spoil: func(f *fake) { f.issuers[0] = newRootLike(f.t, f.issuers[0], 20*time.Hour, -1) }, want: "before an intermediate would", warning: true},
		"wrong usage":   {spoil: func(f *fake) { f.issuers[0].usage = "read-only" }, want: "cannot be used"},
		"clients alone": {spoil: func(f *fake) { f.issuers[0] = restrictedBelow(f.t, f.issuers[0], true) }, want: "extended key usages without serverAuth"},
		"login":         {spoil: at("auth/approle/login", 400, nil), want: "logging in by appRole"},
		"nobody there":  {change: func(c *Config) { c.Address = "http://127.0.0.1:1" }, want: "can be reached from here"},
		"not a CA file": {change: func(c *Config) { c.CAFile = "/nowhere" }, want: "upstream.vault.caFile"},
		"no namespace":  {spoil: at("auth/approle/login", 404, map[string]any{"errors": []string{"no handler for route"}}), want: "logging in by appRole"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			if c.spoil != nil {
				c.spoil(f)
			}
			found := f.upstream(c.change).Check(t.Context())
			if c.want == "" {
				if len(found) != 0 {
					t.Errorf("found %+v", found)
				}
				return
			}
			if len(found) != 1 {
				t.Fatalf("found %+v, want one thing that says %q", found, c.want)
			}
			text := strings.Join([]string{found[0].What, found[0].Why, found[0].Do}, "\n")
			if !strings.Contains(text, c.want) || found[0].Warning != c.warning {
				t.Errorf("found %+v, want %q", found[0], c.want)
			}
		})
	}
}
