package kubernetes

import (
	"encoding/pem"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The certificates that the keys' server is verified with can be replaced, too.
func TestKeyServersCertificateIsReadAgain(t *testing.T) {
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"keys":[` + jwk(t, testKeys()["p256"].Public(), nil) + `]}`))
	}))
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0) // it is not trusted at first
	s.StartTLS()
	t.Cleanup(s.Close)
	file := filepath.Join(t.TempDir(), "ca.pem")
	write := func(content []byte) {
		t.Helper()
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	right := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	write(otherCA(t))
	source, err := newURLSource(settings{keys: KeysConfig{URL: s.URL, CAFile: file}, callTimeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name    string
		content []byte
		want    []string // in the error; none: it works
	}{
		{"another's", otherCA(t), []string{"certificate"}},
		{"replaced", right, nil},
		{"the same", right, nil},
		{"half written", []byte("-----BEGIN"), nil},
		{"another's again", otherCA(t), []string{"certificate"}},
		{"half written again", []byte("-----BEGIN"), []string{"certificate", "caFile", file}},
		{"right again", right, nil},
	} {
		write(step.content)
		_, _, err := source.read(t.Context())
		if (err == nil) != (step.want == nil) {
			t.Errorf("%s: got %v", step.name, err)
		}
		for _, want := range step.want {
			if err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: the error does not say %q: %v", step.name, want, err)
			}
		}
	}
}
