package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
)

// TestAFullDisk has the kernel refuse to let store and audit log grow, in a process of its own (the limit holds for all
// its files): without any request the CA stays unready as long as that lasts, and is ready seconds after it ends.
func TestAFullDisk(t *testing.T) {
	if dir := os.Getenv("MESHCA_TEST_FULL"); dir != "" {
		synctest.Test(t, func(t *testing.T) { fillUp(t, dir) })
		return
	}
	dir := t.TempDir()
	other := exec.Command(os.Args[0], "-test.run=^TestAFullDisk$", "-test.v")
	other.Env = append(os.Environ(), "MESHCA_TEST_FULL="+dir)
	if out, err := other.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func fillUp(t *testing.T, dir string) {
	d := signing(t, configIn(t, dir, clusterIn(t, dir, "a", false)))
	go d.mend(t.Context())
	if why := d.notReady(); len(why) > 0 {
		t.Fatal(why)
	}
	limit := func(size uint64) {
		t.Helper()
		var have unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &have); err != nil {
			t.Fatal(err)
		}
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: size, Max: have.Max}); err != nil {
			t.Fatal(err)
		}
	}
	const room = 256 << 10
	if err := os.Truncate(d.config.Audit.File, room); err != nil {
		t.Fatal(err)
	}
	limit(room)
	defer limit(unix.RLIM_INFINITY)
	entry := ca.LedgerEntry{ID: "spiffe://mesh.test/a", Evidence: make([]byte, 4096), NotAfter: time.Now().Add(time.Hour)}
	for n := 0; d.ledger.Append(t.Context(), entry) == nil; n++ {
		if n > 1000 {
			t.Fatal("the disk does not become full")
		}
	}
	d.journal.Refused(registration.EventCall, "grpc", registration.Caller{}, "a", refusal.New(refusal.Overloaded, "busy"))
	for range 120 {
		if why := d.notReady(); len(why) != 2 || !strings.Contains(why[0], "ledger") || !strings.Contains(why[1], "audit") {
			t.Fatalf("with a full disk it is not ready for %q", why)
		}
		time.Sleep(time.Second)
	}
	limit(unix.RLIM_INFINITY)
	time.Sleep(tryAgain + time.Second)
	if why := d.notReady(); len(why) > 0 {
		t.Errorf("with room again: %q", why)
	}
}

// TestAFaultOfTheLedger: a write ends it, and only the fault that was there before the write.
func TestAFaultOfTheLedger(t *testing.T) {
	full := errors.New("full")
	log := slog.New(slog.DiscardHandler)
	writes := func(err error) func(context.Context) error { return func(context.Context) error { return err } }
	var f fault
	f.probe(t.Context(), func(context.Context) error { t.Error("nothing was wrong, and the store was tried"); return nil }, log)
	f.committed(full)
	f.probe(t.Context(), writes(full), log)
	if !errors.Is(f.Err(), full) {
		t.Errorf("a probe that failed ended it: %v", f.Err())
	}
	f.probe(t.Context(), func(context.Context) error { f.committed(full); return nil }, log)
	if f.Err() == nil {
		t.Error("a probe ended a fault that came while it wrote")
	}
	f.probe(t.Context(), writes(nil), log)
	if f.Err() != nil {
		t.Errorf("a write did not end it: %v", f.Err())
	}
	f.committed(full)
	f.committed(nil)
	if f.Err() != nil {
		t.Errorf("a commit did not end it: %v", f.Err())
	}
}
