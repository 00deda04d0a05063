package main

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/pkcs11"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/ca/upstream/vault"
	"github.com/meshca/meshca/rotation"
)

// opens is a start of a CA, with what it logs.
func opens(t *testing.T, c *Config) (*daemon, *logged, error) {
	t.Helper()
	out := &logged{}
	d, err := open(t.Context(), c, slog.New(slog.NewJSONHandler(out, nil)), io.Discard)
	if err == nil {
		endWith(t, d)
	}
	return d, out, err
}

// rotates has a CA replace its root, to the end of the rollout.
func rotates(t *testing.T, d *daemon, o rollout.RotateOptions) rotation.Rollout {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	kept := make(chan struct{})
	go func() { defer close(kept); d.keepLines(ctx, func() {}) }()
	defer func() { stop(); <-kept }()
	if _, err := d.operator.Rotate(ctx, o); err != nil {
		t.Fatal(err)
	}
	for n := range 1000 {
		for d.roller.Move(ctx) {
		}
		r, _, err := d.store.Rollout(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if r.Step == rotation.StepOut {
			return r
		}
		time.Sleep(time.Duration(n) * 10 * time.Millisecond)
	}
	t.Fatalf("the rollout does not end: %+v", d.operator.Standing())
	return rotation.Rollout{}
}

// signsUnder wants that a CA gets an intermediate below a root, and signs.
func signsUnder(t *testing.T, d *daemon, root string) {
	t.Helper()
	l := line(d)
	if _, err := l.Renew(t.Context()); err != nil || l.Root().ID != root {
		t.Errorf("signs under %s (%v), want %s", l.Root().ID, err, root)
	}
	if _, err := d.serving.Renew(t.Context()); err != nil {
		t.Error(err)
	}
}

// A root is replaced because it is about to end. It ends, its key is taken away, all of it is: the CA starts on the
// configuration that it always had.
func TestAReplacedRootEndsAndIsTakenAway(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		c := configIn(t, dir, clusterIn(t, dir, "a", false))
		c.SVID.TTL.Duration, c.Intermediate.TTL.Duration = time.Hour, 8*time.Hour
		f := c.Upstream.Disk.files()
		for _, file := range []string{f.Cert, f.Key} {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
		old, err := disk.Create(f, disk.CreateOptions{TrustDomain: c.trustDomain, Life: 100 * time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		successor := disk.Files{Cert: filepath.Join(c.successors(), "next.crt"), Key: filepath.Join(c.successors(), "next.key")}
		next, err := disk.Create(successor, disk.CreateOptions{TrustDomain: c.trustDomain, Life: 10_000 * time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		d := opened(t, c)
		rotates(t, d, rollout.RotateOptions{By: "test", Issuer: ca.RootID(next)})
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
		starts := func(what string) {
			t.Helper()
			d, out, err := opens(t, c)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			signsUnder(t, d, ca.RootID(next))
			if _, told := out.find("the issuer that the configuration names cannot be used; another one signs, so the CA goes on", "err"); !told {
				t.Errorf("%s: it is not told:\n%s", what, out.b.String())
			}
			if b, _ := d.trust.Bundle(); len(b.X509Authorities()) != 1 || !b.HasX509Authority(next) {
				t.Errorf("%s: the bundle has %d roots", what, len(b.X509Authorities()))
			}
			for _, f := range d.checks(t.Context()) {
				if f.GetSubject() == rootKey && f.GetLevel() > 1 {
					t.Errorf("%s: %v", what, f)
				}
			}
			if err := d.close(); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Until(old.NotAfter) + time.Second)
		starts("ended")
		// An upstream may list it still, as Vault does.
		d, err = openOn(t.Context(), c, slog.New(slog.DiscardHandler), io.Discard, func(c *Config, tokens *pkcs11.Modules, log *slog.Logger, observe func(vault.Call)) (ca.Upstream, error) {
			up, err := openUpstream(c, tokens, log, observe)
			return edited{up, func(all []ca.UpstreamIssuer) []ca.UpstreamIssuer {
				listed := ca.UpstreamIssuer{Ref: "root-1", Root: old, NotAfter: old.NotAfter, Named: true, Fault: errors.New("its chain ended")}
				return append([]ca.UpstreamIssuer{listed}, all[1:]...)
			}}, err
		})
		if err != nil {
			t.Fatalf("listed with a fault: %v", err)
		}
		endWith(t, d)
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(f.Key); err != nil {
			t.Fatal(err)
		}
		starts("its key is gone")
		if err := os.Remove(f.Cert); err != nil {
			t.Fatal(err)
		}
		starts("all of it is gone")
		if err := os.Remove(successor.Key); err != nil {
			t.Fatal(err)
		}
		if _, _, err := opens(t, c); err == nil || !strings.Contains(err.Error(), ca.RootID(next)) || !strings.Contains(err.Error(), "certctl ca rotate root --issuer") {
			t.Errorf("the root that signs is gone: %v", err)
		}
		// What that says leads out.
		third, err := disk.Create(disk.Files{Cert: filepath.Join(c.successors(), "third.crt"), Key: filepath.Join(c.successors(), "third.key")}, disk.CreateOptions{TrustDomain: c.trustDomain})
		if err != nil {
			t.Fatal(err)
		}
		d, out, err := opens(t, c)
		if err != nil {
			t.Fatal(err)
		}
		if _, told := out.find("the root that signs cannot be used at the upstream: no further intermediate comes from it. Mend it, or go to another one with `certctl ca rotate root`", "err"); !told {
			t.Errorf("it is not told:\n%s", out.b.String())
		}
		rotates(t, d, rollout.RotateOptions{By: "test", Issuer: ca.RootID(third)})
		signsUnder(t, d, ca.RootID(third))
	})
}

// A key is destroyed by emptying its file, and nobody looks after files that are not used: no fault of theirs keeps the CA
// from starting, and the log says what each is.
func TestAReplacedRootIsDamaged(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	d := opened(t, c)
	next := rotates(t, d, rollout.RotateOptions{By: "test"}).New.ID
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	starts := func(log, why string) {
		t.Helper()
		d, out, err := opens(t, c)
		if err != nil {
			t.Fatalf("the CA does not start over a root that nobody uses: %v", err)
		}
		signsUnder(t, d, next)
		if said, told := out.find(log, "err"); !told || !strings.Contains(said, why) {
			t.Errorf("it is not told:\n%s", out.b.String())
		}
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
	}
	const named = "the issuer that the configuration names cannot be used; another one signs, so the CA goes on"
	f := c.Upstream.Disk.files()
	if err := os.Chmod(f.Key, 0o644); err != nil {
		t.Fatal(err)
	}
	starts(named, "chmod 600")
	for file, why := range map[string]string{f.Key: "", f.Cert: "the root's certificate"} {
		if err := os.Truncate(file, 0); err != nil {
			t.Fatal(err)
		}
		starts(named, why)
	}
	if err := os.WriteFile(filepath.Join(c.successors(), "stray.crt"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	starts("an issuer of the upstream cannot be used", "stray.crt")
	keys, err := filepath.Glob(filepath.Join(c.successors(), "root-*.key"))
	if err != nil || len(keys) != 1 {
		t.Fatal(keys, err)
	}
	if err := os.Truncate(keys[0], 0); err != nil {
		t.Fatal(err)
	}
	if _, _, err := opens(t, c); err == nil || !strings.Contains(err.Error(), "The root that signs has the SHA-256 "+next) || !strings.Contains(err.Error(), keys[0]) {
		t.Errorf("the key of the root that signs is empty, too: %v", err)
	}
}

// edited is an upstream whose issuers are others.
type edited struct {
	ca.Upstream
	edit func([]ca.UpstreamIssuer) []ca.UpstreamIssuer
}

func (u edited) Issuers(ctx context.Context) ([]ca.UpstreamIssuer, error) {
	all, err := u.Upstream.Issuers(ctx)
	return u.edit(all), err
}

// The root that signs has ended, and nobody replaced it: the CA starts, says so, and can be led to another one. A first
// start on such a root is none.
func TestTheRootThatSignsHasEnded(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		c := configIn(t, dir, clusterIn(t, dir, "a", false))
		d := opened(t, c)
		root := d.authority.Assignment().Root.ID
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(11 * 365 * 24 * time.Hour)
		d, _, err := opens(t, c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := line(d).Renew(t.Context()); err == nil || !strings.Contains(err.Error(), "certctl ca rotate root") {
			t.Errorf("an ended root: %v", err)
		}
		if why := strings.Join(d.notReady(), "\n"); !strings.Contains(why, "ended at") {
			t.Errorf("not ready for %s", why)
		}
		if r := rotates(t, d, rollout.RotateOptions{By: "test"}); r.Old.ID != root {
			t.Errorf("%+v", r)
		}
		signsUnder(t, d, d.authority.Assignment().Root.ID)
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(c.storePath()); err != nil {
			t.Fatal(err)
		}
		if _, _, err := opens(t, c); err == nil || !strings.Contains(err.Error(), "the first start needs the issuer that the configuration names") {
			t.Errorf("a first start: %v", err)
		}
	})
}

// A key that was taken off the disk is missed for as long as its root signs.
func TestAMissingKeyOfARootThatSigns(t *testing.T) {
	dir := t.TempDir()
	d := opened(t, configIn(t, dir, clusterIn(t, dir, "a", false)))
	if err := os.Remove(d.config.Upstream.Disk.KeyFile); err != nil {
		t.Fatal(err)
	}
	for _, f := range d.checks(t.Context()) {
		if f.GetSubject() == rootKey && !strings.Contains(f.GetDetail(), "no such file") {
			t.Errorf("%v", f)
		}
	}
}

// Roots that the upstream has and nobody asked for are no fault, at the start or later.
func TestCandidatesAreNoFault(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	d := opened(t, c)
	rotates(t, d, rollout.RotateOptions{By: "test"})
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	d = opened(t, c)
	for _, f := range d.checks(t.Context()) {
		if strings.Contains(f.GetDetail()+f.GetHint(), "trust bundle") || strings.Contains(f.GetHint(), "extraAnchors") {
			t.Errorf("%v", f)
		}
	}
}

// namedAs is a start at which the configuration names another issuer of the same upstream.
func namedAs(t *testing.T, c *Config, ref string) (*daemon, *logged) {
	t.Helper()
	out := &logged{}
	d, err := openOn(t.Context(), c, slog.New(slog.NewJSONHandler(out, nil)), io.Discard, func(c *Config, tokens *pkcs11.Modules, log *slog.Logger, observe func(vault.Call)) (ca.Upstream, error) {
		up, err := openUpstream(c, tokens, log, observe)
		return edited{up, func(all []ca.UpstreamIssuer) []ca.UpstreamIssuer {
			for i := range all {
				all[i].Named = all[i].Ref == ref
			}
			return all
		}}, err
	})
	if err != nil {
		t.Fatal(err)
	}
	endWith(t, d)
	return d, out
}

// The configuration is made to name another issuer: that is trusted, signs for nobody, and the log says what to do. What
// was replaced or tainted is not trusted again because it is named still.
func TestTheConfigurationNamesAnotherIssuer(t *testing.T) {
	const says = "the configuration names this issuer, and another one signs. Its root is trusted, and it signs for nobody before `certctl ca rotate root --issuer` goes to it"
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	d := opened(t, c)
	first := d.authority.Assignment().Root
	made, err := d.upstream.(rollout.Maker).NewIssuer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	d, out := namedAs(t, c, made.Ref)
	b, _ := d.trust.Bundle()
	if !b.HasX509Authority(made.Root) || d.authority.Assignment() != (ca.Assignment{Root: first}) {
		t.Errorf("trusted %v, and %+v", b.HasX509Authority(made.Root), d.authority.Assignment())
	}
	if issuer, told := out.find(says, "issuer"); !told || issuer != made.Ref {
		t.Errorf("it is not told:\n%s", out.b.String())
	}
	rotates(t, d, rollout.RotateOptions{By: "test", Issuer: made.Ref})
	if err := d.close(); err != nil {
		t.Fatal(err)
	}
	d, out = namedAs(t, c, first.Ref)
	if b, _ := d.trust.Bundle(); !slices.EqualFunc(b.X509Authorities(), []*x509.Certificate{made.Root}, (*x509.Certificate).Equal) {
		t.Errorf("%d roots are trusted", len(b.X509Authorities()))
	}
	if _, told := out.find(says, "issuer"); told {
		t.Error("it is told that what was replaced is trusted")
	}
}

// The named issuer's root is not known any more, and the upstream has a candidate: the CA goes on with what it knows.
func TestTheNamedRootIsNotKnown(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	if err := opened(t, c).close(); err != nil {
		t.Fatal(err)
	}
	other, err := disk.Create(disk.Files{Cert: filepath.Join(dir, "o.crt"), Key: filepath.Join(dir, "o.key")}, disk.CreateOptions{TrustDomain: c.trustDomain})
	if err != nil {
		t.Fatal(err)
	}
	d, err := openOn(t.Context(), c, slog.New(slog.DiscardHandler), io.Discard, func(c *Config, tokens *pkcs11.Modules, log *slog.Logger, observe func(vault.Call)) (ca.Upstream, error) {
		up, err := openUpstream(c, tokens, log, observe)
		return edited{up, func(all []ca.UpstreamIssuer) []ca.UpstreamIssuer {
			all[0].Root, all[0].Fault = nil, errors.New("the self-signed end of the chain is not known")
			return append(all, ca.UpstreamIssuer{Ref: "candidate", Root: other, NotAfter: other.NotAfter})
		}}, err
	})
	if err != nil {
		t.Fatal(err)
	}
	endWith(t, d)
	if b, _ := d.trust.Bundle(); b.HasX509Authority(other) || len(b.X509Authorities()) != 1 {
		t.Error("the candidate is trusted")
	}
}

// What the refusal of an unknown root says leads to that root, in the same upstream and in another one.
func TestTheWayToAnotherRoot(t *testing.T) {
	for _, elsewhere := range []bool{false, true} {
		dir := t.TempDir()
		c := configIn(t, dir, clusterIn(t, dir, "a", false))
		old := *c.Upstream.Disk
		files := disk.Files{Cert: filepath.Join(dir, "other.crt"), Key: filepath.Join(dir, "other.key")}
		if !elsewhere {
			files = disk.Files{Cert: filepath.Join(c.successors(), "other.crt"), Key: filepath.Join(c.successors(), "other.key")}
		}
		d := opened(t, c)
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
		root, err := disk.Create(files, disk.CreateOptions{TrustDomain: c.trustDomain})
		if err != nil {
			t.Fatal(err)
		}
		c.Upstream.Disk.CertFile, c.Upstream.Disk.KeyFile = files.Cert, files.Key
		if _, _, err := opens(t, c); !errors.Is(err, ca.ErrRootUnknown) || !strings.Contains(err.Error(), "certctl ca rotate root --issuer") || !strings.Contains(err.Error(), "certctl ca root import") {
			t.Fatalf("another root: %v", err)
		}
		*c.Upstream.Disk = old
		d = opened(t, c)
		if elsewhere {
			if _, err := d.operator.TrustRoots(t.Context(), []*x509.Certificate{root}); err != nil {
				t.Fatal(err)
			}
			if err := d.close(); err != nil {
				t.Fatal(err)
			}
			c.Upstream.Disk.CertFile, c.Upstream.Disk.KeyFile = files.Cert, files.Key
			d = opened(t, c)
		}
		rotates(t, d, rollout.RotateOptions{By: "test", Issuer: ca.RootID(root)})
		signsUnder(t, d, ca.RootID(root))
		// And once it signs, the configuration may name it where it lies.
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
		c.Upstream.Disk.CertFile, c.Upstream.Disk.KeyFile = files.Cert, files.Key
		d = opened(t, c)
		signsUnder(t, d, ca.RootID(root))
	}
}
