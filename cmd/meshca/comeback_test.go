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
	"slices"
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
	// told is what `meshca restore` said.
	told string
}

// comesBack takes a backup of a store with a rollout in this step, with both roots and an anchor in the bundle and an agent in
// the book, and restores it over a store that knows more: of this root that it was tainted, and that it has left or is about to.
func comesBack(t *testing.T, backup rotation.Rollout, tainted func(c *comeback) rotation.Party, left bool) (*comeback, rotation.Party) {
	t.Helper()
	dir := t.TempDir()
	config := configIn(t, dir, clusterIn(t, dir, "a", false))
	config.BundleFile = filepath.Join(dir, "public", "bundle.json")
	holds(t, config, time.Hour)
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
		*p = rotation.Party{ID: ca.RootID(made.Root), Ref: made.Ref, Key: ca.KeyOf(made.Root)}
		if p == &c.next && backup.Step == rotation.StepChosen {
			continue // nobody knows it yet
		}
		if err := d.trust.AddRoots(t.Context(), made.Root); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	backup.Old, backup.New, backup.Begun, backup.Entered, backup.LastEnd, backup.Canary = c.old, c.next, now, now, now, backup.NewShare%100
	later := rotation.Rollout{New: c.other, Step: rotation.StepOut, NewShare: 100, Begun: now, Entered: now}
	stolen := tainted(c)
	if stolen.ID != "" {
		later.Taints = []rotation.Taint{{ID: stolen.ID, Key: stolen.Key, At: now, By: "op"}}
	}
	if left {
		later.Gone = []string{stolen.ID}
	}
	file := filepath.Join(dir, "backup")
	if err := d.store.SwapRollout(t.Context(), version, backup); err != nil {
		t.Fatal(err)
	}
	backsUp(t, d, file)
	if err := errors.Join(d.store.SwapRollout(t.Context(), version+1, later), d.close()); err != nil {
		t.Fatal(err)
	}
	var told strings.Builder
	if err := restore(t.Context(), &told, config, restoreFlags{replace: true, acceptRollback: true}, file); err != nil {
		t.Fatal(err)
	}
	c.daemon, c.told = opened(t, config), told.String()
	return c, stolen
}

// backsUp takes a backup of a CA's store.
func backsUp(t *testing.T, d *daemon, file string) {
	t.Helper()
	made, err := d.backup(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(f, made)
	if err := errors.Join(err, made.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
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

// The steps that a backup can stand in, and who signs when it has been restored: where none of the roots was tainted since,
// where the old one of the rollout was, and where the new one was. "an order": nobody does before an operator names another one.
var backups = []struct {
	rotation.Rollout
	neither, old, next string
}{
	{rotation.Rollout{Step: rotation.StepChosen}, "old", "next", "old"},
	{rotation.Rollout{Step: rotation.StepPublished}, "old", "next", "old"},
	{rotation.Rollout{Step: rotation.StepConfirmed}, "next", "next", "old"},
	{rotation.Rollout{Step: rotation.StepCanary, NewShare: 5}, "old", "next", "old"},
	{rotation.Rollout{Step: rotation.StepSigning, NewShare: 100}, "next", "next", "old"},
	{rotation.Rollout{Step: rotation.StepRetired, NewShare: 100}, "next", "next", "old"},
	{rotation.Rollout{Step: rotation.StepLeaving, NewShare: 100}, "next", "next", "an order"},
	{rotation.Rollout{Step: rotation.StepConfirmed, Aborted: true, NewShare: 5}, "old", "next", "old"},
	{rotation.Rollout{Step: rotation.StepSigning, Aborted: true}, "old", "next", "old"},
	{rotation.Rollout{Step: rotation.StepRetired, Aborted: true}, "old", "next", "old"},
	{rotation.Rollout{Step: rotation.StepLeaving, Aborted: true}, "old", "an order", "old"},
}

// Whatever step a backup is of, and whichever root was tainted since: the CA comes to sign by itself, under another root than
// that, or says what it takes. Nobody is told again of one that had left.
func TestWhoSignsByABackup(t *testing.T) {
	for _, b := range backups {
		for _, tt := range []struct {
			tainted string
			of      func(c *comeback) rotation.Party
			signs   string
		}{
			{"neither", func(*comeback) rotation.Party { return rotation.Party{} }, b.neither},
			{"an anchor", func(c *comeback) rotation.Party { return c.other }, b.neither},
			{"old", func(c *comeback) rotation.Party { return c.old }, b.old},
			{"next", func(c *comeback) rotation.Party { return c.next }, b.next},
		} {
			for _, left := range []bool{true, false} {
				if tt.tainted == "neither" && left {
					continue
				}
				t.Run(fmt.Sprintf("%s/%d/aborted %v/%s is tainted/it had left %v", b.Step, b.NewShare, b.Aborted, tt.tainted, left), func(t *testing.T) {
					t.Parallel()
					c, stolen := comesBack(t, b.Rollout, tt.of, left)
					if left && has(c.daemon, stolen.ID) {
						c.held()
					}
					c.barredSays(tt.signs)
					c.run()
					if tt.signs == "an order" {
						c.needsAnOrder(stolen)
					} else {
						signs := map[string]rotation.Party{"old": c.old, "next": c.next}[tt.signs]
						c.moves("does it sign", func() bool { return c.authority.Assignment().Root.ID == signs.ID && c.renews() })
					}
					if left {
						c.moves("is it out", func() bool { return !has(c.daemon, stolen.ID) })
					}
					c.moves("is the bundle file there", func() bool { _, err := os.Stat(c.config.BundleFile); return c.mayTell() == nil && err == nil })
					c.wentOn(b.Rollout, tt.tainted, left)
				})
			}
		}
	}
}

// Both roots of a restored rollout were tainted: the CA names the order that leads out, and that one does.
func TestBothRootsOfABackupAreTainted(t *testing.T) {
	c, stolen := comesBack(t, rotation.Rollout{Step: rotation.StepPublished}, func(c *comeback) rotation.Party { return c.old }, true)
	if _, err := c.roller.Change(t.Context(), func(r rotation.Rollout) (rotation.Rollout, error) {
		r.Taints = append(r.Taints, rotation.Taint{ID: c.next.ID, Key: c.next.Key, By: "op"})
		return r, nil
	}); err != nil {
		t.Fatal(err)
	}
	c.run()
	for c.roller.Move(t.Context()) {
	}
	order := "`certctl ca taint root " + c.next.ID + " --issuer REF`"
	if why := strings.Join(c.notReady(), "\n"); !strings.Contains(why, order) || c.mayTell() == nil && has(c.daemon, stolen.ID) {
		t.Errorf("it may tell (%v), and is not ready for %q, want %s", c.mayTell(), why, order)
	}
	o := rollout.RotateOptions{By: "test", Within: 20 * time.Second, Tainted: c.next.ID, Issuer: c.other.ID}
	if _, err := c.operator.Rotate(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	c.moves("does the third one sign", func() bool { return c.authority.Assignment().Root.ID == c.other.ID && c.renews() })
	if has(c.daemon, stolen.ID) {
		t.Error("what had left is in the bundle")
	}
}

// renews reports whether the CA can sign, for itself first.
func (c *comeback) renews() bool {
	_, err := c.serving.Renew(c.t.Context())
	return err == nil && !slices.ContainsFunc(c.notReady(), func(why string) bool { return !strings.HasPrefix(why, "cluster ") })
}

// barredSays wants a CA whose signing root must not sign to say what leads out, as `meshca restore` did.
func (c *comeback) barredSays(signs string) {
	c.t.Helper()
	r := c.operator.Standing().Rollout
	if r.Barred(r.Signer().ID) == nil {
		return
	}
	says := "The rollout brings in the root " + map[string]string{"old": c.old.ID, "next": c.next.ID}[signs] + " by itself"
	if signs == "an order" {
		says = "`certctl ca taint root --issuer REF` brings in another"
	}
	if why := strings.Join(c.notReady(), "\n"); !strings.Contains(why, says) || !strings.Contains(why, "ROOT_TAINTED") || !strings.Contains(c.told, says) {
		c.t.Errorf("not ready for %q; the restore said\n%s\nwant %q", why, c.told, says)
	}
	for c.roller.Move(c.t.Context()) { // to where an intermediate is needed, which nobody keeps yet
	}
	r = c.operator.Standing().Rollout
	if why := strings.Join(c.notReady(), "\n"); signs != "an order" && !r.Signs(r.Stays().ID) && !strings.Contains(why, "is confirmed and signs for nobody yet; its last try failed: ISSUER_NOT_READY") {
		c.t.Errorf("it is %s, and not ready for %q", r.Step, why)
	}
}

// wentOn wants a rollout to wait for what a restored one waits for.
func (c *comeback) wentOn(backup rotation.Rollout, tainted string, left bool) {
	c.t.Helper()
	s := c.operator.Standing()
	until, err := c.unrecorded(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	switch {
	case tainted != "neither" && tainted != "an anchor":
		if left && s.Rollout.Active() {
			c.t.Errorf("it is %+v", s)
		}
	case backup.Step == rotation.StepChosen || backup.Step == rotation.StepPublished:
		if s.Rollout.Step != rotation.StepPublished || !slices.Equal(s.Waits, []string{"spiffe://mesh.test/meshca/agent/a/node1", "reader agents-since-the-backup", "reader bundleFile"}[:len(s.Waits)]) || len(s.Waits) < 2 {
			c.t.Errorf("it is %s and waits for %q", s.Rollout.Step, s.Waits)
		}
	case backup.Step == rotation.StepConfirmed && backup.NewShare == 0, backup.Step == rotation.StepSigning, backup.Step == rotation.StepRetired:
		if s.Rollout.Step != rotation.StepRetired || s.Until.Before(until) || s.Until.After(until.Add(time.Minute)) {
			c.t.Errorf("it is %s, until %s; certificates that nobody knows of may live until %s", s.Rollout.Step, s.Until, until)
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
	c.moves("is it out", func() bool {
		if s := c.operator.Standing(); len(s.Waits) > 0 && s.Rollout.Step == rotation.StepPublished { // the CA signs nothing, and says until when
			if why := strings.Join(c.notReady(), "\n"); !strings.Contains(why, ", until "+s.Until.UTC().Format(time.RFC3339)+" at the latest") {
				c.t.Errorf("it waits for %q until %s, and is not ready for %q", s.Waits, s.Until, why)
			}
		}
		return !c.operator.Standing().Rollout.Active() && !has(c.daemon, stolen.ID) && c.renews()
	})
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
