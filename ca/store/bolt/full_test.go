package bolt

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
)

// tooSmall is room for the log, and for a part of what is issued.
const tooSmall = 3 << 20

// TestFullDisk has the kernel refuse to let the file grow, in a process of its own (the limit holds for all its files):
// what is not durable is refused, and the store works again once there is room.
func TestFullDisk(t *testing.T) {
	if path := os.Getenv("BOLT_TEST_FULL"); path != "" {
		fillUp(t, path)
		return
	}
	path := filepath.Join(t.TempDir(), "meshca.db")
	other := exec.Command(os.Args[0], "-test.run=^TestFullDisk$", "-test.v")
	other.Env = append(os.Environ(), "BOLT_TEST_FULL="+path)
	if out, err := other.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// What that process was told is durable, and nothing else, is there for the next one.
	s := opened(t, path)
	defer closed(t, s)
	n, err := s.LedgerSize(t.Context())
	if err != nil || n == 0 {
		t.Errorf("%d entries, %v", n, err)
	}
	if _, err := os.Stat(path + ".count"); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(path + ".count")
	if err != nil || len(want) != 8 || string(want) != string(indexKey(n)) {
		t.Errorf("%d entries are there, %x were acknowledged (%v)", n, want, err)
	}
}

func fillUp(t *testing.T, path string) {
	s := opened(t, path)
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
	group := func() []ca.LedgerEntry {
		return []ca.LedgerEntry{{ID: "spiffe://example.org/a", Evidence: make([]byte, 8192), NotAfter: time.Now().Add(time.Hour)}}
	}
	acknowledged := uint64(0)
	limit(tooSmall)
	var failed error
	for range 1000 {
		if failed = s.AppendLedger(t.Context(), group()); failed != nil {
			break
		}
		acknowledged++
	}
	if refusal.Of(failed) != refusal.StoreUnavailable {
		t.Fatalf("after %d groups: %v", acknowledged, failed)
	}
	if err := s.Ready(); refusal.Of(err) != refusal.StoreUnavailable {
		t.Errorf("the store says that it is ready: %v", err)
	}
	if n, err := s.LedgerSize(t.Context()); err != nil || n != acknowledged {
		t.Fatalf("%d entries, %d acknowledged, %v", n, acknowledged, err)
	}
	if err := s.AppendLedger(t.Context(), group()); err == nil {
		t.Fatal("there is still no room")
	}
	if err := s.Probe(t.Context()); refusal.Of(err) != refusal.StoreUnavailable {
		t.Fatalf("a probe without room: %v", err)
	}
	limit(unix.RLIM_INFINITY)
	startFull(t, killed(t, s), acknowledged, limit)
	if err := s.Probe(t.Context()); err != nil {
		t.Fatalf("a probe with room again: %v", err)
	}
	if err := s.Ready(); err != nil {
		t.Errorf("with room again: %v", err)
	}
	for range 100 {
		if err := s.AppendLedger(t.Context(), group()); err != nil {
			t.Fatalf("with room again: %v", err)
		}
		acknowledged++
	}
	closed(t, s)
	if err := os.WriteFile(path+".count", indexKey(acknowledged), 0o600); err != nil {
		t.Fatal(err)
	}
}

// startFull opens what a kill left on a full disk: all that was acknowledged can be read, nothing is until there is room, and
// pruning makes room.
func startFull(t *testing.T, path string, acknowledged uint64, limit func(uint64)) {
	t.Helper()
	limit(tooSmall)
	defer limit(unix.RLIM_INFINITY)
	lost := path + walSuffix + lostSuffix
	if err := os.WriteFile(lost, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s := opened(t, path)
	if all := s.Notices(); len(all) != 1 || !strings.Contains(all[0], "nothing can be recorded") {
		t.Errorf("it tells %q", all)
	}
	if n, err := s.LedgerSize(t.Context()); err != nil || n != acknowledged {
		t.Errorf("%d entries, %d acknowledged, %v", n, acknowledged, err)
	}
	if err := s.AppendLedger(t.Context(), []ca.LedgerEntry{{ID: "refused"}}); refusal.Of(err) != refusal.StoreUnavailable {
		t.Errorf("got %v", err)
	}
	if n, err := s.PruneLedger(t.Context(), time.Now().Add(2*time.Hour)); err != nil || n == 0 {
		t.Errorf("pruned %d, %v", n, err)
	}
	if err := s.young.fold(); err != nil {
		t.Errorf("with what was pruned there is room: %v", err)
	}
	limit(unix.RLIM_INFINITY)
	if err := s.Probe(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.AppendLedger(t.Context(), []ca.LedgerEntry{{ID: "next"}}); err != nil {
		t.Error(err)
	}
	if exists(lost) {
		t.Error("what was said of an earlier loss holds for the next one, too")
	}
	closed(t, s)
}
