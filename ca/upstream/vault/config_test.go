package vault

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

func TestConfig(t *testing.T) {
	const auth = "auth: {tokenFile: /t}\n"
	for name, c := range map[string]struct{ text, want string }{
		"least":            {"address: https://v:8200\nissuer: root-1\n" + auth, ""},
		"loopback":         {"address: http://127.0.0.1:8200\nissuer: root-1\n" + auth, ""},
		"all":              {"address: https://v\nnamespace: /a/b/\nmount: pki/mesh/\nissuer: i\ncaFile: /c\nrootFile: /r\ntimeout: 10s\nautoTrust: true\npoll: 30s\nauth: {appRole: {roleIDFile: /r, secretIDFile: /s}}", ""},
		"kubernetes":       {"address: https://v\nissuer: i\nauth: {kubernetes: {role: meshca}}", ""},
		"cert":             {"address: https://v\nissuer: i\nauth: {cert: {certFile: /c, keyFile: /k}}", ""},
		"no address":       {"issuer: i\n" + auth, "address: required"},
		"plain http":       {"address: http://vault.example:8200\nissuer: i\n" + auth, "plain http to another machine"},
		"other scheme":     {"address: ftp://v\nissuer: i\n" + auth, "neither https nor http"},
		"password in it":   {"address: https://u:p@v\nissuer: i\n" + auth, "a scheme and a host alone"},
		"a path in it":     {"address: https://v/v1\nissuer: i\n" + auth, "a scheme and a host alone"},
		"no issuer":        {"address: https://v\n" + auth, "issuer: required"},
		"default issuer":   {"address: https://v\nissuer: default\n" + auth, "can be moved"},
		"path as issuer":   {"address: https://v\nissuer: a/b\n" + auth, "issuer:"},
		"path upwards":     {"address: https://v\nissuer: i\nmount: ../sys\n" + auth, "mount:"},
		"query in mount":   {"address: https://v\nissuer: i\nmount: pki?x=y\n" + auth, "mount:"},
		"no auth":          {"address: https://v\nissuer: i\n", "0 kinds are named"},
		"two kinds":        {"address: https://v\nissuer: i\nauth: {tokenFile: /t, kubernetes: {role: r}}", "2 kinds are named"},
		"half an AppRole":  {"address: https://v\nissuer: i\nauth: {appRole: {roleIDFile: /r}}", "auth.appRole.secretIDFile: required"},
		"no role":          {"address: https://v\nissuer: i\nauth: {kubernetes: {}}", "auth.kubernetes.role: required"},
		"no key":           {"address: https://v\nissuer: i\nauth: {cert: {certFile: /c}}", "auth.cert.keyFile: required"},
		"long timeout":     {"address: https://v\nissuer: i\ntimeout: 1h\n" + auth, "timeout:"},
		"restless":         {"address: https://v\nissuer: i\npoll: 1s\n" + auth, "poll:"},
		"path as auth":     {"address: https://v\nissuer: i\nauth: {kubernetes: {role: r, path: 'a b'}}", "auth.kubernetes.path:"},
		"namespace upward": {"address: https://v\nissuer: i\nnamespace: a/../b\n" + auth, "namespace:"},
	} {
		var config Config
		if err := yaml.UnmarshalStrict([]byte(c.text), &config); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		err := config.Validate()
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
	full, err := Config{Address: "https://v", Issuer: "i", Namespace: "/a/", Auth: AuthConfig{Kubernetes: &KubernetesConfig{Role: "r"}}}.complete()
	if err != nil || full.Mount != "pki" || full.Namespace != "a" || full.Timeout.Duration != 30*time.Second || full.Poll.Duration != time.Minute ||
		full.Auth.Kubernetes.Path != "kubernetes" || full.Auth.Kubernetes.TokenFile != podToken {
		t.Errorf("defaults: %+v, %v", full, err)
	}
}

func TestScrub(t *testing.T) {
	const jwt = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"
	for in, want := range map[string]string{
		"permission denied":                           "permission denied",
		"token hvs.CAESIJf8_abc-def is bad":           "token [redacted] is bad",
		"old s.1234567890abcdefghijklmn here":         "old [redacted] here",
		"jwt " + jwt:                                  "jwt [redacted]",
		"secret id 0f1e-known here":                   "secret id [redacted] here",
		"two\nlines\x1b[31m\x00 and  space":           "two lines[31m and space",
		strings.Repeat("long ", 50) + "0f1e-known":    strings.Repeat("long ", 50) + "[redacted]",
		strings.Repeat("x", maxText-3) + "0f1e-known": strings.Repeat("x", maxText-3) + "[re…",
	} {
		if got := scrub(in, newSecret("0f1e-known")); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	s := newSecret("hvs.value")
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("a login", "token", s, "all", struct{ T secret }{s})
	for _, text := range []string{fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %s %q %x", s, s, s, s, s, s), fmt.Sprintf("%v", granted{token: s}), log.String()} {
		if strings.Contains(text, "value") || strings.Contains(text, "6876732e") {
			t.Errorf("shown: %s", text)
		}
	}
}
