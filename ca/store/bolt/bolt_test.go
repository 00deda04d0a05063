package bolt

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/store/storetest"
)

var _ storetest.Store = (*Store)(nil)

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T, place string) storetest.Store { return opened(t, filepath.Join(place, "meshca.db")) })
}

func opened(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func closed(t *testing.T, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestModes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meshca.db")
	closed(t, opened(t, path))
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o622} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path); err == nil || !strings.Contains(err.Error(), "chmod 600 "+path) {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
}

func TestWrongPlaces(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("a directory: %v", err)
	}
	missing := filepath.Join(dir, "state", "meshca.db")
	if _, err := Open(missing); err == nil || !strings.Contains(err.Error(), "install -d -m 0700 "+filepath.Dir(missing)) {
		t.Errorf("no directory: %v", err)
	}
	noise := filepath.Join(dir, "noise")
	if err := os.WriteFile(noise, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(noise); err == nil {
		t.Error("a file that is no store was opened")
	}
}

func TestNewerSchemaIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meshca.db")
	s := opened(t, path)
	closed(t, s)
	put := func(v []byte) {
		t.Helper()
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second}) // which shows that it was let go of, too
		if err == nil {
			err = errors.Join(db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketMeta).Put(keySchema, v) }), db.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	put(binary.BigEndian.AppendUint32(nil, SchemaVersion+1))
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); !errors.Is(err, ErrSchema) || !strings.Contains(err.Error(), "restore a backup") {
		t.Errorf("got %v", err)
	}
	after, err := os.ReadFile(path)
	if err != nil || string(before) != string(after) {
		t.Error("a store that was refused has changed")
	}
	put([]byte("x"))
	if _, err := Open(path); err == nil || !strings.Contains(err.Error(), "schema version") {
		t.Errorf("a schema version of one byte: %v", err)
	}
}

// TestSecondProcess opens the store of this process in another one.
func TestSecondProcess(t *testing.T) {
	if path := os.Getenv("BOLT_TEST_OPEN"); path != "" {
		_, err := Open(path)
		if !errors.Is(err, ErrInUse) {
			t.Fatalf("got %v", err)
		}
		t.Log(err)
		return
	}
	path := filepath.Join(t.TempDir(), "meshca.db")
	s := opened(t, path)
	defer closed(t, s)
	other := exec.Command(os.Args[0], "-test.run=^TestSecondProcess$", "-test.v")
	other.Env = append(os.Environ(), "BOLT_TEST_OPEN="+path)
	start := time.Now()
	out, err := other.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Stop the other meshca") || !strings.Contains(string(out), path) {
		t.Errorf("the second process: %v\n%s", err, out)
	}
	if took := time.Since(start); took > lockWait+10*time.Second {
		t.Errorf("it waited %s", took)
	}
	// The first goes on.
	if err := s.PutDenial(t.Context(), ca.Denial{ID: "a"}); err != nil {
		t.Error(err)
	}
}

func TestClosedStoreIsUnavailable(t *testing.T) {
	s := opened(t, filepath.Join(t.TempDir(), "meshca.db"))
	closed(t, s)
	err := s.AppendLedger(t.Context(), []ca.LedgerEntry{{ID: "a"}})
	if refusal.Of(err) != refusal.StoreUnavailable {
		t.Errorf("got %v", err)
	}
	if r, _ := refusal.From(err); strings.Contains(r.Detail, "database") {
		t.Errorf("the store's words travel: %q", r.Detail)
	}
	if _, err := s.Denials(t.Context()); refusal.Of(err) != refusal.StoreUnavailable {
		t.Errorf("got %v", err)
	}
}

func TestUnreadableGroupIsAnError(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meshca.db")
	s := opened(t, path)
	if err := s.db.Update(func(tx *bbolt.Tx) error { return putGroups(tx, []group{{1, 1, []byte{9, 9}}}) }); err != nil {
		t.Fatal(err)
	}
	closed(t, s)
	s = opened(t, path)
	defer closed(t, s)
	if err := s.ScanLedger(t.Context(), func(ca.LedgerEntry) (bool, error) { return true, nil }); !errors.Is(err, errGroup) {
		t.Errorf("scan: %v", err)
	}
	if _, err := s.PruneLedger(t.Context(), time.Now()); !errors.Is(err, errGroup) {
		t.Errorf("prune: %v", err)
	}
}

// Who waits for the lock while the store is replaced must not go on with the file that was put aside.
func TestReplacedWhileItWaited(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meshca.db")
	s := opened(t, path)
	closed(t, opened(t, path+".new"))
	waiting := make(chan error, 1)
	go func() {
		late, err := Open(path)
		if err == nil {
			_ = late.Close()
		}
		waiting <- err
	}()
	time.Sleep(lockWait / 3) // it has the old file open; were it later, it would find the new one, and this would prove nothing
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	closed(t, s)
	if err := <-waiting; err == nil || !strings.Contains(err.Error(), "was replaced while it was opened") {
		t.Errorf("got %v", err)
	}
}
