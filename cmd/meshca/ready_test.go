package main

import (
	"context"
	"crypto/x509"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
)

// TestNotReady has each reason alone, as /readyz and /metrics tell it.
func TestNotReady(t *testing.T) {
	tests := map[string]struct {
		away   []bool // of each cluster; by default there is one
		before bool   // the CA's credentials were made
		harm   func(*testing.T, *daemon)
		want   []string
	}{
		"all is well":         {},
		"no intermediate yet": {before: true, want: []string{"no intermediate has come", "no serving SVID yet"}},
		"a signer that signed something else": {
			harm: func(t *testing.T, d *daemon) { d.issuer = mismatched(t, d) }, want: []string{string(refusal.SignerMismatch)}},
		"no serving SVID": {harm: func(_ *testing.T, d *daemon) { d.serving.Expired() }, want: []string{"no serving SVID yet"}},
		"a commit that failed": {harm: func(t *testing.T, d *daemon) {
			if err := d.store.Close(); err != nil {
				t.Fatal(err)
			}
			if err := d.ledger.Append(t.Context(), ca.LedgerEntry{}); err == nil {
				t.Error("a closed store took an entry")
			}
		}, want: []string{"the ledger's last commit failed"}},
		"a commit that hangs": {harm: hangingLedger, want: []string{"a commit has been under way for 6s"}},
		"an audit line that was lost": {harm: func(_ *testing.T, d *daemon) {
			_ = d.audit.file.Close()
			d.journal.Refused(registration.EventCall, "grpc", registration.Caller{}, "one", refusal.New(refusal.Overloaded, "busy"))
		}, want: []string{"audit lines cannot be written"}},
		"its one cluster away": {away: []bool{true}, want: []string{"cluster a: "}},
		"all clusters away":    {away: []bool{true, true}, want: []string{"cluster a: ", "cluster b: "}},
		"one of two away":      {away: []bool{true, false}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				if tt.away == nil {
					tt.away = []bool{false}
				}
				var clusters []ClusterConfig
				for i, away := range tt.away {
					clusters = append(clusters, clusterIn(t, dir, string(rune('a'+i)), away))
				}
				var d *daemon
				if c := configIn(t, dir, clusters...); tt.before {
					d = opened(t, c)
					for _, cluster := range d.clusters {
						go func() { _ = cluster.Run(t.Context()) }()
					}
					synctest.Wait()
				} else {
					d = signing(t, c)
				}
				if tt.harm != nil {
					tt.harm(t, d)
				}
				wantReasons(t, d, tt.want)
			})
		})
	}
}

func wantReasons(t *testing.T, d *daemon, want []string) {
	t.Helper()
	why := d.notReady()
	if len(why) != len(want) {
		t.Fatalf("not ready for %q, want %q", why, want)
	}
	get := func(path string) (int, string) {
		w := httptest.NewRecorder()
		opsHandler(d.registry, d.notReady, d.degraded).ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code, w.Body.String()
	}
	code, body := get("/readyz")
	if ready := code == http.StatusOK && body == "ok\n"; ready != (len(want) == 0) || !ready && code != http.StatusServiceUnavailable {
		t.Errorf("/readyz answers %d %q", code, body)
	}
	for _, w := range want {
		if !strings.Contains(body, w) {
			t.Errorf("/readyz says %q, want %q", body, w)
		}
	}
	gauge := map[bool]string{true: "\nmeshca_ready 1\n", false: "\nmeshca_ready 0\n"}[len(want) == 0]
	if code, body := get("/metrics"); code != http.StatusOK || !strings.Contains(body, gauge) {
		t.Errorf("/metrics answers %d, without %q", code, gauge)
	}
	if code, body := get("/livez"); code != http.StatusOK || body != "ok\n" {
		t.Errorf("/livez answers %d %q: an unready CA is not a dead one", code, body)
	}
}

// meddler keeps the template that it lints, and changes it when the signature is recorded: what comes back is then not
// what was asked for.
type meddler struct{ template *x509.Certificate }

func (m *meddler) Lint(_ context.Context, template, _ *x509.Certificate, _ string) error {
	m.template = template
	return nil
}

func (m *meddler) Append(context.Context, ca.LedgerEntry) error {
	m.template.DNSNames = append(m.template.DNSNames, "pay.shop.svc")
	return nil
}

// mismatched is an issuer under the CA's intermediate that has found a mismatch.
func mismatched(t *testing.T, d *daemon) *ca.Issuer {
	t.Helper()
	m := &meddler{}
	issuer, err := ca.NewIssuer(ca.IssuerConfig{Authority: d.authority, Ledger: m, Linter: m, Profiles: ca.Profiles(0)})
	if err != nil {
		t.Fatal(err)
	}
	s, err := ca.NewServing(issuer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Renew(t.Context()); refusal.Of(err) != refusal.SignerMismatch {
		t.Fatalf("a changed certificate: %v", err)
	}
	return issuer
}

// hanging is a store whose disk is gone.
type hanging struct{}

func (hanging) AppendLedger(ctx context.Context, _ []ca.LedgerEntry) error {
	<-ctx.Done()
	return ctx.Err()
}

func hangingLedger(t *testing.T, d *daemon) {
	var err error
	d.ledger.Close()
	if d.ledger, err = ca.NewSequencer(ca.SequencerConfig{Store: hanging{}}); err != nil {
		t.Fatal(err)
	}
	go func() { _ = d.ledger.Append(t.Context(), ca.LedgerEntry{}) }()
	time.Sleep(6 * time.Second)
}
