package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// runAs runs a command line, and returns the exit code and all that it wrote.
func runAs(t *testing.T, args ...string) (int, string) {
	t.Helper()
	var out bytes.Buffer
	c := &cli{in: strings.NewReader(""), out: &out, err: &out, now: time.Now}
	code := c.run(t.Context(), args)
	return code, out.String()
}

// A token or a key that stands where a name or a file should is in no output: who sees that may not have it.
func TestSecretsAsArgumentsAreNotShown(t *testing.T) {
	const token = "eyJhbGciOiJSUzI1NiIsImtpZCI6ImEifQ.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQ6c2hvcDpjYXJ0In0.c2lnbmF0dXJl-_"
	const unsigned = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0."
	const key = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\n-----END PRIVATE KEY-----"
	for _, line := range [][]string{
		{"policy", "test", "SECRET"},
		{"policy", "test", "a/SECRET"},
		{"policy", "test", "a/b", "--label", "x=SECRET"},
		{"policy", "test", "a/b", "--cluster", "SECRET"},
		{"policy", "test", "a/b", "--file=SECRET"},
		{"policy", "test", "a/b", "--file=x", "--trust-domain", "SECRET", "--cluster=y"},
		{"policy", "test", "--token-file", "SECRET"},
		{"policy", "test", "--token-file=SECRET"},
		{"explain", "SECRET"},
		{"explain", "Bearer SECRET"},
		{"explain", "pod", "SECRET"},
		{"explain", "spiffe://SECRET", "--agent=none.sock"},
		{"svid", "inspect", "SECRET"},
		{"svid", "fetch", "SECRET"},
		{"svid", "list", "--id", "SECRET"},
		{"svid", "deny", "SECRET", "--why", "x"},
		{"svid", "deny", "spiffe://a/b", "--why", "SECRET"},
		{"svid", "allow", "SECRET"},
		{"svid", "renew", "SECRET"},
		{"bundle", "export", "--format", "SECRET"},
		{"ca", "root", "import", "SECRET"},
		{"ca", "root", "remove", "SECRET"},
		{"ca", "rotate", "root", "--share", "SECRET"},
		{"ca", "taint", "root", "SECRET"},
		{"backup", "SECRET"},
		{"status", "-o", "SECRET"},
		{"status", "--timeout", "SECRET"},
		{"status", "--socket", "SECRET"},
		{"status", "--agent=SECRET"},
		{"status", "--SECRET"},
		{"status", "SECRET"},
		{"SECRET"},
		{"--", "SECRET"},
	} {
		for what, secret := range map[string]string{"a token": token, "a token ": unsigned, "a private key": key} {
			args := make([]string, len(line))
			for i, a := range line {
				args[i] = strings.ReplaceAll(a, "SECRET", secret)
			}
			code, out := runAs(t, args...)
			if code != exitUsage || !strings.Contains(out, "looks like "+strings.TrimSpace(what)) {
				t.Errorf("%v with %s: exit code %d, %q", line, what, code, out)
			}
			for _, part := range []string{"eyJ", "c2lnbmF0dXJl", "MIGH"} {
				if strings.Contains(out, part) {
					t.Errorf("%v shows %s", line, what)
				}
			}
		}
	}
	if _, out := runAs(t, "policy", "test", token); !strings.Contains(out, "--token-file FILE") || !strings.Contains(out, "--token-file -") {
		t.Errorf("nobody learns how to test a token: %q", out)
	}
}

// What else is repeated is cut: it may be anything.
func TestArgumentsAreShownCut(t *testing.T) {
	long, file := strings.Repeat("x", 3000), filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(file, []byte("rules: []\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, line := range [][]string{
		{"policy", "test", long},
		{"policy", "test", "a/b", "--label", long},
		{"policy", "test", "a/b", "--file=" + file, "--trust-domain", "X" + long, "--cluster=y"},
		{"explain", long},
		{"explain", "pod", long},
		{"svid", "list", "--id", long, "--agent=none.sock"},
		{"bundle", "export", "--format", long},
		{"ca", "rotate", "root", "--share", long},
		{"status", "-o", long},
		{"status", "--timeout", long},
		{"status", "--" + long},
		{long},
		{"svid", long},
		{"svid", "inspect", long},
	} {
		code, out := runAs(t, line...)
		if code == exitFine || len(out) > 600 || !strings.Contains(out, "xxxx") {
			t.Errorf("%.20q: exit code %d, %d bytes: %.200q", line, code, len(out), out)
		}
	}
	if code, out := runAs(t, "svid", "inspect", strings.Repeat("x", 10_000)); code != exitUsage || strings.Contains(out, "xxxx") || !strings.Contains(out, "10000 bytes") {
		t.Errorf("exit code %d, %.200q", code, out)
	}
}
