package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/rotation"
)

// has reports whether a root is in the CA's trust bundle.
func has(d *daemon, id string) bool {
	bundle, _ := d.trust.Bundle()
	for _, c := range bundle.X509Authorities() {
		if ca.RootID(c) == id {
			return true
		}
	}
	return false
}

// comeback is a CA whose store was put back from a backup of amid a rollout.
type comeback struct {
	*daemon
	t                *testing.T
	old, next, other rotation.Party
}

// comesBack puts a rollout into the journal as a backup of a step has it, with both roots and an anchor in the bundle, and
// restores it over a store that knows of one of them that it was tainted and has left.
func comesBack(t *testing.T, backup rotation.Rollout, tainted func(c *comeback) rotation.Party) (*comeback, rotation.Party) {
	t.Helper()
	dir := t.TempDir()
	config := configIn(t, dir, clusterIn(t, dir, "a", false))
	config.BundleFile = filepath.Join(dir, "public", "bundle.json")
	d, err := open(t.Context(), config, slog.New(slog.DiscardHandler), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	journal, version, err := d.store.Rollout(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := &comeback{t: t, old: journal.New}
	for _, p := range []*rotation.Party{&c.next, &c.other} {
		made, err := d.upstream.(rollout.Maker).NewIssuer(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		*p = rotation.Party{ID: ca.RootID(made.Root), Ref: made.Ref, Key: rollout.KeyOf(made.Root)}
		if p == &c.next && backup.Step == rotation.StepChosen {
			continue // nobody knows it yet
		}
		if err := d.trust.AddRoots(t.Context(), made.Root); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	backup.Old, backup.New, backup.Begun, backup.Entered, backup.LastEnd, backup.Canary = c.old, c.next, now, now, now.Add(6*time.Hour), backup.NewShare%100
	stolen := tainted(c)
	later := rotation.Rollout{Taints: []rotation.Taint{{ID: stolen.ID, Key: stolen.Key, At: now, By: "op"}}, Gone: []string{stolen.ID}}
	if err := errors.Join(d.store.SwapRollout(t.Context(), version, backup.Inherit(later, now)), d.close()); err != nil {
		t.Fatal(err)
	}
	c.daemon = opened(t, config)
	return c, stolen
}

// run runs what keeps the CA going, without the roller, until the test ends.
func (c *comeback) run() {
	ctx, stop := context.WithCancel(c.t.Context())
	var running sync.WaitGroup
	running.Go(func() { c.keepLines(ctx, func() {}) })
	running.Go(func() { c.bundleFile.keep(ctx) })
	c.t.Cleanup(func() { stop(); running.Wait() })
}

// moves has the roller go on until this is so.
func (c *comeback) moves(what string, so func() bool) {
	c.t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		for c.roller.Move(c.t.Context()) {
		}
		if so() {
			return
		}
		if time.Now().After(end) {
			c.t.Fatalf("never %s: %+v, not ready for %q", what, c.operator.Standing(), c.notReady())
		}
	}
}

// Whatever part a root has in the rollout of a backup that was tainted since and has left: nobody is told of it again, the CA
// says so, and brings the rollout to its end without it.
func TestNobodyIsToldOfWhatABackupBringsBack(t *testing.T) {
	old := func(c *comeback) rotation.Party { return c.old }
	next := func(c *comeback) rotation.Party { return c.next }
	anchor := func(c *comeback) rotation.Party { return c.other }
	for _, backup := range []rotation.Rollout{
		{Step: rotation.StepChosen},
		{Step: rotation.StepPublished},
		{Step: rotation.StepConfirmed},
		{Step: rotation.StepCanary, NewShare: 5},
		{Step: rotation.StepSigning, NewShare: 100},
		{Step: rotation.StepRetired, NewShare: 100},
		{Step: rotation.StepLeaving, NewShare: 100},
		{Step: rotation.StepConfirmed, NewShare: 5, Aborted: true},
		{Step: rotation.StepSigning, Aborted: true},
		{Step: rotation.StepRetired, Aborted: true},
		{Step: rotation.StepLeaving, Aborted: true},
	} {
		for role, of := range map[string]func(c *comeback) rotation.Party{"old": old, "new": next, "anchor": anchor} {
			t.Run(fmt.Sprintf("%s/%d/%v/%s", backup.Step, backup.NewShare, backup.Aborted, role), func(t *testing.T) {
				c, stolen := comesBack(t, backup, of)
				if has(c.daemon, stolen.ID) {
					c.held()
				}
				c.run()
				if r := c.operator.Standing().Rollout; r.Step == rotation.StepLeaving && stolen == r.Stays() {
					c.needsAnOrder(stolen)
					return
				}
				c.moves("is it out", func() bool { return !has(c.daemon, stolen.ID) && c.mayTell() == nil })
				if role == "anchor" { // the rollout goes on as it would
					return
				}
				c.moves("is the rollout over", func() bool { return !c.operator.Standing().Rollout.Active() && !c.authority.NotAfter().IsZero() })
				if why, signs := strings.Join(c.notReady(), "\n"), c.authority.Assignment(); strings.Contains(why, "ROOT_TAINTED") || signs.Root.ID == stolen.ID || signs.Share > 0 {
					t.Errorf("%+v, and it is not ready for %q", signs, why)
				}
				c.moves("is the bundle file there", func() bool { _, err := os.Stat(c.config.BundleFile); return err == nil })
			})
		}
	}
}

// held wants a CA that was just opened to tell nobody of the bundle, and to say so.
func (c *comeback) held() {
	c.t.Helper()
	if why := strings.Join(c.notReady(), "\n"); refusal.Of(c.mayTell()) != refusal.BundleHeld || !strings.Contains(why, "ROOT_TAINTED") {
		c.t.Errorf("it may tell (%v), and is not ready for %q", c.mayTell(), why)
	}
}

// needsAnOrder wants a CA to stay with the only root that signs, though that was tainted, to say so, and to leave it by an order.
func (c *comeback) needsAnOrder(stolen rotation.Party) {
	c.t.Helper()
	for c.roller.Move(c.t.Context()) {
	}
	c.held()
	if why := strings.Join(c.notReady(), "\n"); !has(c.daemon, stolen.ID) || !strings.Contains(why, "certctl ca taint root --issuer") {
		c.t.Errorf("it is in the bundle: %v; not ready for %q", has(c.daemon, stolen.ID), why)
	}
	patient, cancel := context.WithTimeout(c.t.Context(), 10*time.Second)
	defer cancel()
	if _, err := c.operator.RotateIntermediate(patient, time.Minute); refusal.Of(err) != refusal.RootTainted {
		c.t.Errorf("its intermediate, which nobody keeps, is not replaced: %v", err)
	}
	if _, err := c.operator.Rotate(c.t.Context(), rollout.RotateOptions{By: "test", Within: 20 * time.Second}); err != nil {
		c.t.Fatal(err)
	}
	c.moves("is it out", func() bool { return !has(c.daemon, stolen.ID) && c.mayTell() == nil })
}

// The store is an old one, of amid a rollout. The root that was coming is tainted, as it was in the past that is lost, and an
// anchor: whoever is told of the bundle after that was accepted is told of neither.
func TestWhatIsTaintedAmidARolloutLeavesBeforeALossIsAccepted(t *testing.T) {
	for _, step := range []rotation.Step{rotation.StepChosen, rotation.StepPublished, rotation.StepConfirmed} {
		dir := t.TempDir()
		config := configIn(t, dir, clusterIn(t, dir, "a", false))
		holds(t, config, time.Hour)
		d, err := open(t.Context(), config, slog.New(slog.DiscardHandler), io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		anchor, err := disk.Create(disk.Files{Cert: dir + "/other.crt", Key: dir + "/other.key"}, disk.CreateOptions{TrustDomain: config.trustDomain})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.operator.TrustRoots(t.Context(), []*x509.Certificate{anchor}); err != nil {
			t.Fatal(err)
		}
		r, err := d.operator.Rotate(t.Context(), rollout.RotateOptions{By: "test"})
		if err != nil {
			t.Fatal(err)
		}
		for d.roller.Move(t.Context()) {
		}
		_, err = d.roller.Change(t.Context(), func(r rotation.Rollout) (rotation.Rollout, error) { r.Step = step; return r, nil })
		lost := d.store.PutLoss(t.Context(), ca.Loss{Mark: ca.Mark{Generation: 99, Bundle: 99}, Agent: "an agent"})
		if err := errors.Join(err, lost, d.close()); err != nil {
			t.Fatal(err)
		}
		d = opened(t, config)
		if !has(d, r.New.ID) || refusal.Of(d.mayTell()) != refusal.CARolledBack {
			t.Fatalf("%s: it may tell: %v", step, d.mayTell())
		}
		tainted := []string{ca.RootID(anchor), r.New.ID}
		if step == rotation.StepChosen {
			tainted = tainted[:1] // the rollout stays where it is
		}
		for _, id := range tainted {
			if _, err := d.operator.Rotate(t.Context(), rollout.RotateOptions{By: "test", Within: 20 * time.Second, Tainted: id}); err != nil {
				t.Fatal(err)
			}
		}
		sequence, err := accepting{d.continuity, d.roller}.Accept(t.Context(), 0)
		if err != nil || d.mayTell() != nil || !has(d, r.Old.ID) {
			t.Errorf("%s: %v, %v", step, err, d.mayTell())
		}
		for _, id := range tainted {
			if has(d, id) {
				t.Errorf("%s: bundle %d is told, and has %s", step, sequence, id)
			}
		}
	}
}
