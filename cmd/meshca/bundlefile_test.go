package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// The bundle file cannot be written while a root is published: it is tried until it can, and told, and the root signs for
// nobody before the file's readers have had their time with it.
func TestABundleFileThatCannotBeWritten(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		c := configIn(t, dir, clusterIn(t, dir, "a", false))
		public := filepath.Join(dir, "public")
		c.BundleFile = filepath.Join(public, "bundle.json")
		c.Readers = []ReaderConfig{{Name: "mirror", Refresh: metav1.Duration{Duration: time.Minute}}}
		d := signing(t, c)
		go d.bundleFile.keep(t.Context())
		synctest.Wait()
		before := fileHolds(t, d)
		if s := d.degraded(); len(s) != 0 {
			t.Fatalf("degraded: %q", s)
		}

		// The directory is away.
		if err := errors.Join(os.Rename(public, public+".away"), os.WriteFile(public, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		go d.keepLines(t.Context(), func() {})
		go d.roller.Run(t.Context())
		if _, err := d.operator.Rotate(t.Context(), rollout.RotateOptions{By: "test"}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		waits := func(step rotation.Step, names ...string) {
			t.Helper()
			if s := d.operator.Standing(); s.Rollout.Step != step || strings.Join(s.Waits, ",") != strings.Join(names, ",") {
				t.Fatalf("it is %s and waits for %q, want %s and %q", s.Rollout.Step, s.Waits, step, names)
			}
		}
		waits(rotation.StepPublished, "reader bundleFile", "reader mirror")
		bundle, _ := d.trust.Bundle()
		lacks, _ := bundle.SequenceNumber()
		if s := d.degraded(); len(s) != 1 || !strings.Contains(s[0], fmt.Sprintf("the bundle file lacks trust bundle %d since ", lacks)) {
			t.Errorf("degraded: %q", s)
		}
		v, err := d.operator.View(t.Context())
		if err != nil || len(v.Readers) != 2 || !v.Readers[1].Until.IsZero() || v.Readers[1].Fault == "" {
			t.Errorf("readers %+v, %v", v.Readers, err)
		}

		if err := errors.Join(os.Remove(public), os.Rename(public+".away", public)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(tryAgain + 3*time.Second)
		if bytes.Equal(fileHolds(t, d), before) {
			t.Error("the file is the old one")
		}
		if s := d.degraded(); len(s) != 0 {
			t.Errorf("degraded: %q", s)
		}
		waits(rotation.StepPublished, "reader mirror")
		time.Sleep(time.Minute)
		if s := d.operator.Standing(); s.Rollout.Step != rotation.StepRetired && s.Rollout.Step != rotation.StepOut {
			t.Errorf("with the file in place for a minute it is %s and waits for %q", s.Rollout.Step, s.Waits)
		}
	})
}

// fileHolds wants the bundle file to be a trust bundle, and returns it.
func fileHolds(t *testing.T, d *daemon) []byte {
	t.Helper()
	data, err := os.ReadFile(d.bundleFile.path)
	if err != nil || !bytes.Contains(data, []byte("spiffe_sequence")) {
		t.Fatalf("the bundle file: %q, %v", data, err)
	}
	return data
}

// Readers' time runs from the first bundle that has the root, whatever bundles come after it.
func TestABundleFileRemembersSinceWhen(t *testing.T) {
	now := time.Unix(1000, 0)
	f := &bundleFile{now: func() time.Time { return now }}
	for sequence := range uint64(heldKept + 5) {
		f.written(sequence, nil)
		now = now.Add(time.Second)
	}
	for set, want := range map[uint64]time.Time{heldKept: time.Unix(1000+heldKept, 0), heldKept + 4: time.Unix(1000+heldKept+4, 0), heldKept + 5: {}} {
		if p := f.published(set); len(p) != 1 || !p[0].Since.Equal(want) {
			t.Errorf("bundle %d: %+v, want since %s", set, p, want)
		}
	}
	if len(f.held) != heldKept {
		t.Errorf("it remembers %d", len(f.held))
	}
}

// Without a bundle file readers look elsewhere: their time runs from when the root was published.
func TestReadersWithoutABundleFile(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	c.BundleFile, c.Readers = "", []ReaderConfig{{Name: "mirror", Refresh: metav1.Duration{Duration: time.Hour}}}
	d := signing(t, c)
	if _, err := d.operator.Rotate(t.Context(), rollout.RotateOptions{By: "test"}); err != nil {
		t.Fatal(err)
	}
	for d.roller.Move(t.Context()) {
	}
	s := d.operator.Standing()
	v, err := d.operator.View(t.Context())
	if err != nil || len(s.Waits) != 1 || len(v.Readers) != 1 || !v.Readers[0].Until.Equal(s.Rollout.Entered.Add(time.Hour)) {
		t.Errorf("it waits for %q, readers %+v, %v", s.Waits, v.Readers, err)
	}
}
