package vault

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
)

func TestSign(t *testing.T) {
	f := newFake(t)
	var calls []Call
	u := f.upstream(func(c *Config) { c.Namespace = "mesh/prod" }, func(c Call) { calls = append(calls, c) })
	issuers, err := u.Issuers(t.Context())
	if err != nil || len(issuers) != 1 || !issuers[0].Named || issuers[0].Fault != nil || !issuers[0].Root.Equal(f.issuers[0].cert) {
		t.Fatalf("got %+v, %v, want the one issuer, named and fit", issuers, err)
	}
	r := newRequest(t)
	chain, err := u.SignIntermediate(t.Context(), issuers[0].Ref, r)
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 1 || chain[0].CheckSignatureFrom(issuers[0].Root) != nil || len(chain[0].URIs) != 1 || chain[0].URIs[0].String() != "spiffe://mesh.example" {
		t.Errorf("got a chain of %d, want our intermediate without the root", len(chain))
	}
	var sent map[string]any
	if err := json.Unmarshal(f.bodies["pki/issuer/"+issuers[0].Ref+"/sign-intermediate"], &sent); err != nil {
		t.Fatal(err)
	}
	delete(sent, "csr")
	want := map[string]any{"common_name": "meshca intermediate", "exclude_cn_from_sans": true, "uri_sans": "spiffe://mesh.example",
		"max_path_length": 0.0, "ttl": "259200s", "not_before_duration": "300s", "key_usage": "CertSign,CRLSign", "use_csr_values": false, "format": "pem"}
	for key, value := range want {
		if sent[key] != value {
			t.Errorf("%s: sent %v, want %v", key, sent[key], value)
		}
	}
	if len(sent) != len(want) {
		t.Errorf("sent %v, want nothing else than %v", sent, want)
	}
	if got := f.headers.Get("X-Vault-Namespace"); got != "mesh/prod" {
		t.Errorf("sent the namespace %q", got)
	}
	last := calls[len(calls)-1]
	if last.Operation != OpSign || last.Asked != 72*time.Hour || last.Got < 72*time.Hour-time.Minute || last.Shortened() {
		t.Errorf("observed %+v", last)
	}
}

func TestShortenedLife(t *testing.T) {
	f := newFake(t)
	f.tamper = func(c *x509.Certificate) { c.NotAfter = time.Now().Add(10 * time.Hour) }
	var last Call
	u := f.upstream(nil, func(c Call) { last = c })
	if _, err := u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t)); err != nil {
		t.Fatal(err)
	}
	if !last.Shortened() || last.Got < 9*time.Hour || last.Got > 10*time.Hour || last.Asked != 72*time.Hour {
		t.Errorf("observed %+v, want a life of 10h in place of 72h", last)
	}
}

// TestIssuerThatEndsSoon: the life that is asked for stays within the issuer's, for Vaults that would refuse it otherwise.
func TestIssuerThatEndsSoon(t *testing.T) {
	f := newFake(t)
	f.issuers[0] = newRootLike(t, f.issuers[0], 20*time.Hour, -1)
	var last Call
	u := f.upstream(nil, func(c Call) { last = c })
	issuers, err := u.Issuers(t.Context())
	if err != nil || issuers[0].Fault != nil {
		t.Fatalf("%+v, %v: the issuer in use is good until its end", issuers, err)
	}
	chain, err := u.SignIntermediate(t.Context(), issuers[0].Ref, newRequest(t))
	if err != nil || chain[0].NotAfter.After(issuers[0].NotAfter) || time.Until(chain[0].NotAfter) < 19*time.Hour || !last.Shortened() {
		t.Errorf("got %v, observed %+v", err, last)
	}
	f.set(func() { f.issuers[0] = newRootLike(t, f.issuers[0], 5*time.Second, -1) })
	if _, err = u.Issuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := f.called("pki/issuer/" + issuers[0].Ref + "/sign-intermediate")
	if _, err = u.SignIntermediate(t.Context(), issuers[0].Ref, newRequest(t)); err == nil || !strings.Contains(err.Error(), "its chain ends at") {
		t.Errorf("got %v", err)
	}
	if f.called("pki/issuer/"+issuers[0].Ref+"/sign-intermediate") != before {
		t.Error("it was sent all the same")
	}
}

func TestASigningIsSentOnce(t *testing.T) {
	for name, answer := range map[string]func(w http.ResponseWriter){
		"failed":    func(w http.ResponseWriter) { reply(w, 500, map[string]any{"errors": []string{"1 error occurred"}}) },
		"sealed":    func(w http.ResponseWriter) { reply(w, 503, map[string]any{"errors": []string{"Vault is sealed"}}) },
		"quota":     func(w http.ResponseWriter) { reply(w, 429, nil) },
		"rejected":  func(w http.ResponseWriter) { reply(w, 400, nil) },
		"malformed": func(w http.ResponseWriter) { _, _ = w.Write([]byte("<html>")) },
		"too long": func(w http.ResponseWriter) {
			_, _ = w.Write([]byte(`{"data":"` + strings.Repeat("a", maxAnswer) + `"}`))
		},
		"cut off": func(w http.ResponseWriter) {
			conn, _, _ := w.(http.Hijacker).Hijack()
			conn.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			path := "pki/issuer/" + f.issuers[0].id + "/sign-intermediate"
			f.answer = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, path) {
					return false
				}
				answer(w)
				return true
			}
			_, err := f.upstream(nil).SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t))
			if err == nil || f.called(path) != 1 {
				t.Fatalf("got %v after %d signings, want an error after one", err, f.called(path))
			}
			want := map[string]Kind{"failed": KindFailed, "sealed": KindSealed, "quota": KindFailed, "rejected": KindRejected,
				"malformed": KindMalformed, "too long": KindMalformed, "cut off": KindUnreachable}[name]
			if KindOf(err) != want {
				t.Errorf("got kind %q of %v, want %q", KindOf(err), err, want)
			}
		})
	}
}

func TestNoAnswerInTime(t *testing.T) {
	f := newFake(t)
	path := "pki/issuer/" + f.issuers[0].id + "/sign-intermediate"
	f.answer = func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, path) {
			<-r.Context().Done()
			return true
		}
		return false
	}
	u := f.upstream(func(c *Config) { c.Timeout.Duration = time.Second })
	began := time.Now()
	_, err := u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t))
	if KindOf(err) != KindTimeout || time.Since(began) > 5*time.Second || !strings.Contains(err.Error(), "upstream.vault.timeout is 1s") {
		t.Errorf("got %v after %s, want an end after 1s", err, time.Since(began))
	}
}

func TestRevokedTokenBringsOneLogin(t *testing.T) {
	f := newFake(t)
	u := f.upstream(nil)
	if _, err := u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t)); err != nil {
		t.Fatal(err)
	}
	f.set(func() { f.tokens = map[string]bool{} })
	r := newRequest(t)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if _, err := u.SignIntermediate(context.Background(), f.issuers[0].id, r); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if f.logins != 2 {
		t.Errorf("%d logins, want the first and one for all whose token was gone", f.logins)
	}
}

func TestMissingCapabilityIsReported(t *testing.T) {
	f := newFake(t)
	path := "pki/issuer/" + f.issuers[0].id + "/sign-intermediate"
	f.answer = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, path) {
			reply(w, 403, map[string]any{"errors": []string{"1 error occurred: permission denied for " + r.Header.Get("X-Vault-Token") + "\n\n"}})
			return true
		}
		return false
	}
	u := f.upstream(nil)
	for range 3 {
		_, err := u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t))
		if KindOf(err) != KindDenied || !strings.Contains(err.Error(), `path "`+path+`" {`) || !strings.Contains(err.Error(), `capabilities = ["update"]`) {
			t.Fatalf("got %v, want the capability that lacks, and the policy's text", err)
		}
		if strings.Contains(err.Error(), "token-number") {
			t.Errorf("the error shows the token: %v", err)
		}
	}
	// Each signing logs in afresh once, and then reports.
	if f.logins != 4 || f.called(path) != 6 {
		t.Errorf("%d logins and %d signings, want 4 and 6", f.logins, f.called(path))
	}
}

// The role's policies are taken away and given back, which only logins of then on have: the next signing is one of those.
// Polls, which are many, do not log in again and again meanwhile, while their token stands.
func TestARoleThatGetsItsPolicyBack(t *testing.T) {
	f := newFake(t)
	issuer := "pki/issuer/" + f.issuers[0].id
	good := "" // the token that has the policy; empty: none
	f.answer = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, issuer) && r.Header.Get("X-Vault-Token") != good {
			reply(w, 403, map[string]any{"errors": []string{"permission denied"}})
			return true
		}
		return false
	}
	u := f.upstream(nil)
	if _, err := u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t)); KindOf(err) != KindDenied || f.logins != 2 {
		t.Fatalf("%v after %d logins", err, f.logins)
	}
	for range 3 {
		if _, err := u.Issuers(t.Context()); KindOf(err) != KindDenied || f.logins != 2 {
			t.Errorf("a poll: %v after %d logins", err, f.logins)
		}
	}
	f.set(func() { good = "hvs.token-number-3" })
	if _, err := u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t)); err != nil || f.logins != 3 {
		t.Errorf("the policy is back: %v after %d logins", err, f.logins)
	}
	if _, err := u.Issuers(t.Context()); err != nil || f.logins != 3 {
		t.Errorf("and for polls: %v after %d logins", err, f.logins)
	}
}

func TestClockAhead(t *testing.T) {
	f := newFake(t)
	f.clock = 10 * time.Minute
	u := f.upstream(nil)
	_, err := u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t))
	if err == nil || !strings.Contains(err.Error(), "ahead of ours. Set the clocks") {
		t.Errorf("got %v, want an error that tells of the clock", err)
	}
	if ahead := u.Status().ClockAhead; ahead < 9*time.Minute || ahead > 10*time.Minute {
		t.Errorf("measured %s", ahead)
	}
	f.set(func() { f.clock = 3 * time.Minute })
	if _, err := u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t)); err != nil {
		t.Errorf("a clock 3 minutes ahead: %v", err)
	}
}

// A clock that is behind shortens what is signed, and that is said: nothing in Vault mends it.
func TestClockBehind(t *testing.T) {
	f := newFake(t)
	f.clock = -10 * time.Minute
	var log bytes.Buffer
	var last Call
	u, err := New(f.upstream(nil).c, Options{Log: slog.New(slog.NewTextHandler(&log, nil)), Observe: func(c Call) { last = c }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	chain, err := u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t))
	if err != nil || time.Now().Before(chain[0].NotBefore) || !last.Shortened() {
		t.Fatalf("a clock 10 minutes behind: %v, observed %+v", err, last)
	}
	const why = "behind ours, and what it signs ends that much earlier: set the clocks of both machines (NTP)"
	if got := log.String(); !strings.Contains(got, why) || strings.Contains(got, "vault secrets tune") {
		t.Errorf("the log says %q", got)
	}
	// What is shortened by more than that has another cause.
	log.Reset()
	f.set(func() { f.tamper = func(c *x509.Certificate) { c.NotAfter = time.Now().Add(10 * time.Hour) } })
	if _, err := u.SignIntermediate(t.Context(), f.issuers[0].id, newRequest(t)); err != nil || strings.Contains(log.String(), why) || !strings.Contains(log.String(), "vault secrets tune") {
		t.Errorf("%v, the log says %q", err, log.String())
	}
}

func TestChainBelowARootElsewhere(t *testing.T) {
	f := newFake(t)
	above := newRoot(t, "the root elsewhere", 24*365*time.Hour)
	middle := newBelow(t, above, "the issuer", 24*300*time.Hour)
	middle.chain = middle.chain[:1] // the mount does not hold the root
	f.add("below", middle)

	u := f.upstream(func(c *Config) { c.Issuer = "below" })
	issuers, err := u.Issuers(t.Context())
	if err != nil || issuers[0].Fault == nil || issuers[0].Root != nil || !strings.Contains(issuers[0].Fault.Error(), "rootFile") {
		t.Fatalf("got %+v, %v, want a fault that asks for rootFile", issuers[0], err)
	}
	file := write(t, t.TempDir()+"/root.pem", encode(above.cert))
	u = f.upstream(func(c *Config) { c.Issuer, c.RootFile = "below", file })
	if issuers, err = u.Issuers(t.Context()); err != nil || issuers[0].Fault != nil || !issuers[0].Root.Equal(above.cert) {
		t.Fatalf("got %+v, %v, want the root of the file", issuers[0], err)
	}
	chain, err := u.SignIntermediate(t.Context(), issuers[0].Ref, newRequest(t))
	if err != nil || len(chain) != 2 || !chain[1].Equal(middle.cert) {
		t.Errorf("got a chain of %d, %v, want the intermediate and its issuer", len(chain), err)
	}
}

func TestRequestsThatAreNone(t *testing.T) {
	f := newFake(t)
	u := f.upstream(nil)
	for name, change := range map[string]func(ref *string, r *ca.IntermediateRequest){
		"a path for a ref":  func(ref *string, _ *ca.IntermediateRequest) { *ref = "../../sys/seal" },
		"the default":       func(ref *string, _ *ca.IntermediateRequest) { *ref = "default" },
		"no ref":            func(ref *string, _ *ca.IntermediateRequest) { *ref = "" },
		"no life":           func(_ *string, r *ca.IntermediateRequest) { r.Life = 0 },
		"no proof of a key": func(_ *string, r *ca.IntermediateRequest) { r.CSR = nil },
	} {
		ref, r := f.issuers[0].id, newRequest(t)
		change(&ref, &r)
		if _, err := u.SignIntermediate(t.Context(), ref, r); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if len(f.calls) != 0 {
		t.Errorf("called %v for them, want nothing", f.calls)
	}
}
