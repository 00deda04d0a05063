package incluster

import (
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDo(t *testing.T) {
	var seen []string
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		seen = append(seen, r.Method+" "+r.URL.String()+" "+r.Header.Get("Authorization")+" "+r.Header.Get("Content-Type")+" "+string(body))
		switch r.URL.Path {
		case "/no":
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, `{"kind": "Status", "message": "not you"}`)
		case "/odd":
			http.Error(w, strings.Repeat("x", 1000), http.StatusBadGateway)
		default:
			io.WriteString(w, "fine")
		}
	}))
	defer server.Close()
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := At(server.URL, dir)
	do := func(path string) (string, error) {
		text, err := c.Do(t.Context(), http.MethodPatch, path, "application/json", []byte("{}"))
		return string(text), err
	}
	if _, err := do("/"); err == nil || len(seen) > 0 {
		t.Errorf("called without a token: %v", err)
	}
	write("token", "one\n")
	if _, err := do("/"); err == nil || len(seen) > 0 {
		t.Errorf("called a server that cannot be verified: %v", err)
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	write("ca.crt", string(ca))
	if text, err := do("/a?b=c"); text != "fine" || err != nil {
		t.Errorf("%q, %v", text, err)
	}
	write("token", "two\n") // kubelet's next one
	var status *StatusError
	if _, err := do("/no"); !errors.As(err, &status) || status.Code != http.StatusForbidden || status.Message != "not you" {
		t.Errorf("refused: %v", err)
	}
	if _, err := do("/odd"); !errors.As(err, &status) || len(status.Message) > 200 {
		t.Errorf("an answer of another kind: %v", err)
	}
	want := []string{`PATCH /a?b=c Bearer one application/json {}`, `PATCH /no Bearer two application/json {}`, `PATCH /odd Bearer two application/json {}`}
	if strings.Join(seen, "\n") != strings.Join(want, "\n") {
		t.Errorf("the server saw %q", seen)
	}
}

func TestNew(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := New(); err == nil || !strings.Contains(err.Error(), "no pod") {
		t.Errorf("outside a cluster: %v", err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
	t.Setenv("KUBERNETES_SERVICE_PORT", "443")
	if c, err := New(); err != nil || c.base != "https://[fd00::1]:443" {
		t.Errorf("%+v, %v", c, err)
	}
}
