package kubernetes

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

func TestConfig(t *testing.T) {
	for name, test := range map[string]struct {
		yaml string
		want string // in the error; empty: it is sound
	}{
		"the least":            {"name: prod", ""},
		"all of it":            {"{name: prod, mode: jwks, kubeconfig: /k, issuer: https://i, jwks: {url: 'https://i/keys', caFile: /c}, liveness: api, maxTokenAge: 1h, maxStale: 5m, maxCalls: 10, callTimeout: 2s}", ""},
		"a file of keys":       {"{name: dev, mode: jwks, issuer: https://i, jwks: {file: /keys}, liveness: none}", ""},
		"no name":              {"{}", "name"},
		"a name with a slash":  {"name: a/b", "name"},
		"a name in capitals":   {"name: Prod", "name"},
		"an unknown mode":      {"{name: prod, mode: oidc}", "mode"},
		"an unknown liveness":  {"{name: prod, mode: jwks, liveness: maybe}", "liveness"},
		"blind tokenReview":    {"{name: prod, liveness: none}", "liveness"},
		"keys for tokenReview": {"{name: prod, issuer: https://i, jwks: {file: /keys}}", "jwks"},
		"two sources":          {"{name: prod, mode: jwks, issuer: https://i, jwks: {file: /keys, url: 'https://i/keys'}}", "both"},
		"a CA for nothing":     {"{name: prod, mode: jwks, jwks: {caFile: /c}}", "caFile"},
		"a CA for a file":      {"{name: prod, mode: jwks, issuer: https://i, jwks: {file: /keys, caFile: /c}}", "caFile"},
		"keys of nobody":       {"{name: prod, mode: jwks, jwks: {file: /keys}}", "issuer"},
		"keys over http":       {"{name: prod, mode: jwks, issuer: https://i, jwks: {url: 'http://i/keys'}}", "https"},
		"a URL with a user":    {"{name: prod, mode: jwks, issuer: https://i, jwks: {url: 'https://u:p@i/keys'}}", "user"},
		"a URL without a host": {"{name: prod, mode: jwks, issuer: https://i, jwks: {url: 'https:///keys'}}", "https"},
		"a bad duration":       {"{name: prod, maxTokenAge: soon}", "soon"},
		"a negative duration":  {"{name: prod, maxTokenAge: -1h}", "maxTokenAge"},
		"stale at once":        {"{name: prod, mode: jwks, maxStale: 1s}", "maxStale"},
		"too long a call":      {"{name: prod, callTimeout: 1h}", "callTimeout"},
		"no calls":             {"{name: prod, maxCalls: -1}", "maxCalls"},
		"calls for one alone":  {"{name: prod, maxCalls: 1}", "maxCalls"},
		"two calls":            {"{name: prod, maxCalls: 2}", ""},
		"too many calls":       {"{name: prod, maxCalls: 5000}", "maxCalls"},
		"an unknown key":       {"{name: prod, audience: x}", "audience"},
		"two faults":           {"{name: Prod, mode: oidc}", "mode"},
	} {
		var c Config
		err := yaml.UnmarshalStrict([]byte(test.yaml), &c)
		if err == nil {
			err = c.Validate()
		}
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
	}
}

func TestDefaults(t *testing.T) {
	s, err := Config{Name: "prod"}.parse()
	if err != nil || s.mode != TokenReview || !s.live || s.maxTokenAge != 25*time.Hour || s.maxStale != 10*time.Minute || s.maxCalls != 64 || s.callTimeout != 5*time.Second {
		t.Errorf("got %+v, %v", s, err)
	}
}

func TestNewNamesTheFileThatIsWrong(t *testing.T) {
	dir := t.TempDir()
	broken := filepath.Join(dir, "broken")
	if err := os.WriteFile(broken, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, kubeconfig := range map[string]string{"absent": filepath.Join(dir, "absent"), "broken": broken, "empty": empty, "no cluster": ""} {
		t.Setenv("KUBERNETES_SERVICE_HOST", "")
		if c, err := New(Config{Name: "prod", Kubeconfig: kubeconfig}, Deps{}); err == nil || c != nil || !strings.Contains(err.Error(), "kubeconfig") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := New(Config{Name: "Prod"}, Deps{}); err == nil {
		t.Error("a config that is not sound makes a cluster")
	}
}
