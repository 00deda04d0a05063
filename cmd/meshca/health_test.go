package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/pkcs11"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/ca/upstream/vault"
	"github.com/meshca/meshca/rotation"
)

// distant is an upstream in another place: it can be away, or give no answer, and knows its issuers from polls.
type distant struct {
	ca.Upstream
	away  atomic.Bool
	slow  atomic.Bool
	known rotation.Current[[]ca.UpstreamIssuer]
}

func (u *distant) Issuers(ctx context.Context) ([]ca.UpstreamIssuer, error) {
	if u.slow.Load() {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Minute):
		}
	}
	if u.away.Load() {
		return nil, errors.New("connection refused")
	}
	return u.Upstream.Issuers(ctx)
}

func (u *distant) SignIntermediate(ctx context.Context, ref string, r ca.IntermediateRequest) ([]*x509.Certificate, error) {
	if u.away.Load() {
		return nil, errors.New("connection refused")
	}
	return u.Upstream.SignIntermediate(ctx, ref, r)
}

func (u *distant) Known() ([]ca.UpstreamIssuer, <-chan struct{}) { return u.known.Get() }

// onDistant is a CA on a distant upstream, which has its root on disk.
func onDistant(t *testing.T, c *Config) (*daemon, *distant) {
	t.Helper()
	u := &distant{}
	d, err := u.opens(t, c, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	return d, u
}

// opens is a start of a CA on it.
func (u *distant) opens(t *testing.T, c *Config, log io.Writer) (*daemon, error) {
	t.Helper()
	d, err := openOn(t.Context(), c, slog.New(slog.NewJSONHandler(log, nil)), io.Discard, func(c *Config, tokens *pkcs11.Modules, log *slog.Logger, observe func(vault.Call)) (ca.Upstream, error) {
		var err error
		u.Upstream, err = openUpstream(c, tokens, log, observe)
		return u, err
	})
	if err == nil {
		endWith(t, d)
	}
	return d, err
}

// The upstream is away for longer than half the intermediate's life: issuance goes on, and it is told for how long; when
// the intermediate's last ten minutes begin it ends, with that reason; and all is well when the upstream is back.
func TestTheUpstreamIsAway(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		c := configIn(t, dir, clusterIn(t, dir, "a", false))
		c.SVID.TTL.Duration, c.Intermediate.TTL.Duration = time.Hour, 8*time.Hour
		d, upstream := onDistant(t, c)
		ctx, stop := context.WithCancel(t.Context())
		first := make(chan struct{}, 1)
		kept := make(chan struct{})
		go func() {
			defer close(kept)
			d.keepLines(ctx, func() {
				select {
				case first <- struct{}{}:
				default:
				}
			})
		}()
		defer func() { stop(); <-kept }()
		for _, cluster := range d.clusters {
			go func() { _ = cluster.Run(ctx) }()
		}
		<-first
		go func() {
			_ = rotation.Keep(ctx, d.serving, rotation.KeepOptions{Retry: rotation.Retry{Max: 30 * time.Second}})
		}()
		time.Sleep(time.Second)
		get := func(path string) (int, string) {
			w := httptest.NewRecorder()
			opsHandler(d.registry, d.notReady, d.degraded).ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
			return w.Code, w.Body.String()
		}
		metric := func(name string, value any) {
			t.Helper()
			if _, body := get("/metrics"); !strings.Contains(body, fmt.Sprintf("\n%s %v\n", name, value)) {
				t.Errorf("/metrics lacks %s %v:\n%s", name, value, body[strings.Index(body, "meshca_intermediate"):][:600])
			}
		}
		issue := func() error {
			_, err := d.serving.Renew(t.Context())
			return err
		}
		until := d.authority.IssuesUntil()
		if code, body := get("/readyz"); code != http.StatusOK || body != "ok\n" {
			t.Fatalf("at first /readyz says %d %q", code, body)
		}
		metric("meshca_upstream_up", 1)
		metric("meshca_upstream_failing_since_seconds", 0)

		upstream.away.Store(true)
		time.Sleep(4*time.Hour + time.Minute) // its renewal was due
		for left := time.Until(until); left > time.Minute; left = time.Until(until) {
			if err := issue(); err != nil {
				t.Fatalf("%s before the end: %v", left, err)
			}
			code, body := get("/readyz")
			want := fmt.Sprintf("issuance goes on until %s", until.UTC().Format(time.RFC3339))
			if code != http.StatusOK || !strings.HasPrefix(body, "ok\ndegraded: the upstream does not do what it is asked since ") || !strings.Contains(body, want) || !strings.Contains(body, "connection refused") {
				t.Fatalf("%s before the end /readyz says %d %q", left, code, body)
			}
			time.Sleep(min(time.Hour, left-30*time.Second))
		}
		metric("meshca_upstream_up", 0)
		metric("meshca_issuance_until_seconds", float64(until.Unix()))
		metric(fmt.Sprintf("meshca_intermediate_not_after_seconds{root=\"%.12s\"}", d.authority.Assignment().Root.ID), float64(d.authority.NotAfter().Unix()))
		st, err := d.status(t.Context())
		if err != nil || !st.GetReady() || len(st.GetDegraded()) != 1 || !st.GetIssuesUntil().AsTime().Equal(until) {
			t.Errorf("status: %v, %v", st, err)
		}

		time.Sleep(time.Until(until) + time.Second)
		if err := issue(); refusal.Of(err) != refusal.IssuerEnding {
			t.Errorf("in the intermediate's last minutes: %v", err)
		}
		if code, body := get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, string(refusal.IssuerEnding)) {
			t.Errorf("then /readyz says %d %q", code, body)
		}
		metric("meshca_issuance_until_seconds", 0)

		upstream.away.Store(false)
		time.Sleep(time.Minute)
		if err := issue(); err != nil {
			t.Errorf("the upstream is back: %v", err)
		}
		if code, body := get("/readyz"); code != http.StatusOK || body != "ok\n" {
			t.Errorf("in the end /readyz says %d %q", code, body)
		}
		metric("meshca_upstream_up", 1)
	})
}

// What counts as the upstream's failure, and what ends it.
func TestUpstreamHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		d := opened(t, configIn(t, dir, clusterIn(t, dir, "a", false)))
		failed := func(kind vault.Kind) error { return &vault.Fault{Kind: kind, What: "a call", Why: "it failed"} }
		began := time.Now()
		for _, c := range []struct {
			op   vault.Operation
			err  error
			down bool
		}{
			{vault.OpRead, failed(vault.KindDenied), true},
			{vault.OpRead, nil, false},
			{vault.OpList, nil, false},
			{vault.OpRead, failed(vault.KindMissing), false},
			{vault.OpList, failed(vault.KindCanceled), false},
			{vault.OpSign, failed(vault.KindDenied), false},
			{vault.OpList, failed(vault.KindMissing), true},
			{vault.OpRead, nil, true},
			{vault.OpList, failed(vault.KindSealed), true},
			{vault.OpRenew, failed(vault.KindUnreachable), true},
			{vault.OpList, nil, true},
			{vault.OpLogin, nil, false},
		} {
			d.upstreamCalled(vault.Call{Operation: c.op, Err: c.err})
			if o := d.health.longest(); (o.err != nil) != c.down {
				t.Errorf("%s, %v: failing %v", c.op, c.err, o.err)
			}
			time.Sleep(time.Second)
		}
		d.upstreamCalled(vault.Call{Operation: vault.OpRead, Err: failed(vault.KindDenied), Candidate: true})
		if o := d.health.longest(); o.err != nil {
			t.Errorf("an issuer that a policy for others denies is a failure: %v", o.err)
		}
		rely := time.Now()
		for range 3 { // what is read of others says nothing of the issuer that signs
			d.upstreamCalled(vault.Call{Operation: vault.OpRead})
			d.upstreamCalled(vault.Call{Operation: vault.OpRely, Err: failed(vault.KindDenied)})
			d.upstreamCalled(vault.Call{Operation: vault.OpRead})
			if o := d.health.longest(); o.err == nil || !o.since.Equal(rely) {
				t.Errorf("an issuer that signs is denied since %s, and told is %v since %s", rely, o.err, o.since)
			}
			time.Sleep(time.Minute)
		}
		d.upstreamCalled(vault.Call{Operation: vault.OpRely})
		for range 3 {
			d.health.answered("sign below x", failed(vault.KindTimeout))
			time.Sleep(time.Minute)
		}
		if o := d.health.longest(); !o.since.Equal(began.Add(12*time.Second + 3*time.Minute)) {
			t.Errorf("failing since %s", o.since)
		}
		d.health.forget("sign below x")
		if o := d.health.longest(); o.err != nil {
			t.Errorf("what is not asked for any more fails: %v", o.err)
		}
	})
}

// autoTrust: what appears at the upstream is trusted, logged and audited; without it nothing is.
func TestFoundRootsAreTrusted(t *testing.T) {
	for _, auto := range []bool{true, false} {
		dir := t.TempDir()
		d, upstream := onDistant(t, configIn(t, dir, clusterIn(t, dir, "a", false)))
		d.config.Upstream.Vault = &vault.Config{AutoTrust: auto}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); d.trustFound(ctx) }()
		made, err := upstream.Upstream.(rollout.Maker).NewIssuer(ctx)
		if err != nil {
			t.Fatal(err)
		}
		issuers, err := upstream.Issuers(ctx)
		if err != nil {
			t.Fatal(err)
		}
		_, stale := d.trust.Bundle()
		upstream.known.Set(issuers)
		if auto {
			<-stale
		}
		stop()
		<-ended
		bundle, _ := d.trust.Bundle()
		if bundle.HasX509Authority(made.Root) != auto {
			t.Errorf("autoTrust %v: trusted %v", auto, !auto)
		}
		if signs := d.authority.Assignment(); signs.Root.ID == made.Ref || signs.Share != 0 {
			t.Errorf("it signs: %+v", signs)
		}
		audit, err := os.ReadFile(d.config.Audit.File)
		if err != nil {
			t.Fatal(err)
		}
		line := fmt.Sprintf(`"verb":"ca trust found root","peer":"upstream.vault.autoTrust","root":"%s"`, made.Ref)
		if strings.Contains(string(audit), line) != auto {
			t.Errorf("autoTrust %v: the audit log\n%s", auto, audit)
		}
	}
}

// An extra anchor that was tainted stays out, and the CA starts all the same.
func TestATaintedAnchorStaysOut(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	other := disk.Files{Cert: dir + "/other.crt", Key: dir + "/other.key"}
	anchor, err := disk.Create(other, disk.CreateOptions{TrustDomain: c.trustDomain})
	if err != nil {
		t.Fatal(err)
	}
	c.Upstream.Disk.ExtraAnchors = []string{other.Cert}
	trusts := func(want bool) {
		t.Helper()
		d, err := open(t.Context(), c, slog.New(slog.DiscardHandler), io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		bundle, _ := d.trust.Bundle()
		if bundle.HasX509Authority(anchor) != want {
			t.Errorf("trusted %v", !want)
		}
		if want {
			if _, err := d.operator.Rotate(t.Context(), rollout.RotateOptions{Within: time.Minute, Tainted: ca.RootID(anchor)}); err != nil {
				t.Error(err)
			}
			for d.roller.Move(t.Context()) {
			}
		}
		if err := d.close(); err != nil {
			t.Error(err)
		}
	}
	trusts(true)
	trusts(false)
}

// The root that signs cannot any more, and the one that follows it waits to be confirmed: /readyz says whom for.
func TestReadyzTellsWhatARolloutWaitsFor(t *testing.T) {
	dir := t.TempDir()
	d, u := onDistant(t, configIn(t, dir, clusterIn(t, dir, "a", false)))
	if _, err := line(d).Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	made, err := u.Upstream.(rollout.Maker).NewIssuer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	d.bundleFile = &bundleFile{now: d.clock.Now, readers: []rollout.Reader{{Name: "r1"}, {Name: "r2"}, {Name: "r3"}, {Name: "r4"}, {Name: "r5"}}}
	if _, err := d.operator.Rotate(t.Context(), rollout.RotateOptions{By: "test", Issuer: made.Ref}); err != nil {
		t.Fatal(err)
	}
	for d.roller.Move(t.Context()) {
	}
	says := func() string { return strings.Join(d.notReady(), "\n") }
	if s := says(); strings.Contains(s, "signs for nobody") {
		t.Errorf("while the old root signs: %s", s)
	}
	line(d).Expired()
	for _, want := range []string{"is published and signs for nobody yet; it waits for reader bundleFile, reader r1, reader r2, reader r3, reader r4 and 1 more", "--despite", made.Ref[:16]} {
		if s := says(); !strings.Contains(s, want) {
			t.Errorf("/readyz says %q, not %q", s, want)
		}
	}
	if _, err := d.operator.Abort(t.Context(), "test"); err != nil {
		t.Fatal(err)
	}
	if s := says(); strings.Contains(s, "signs for nobody") {
		t.Errorf("aborted, with nothing to wait for: %s", s)
	}
}
