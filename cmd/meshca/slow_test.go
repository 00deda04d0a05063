package main

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/ca/upstream/vault"
)

// probed is for how long the chart's startup probe waits for /livez, which is listened for after the start.
const probed = 2 * time.Minute

// An upstream that gives no answer does not keep a CA from its start that has signed before, with an intermediate that is
// kept or without.
func TestASlowUpstreamDoesNotKeepTheCADown(t *testing.T) {
	for _, kept := range []string{inDisk, inMemory} {
		t.Run(kept, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				c := configIn(t, dir, clusterIn(t, dir, "a", false))
				c.Intermediate.Key.In = kept
				first := opened(t, c)
				if _, err := line(first).Renew(t.Context()); err != nil {
					t.Fatal(err)
				}
				if err := first.close(); err != nil {
					t.Fatal(err)
				}
				u := &distant{}
				u.slow.Store(true)
				began := time.Now()
				d, err := u.opens(t, c, io.Discard)
				if took := time.Since(began); err != nil || took > probed/2 {
					t.Fatalf("%v after %s", err, took)
				}
				u.away.Store(true)
				_, err = line(d).Renew(t.Context())
				if ready := d.issuer.Ready(); kept == inDisk && (err != nil || ready != nil) {
					t.Errorf("with the intermediate that is kept: %v, %v", err, ready)
				} else if kept == inMemory && (ready == nil || !strings.Contains(ready.Error(), "connection refused")) {
					t.Errorf("without one it is not told what the upstream said: %v", ready)
				}
			})
		})
	}
}

// The first start needs the upstream, and says so before it is killed.
func TestAFirstStartOnASlowUpstream(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		c := configIn(t, dir, clusterIn(t, dir, "a", false))
		u := &distant{}
		u.slow.Store(true)
		began := time.Now()
		_, err := u.opens(t, c, io.Discard)
		if err == nil || !strings.Contains(err.Error(), "the first start needs the upstream") || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		if took := time.Since(began); took >= probed {
			t.Errorf("it took %s", took)
		}
		u.slow.Store(false)
		d, err := u.opens(t, c, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := d.trust.Bundle(); len(b.X509Authorities()) != 1 {
			t.Errorf("then the bundle has %d roots", len(b.X509Authorities()))
		}
	})
}

// What the upstream did not tell at the start counts when a poll has heard it: the issuer that the configuration names is
// trusted, unless this is another upstream altogether.
func TestWhatASlowUpstreamTellsLater(t *testing.T) {
	for name, c := range map[string]struct {
		slow, other, auto bool
		trusted           int
		says              string
	}{
		"slow":               {slow: true, trusted: 2, says: "Its root is trusted, and it signs for nobody"},
		"told at the start":  {trusted: 2, says: "Its root is trusted, and it signs for nobody"},
		"another upstream":   {slow: true, other: true, trusted: 1, says: "the bundle of mesh.test (sequence 946684800) does not hold it"},
		"another, autoTrust": {slow: true, other: true, auto: true, trusted: 1, says: "the bundle of mesh.test (sequence 946684800) does not hold it"},
		"slow, autoTrust":    {slow: true, auto: true, trusted: 3, says: "Its root is trusted, and it signs for nobody"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				config := configIn(t, dir, clusterIn(t, dir, "a", false))
				if err := opened(t, config).close(); err != nil {
					t.Fatal(err)
				}
				out, u := &logged{}, &distant{}
				u.slow.Store(c.slow)
				d, err := u.opens(t, config, out)
				if err != nil {
					t.Fatal(err)
				}
				issuers, err := u.Upstream.Issuers(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				issuers[0].Named = false
				for i := range 2 {
					made, err := u.Upstream.(rollout.Maker).NewIssuer(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					made.Named = i == 0
					time.Sleep(time.Second) // for the next one's name
					issuers = append([]ca.UpstreamIssuer{made}, issuers...)
				}
				if c.other {
					issuers = issuers[:2]
				}
				d.config.Upstream.Vault = nil
				if c.auto {
					d.config.Upstream.Vault = &vault.Config{AutoTrust: true}
				}
				ctx, stop := context.WithCancel(t.Context())
				ended := make(chan struct{})
				go func() { defer close(ended); d.trustFound(ctx) }()
				time.Sleep(time.Minute)
				u.known.Set(issuers)
				time.Sleep(5 * time.Minute)
				stop()
				<-ended
				b, _ := d.trust.Bundle()
				if len(b.X509Authorities()) != c.trusted {
					t.Errorf("%d roots are trusted, want %d", len(b.X509Authorities()), c.trusted)
				}
				if c.trusted == 2 && !b.HasX509Authority(named(issuers)) {
					t.Error("another one than the configuration names is trusted")
				}
				if n := strings.Count(out.b.String(), c.says); c.says != "" && n != 1 {
					t.Errorf("%q is told %d times:\n%s", c.says, n, out.b.String())
				}
			})
		})
	}
}

// The issuer that the configuration names may appear, or be mended, long after a start that the upstream has answered. Its root
// is trusted when a poll shows that, once, and not when somebody has taken it out since.
func TestANamedIssuerThatIsMendedLater(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		out, u := &logged{}, &distant{}
		d, err := u.opens(t, configIn(t, dir, clusterIn(t, dir, "a", false)), out)
		if err != nil {
			t.Fatal(err)
		}
		signs, err := u.Upstream.Issuers(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		signs[0].Named = false
		made, err := u.Upstream.(rollout.Maker).NewIssuer(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		made.Named = true
		d.config.Upstream.Vault = &vault.Config{}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); d.trustFound(ctx) }()
		polls := func(what string, trusted bool, all ...ca.UpstreamIssuer) {
			t.Helper()
			u.known.Set(all)
			time.Sleep(5 * time.Minute)
			if b, _ := d.trust.Bundle(); b.HasX509Authority(made.Root) != trusted {
				t.Errorf("%s: trusted %v", what, !trusted)
			}
		}
		spoilt := made
		spoilt.Fault = errors.New("the mount has no key for it")
		polls("it is not there", false, ca.UpstreamIssuer{Name: "next", Named: true, Fault: errors.New("the mount has none")}, signs[0])
		polls("it cannot be used", false, spoilt, signs[0])
		polls("mended", true, made, signs[0])
		polls("spoilt again", true, spoilt, signs[0])
		polls("and mended", true, made, signs[0])
		if n := strings.Count(out.b.String(), "Its root is trusted, and it signs for nobody"); n != 1 {
			t.Errorf("it is told %d times", n)
		}
		if err := d.operator.RemoveRoot(ctx, ca.RootID(made.Root)); err != nil {
			t.Fatal(err)
		}
		polls("it was taken out", false, made, signs[0])
		polls("and appears anew", false, signs[0])
		polls("and appears anew", false, made, signs[0])
		if signing := d.authority.Assignment(); signing.Root.Ref != signs[0].Ref || signing.Share != 0 {
			t.Errorf("it signs: %+v", signing)
		}
		stop()
		<-ended
	})
}

func named(issuers []ca.UpstreamIssuer) *x509.Certificate {
	for _, i := range issuers {
		if i.Named {
			return i.Root
		}
	}
	return nil
}
