package restore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const thief = "spiffe://mesh.test/ns/shop/sa/web"

// decide is what the backup does not know: a denial, and a root of somebody else's. The agent has followed it.
func decide(s *site) {
	s.t.Helper()
	s.order("svid", "deny", thief, "--why", "its key is on a laptop")
	s.order("ca", "root", "import", s.file("other.crt"))
	s.workload("web", "denied", "")
	s.bundle(2)
}

// backedUp is a site whose CA has issued, was backed up, has decided something since, and was killed.
func backedUp(t *testing.T) *site {
	t.Helper()
	s := newSite(t)
	// Another CA's root: this trust domain moves in with certificates of both.
	s.write("other.yaml", strings.ReplaceAll(string(read(t, s.file("ca.yaml"))), s.file("root/root."), s.file("other.")))
	s.must("meshca", "root", "create", "--config", s.file("other.yaml"), "--common-name", "Another Root")

	s.startCA()
	s.ready(http.StatusOK, "ok")
	s.startAgent()
	s.workload("web", "fresh", "")
	s.workload("db", "fresh", "")
	out := s.order("backup", s.file("old.backup"))
	info, err := os.Stat(s.file("old.backup"))
	if err != nil || info.Mode() != 0o600 || !strings.Contains(out, fmt.Sprintf("sequence %d", s.first)) {
		t.Fatalf("the backup: %v, %v\n%s", info, err, out)
	}
	if audit := string(read(t, s.file("audit.log"))); !strings.Contains(audit, `"verb":"backup","peer":"uid `) {
		t.Errorf("the audit log does not tell of the backup:\n%s", audit)
	}
	decide(s)
	s.refused([]string{"--replace", s.file("old.backup")}, "in use by another process", "Stop the CA first")
	s.killCA()
	return s
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(file)
	check(t, err)
	return data
}

// The store still stands and knows more: the old backup is refused with what would be lost, and what was accepted to be
// lost costs no denial, and no agent.
func TestAnOldBackupOverTheStore(t *testing.T) {
	s := backedUp(t)
	store, log := read(t, s.file("state/meshca.db")), read(t, s.file("state/meshca.db.wal")) // the CA was killed: what it recorded last is there
	s.refused([]string{s.file("old.backup")}, "there is a store already", "Nothing was changed", "restore --config "+s.file("ca.yaml")+" --replace")
	s.refused([]string{"--replace", s.file("old.backup")}, "knows less than the store that stands", fmt.Sprintf("go back from sequence %d to %d", s.first+1, s.first), "1 denials would be forgotten, of "+thief,
		"Nothing was changed", "--accept-rollback")
	if !bytes.Equal(store, read(t, s.file("state/meshca.db"))) || !bytes.Equal(log, read(t, s.file("state/meshca.db.wal"))) {
		t.Error("what was refused changed the store")
	}
	out, code := s.restore("--replace", "--accept-rollback", s.file("old.backup"))
	kept, err := filepath.Glob(s.file("state/meshca.db.replaced-*"))
	if code != 0 || err != nil || len(kept) != 2 || kept[1] != kept[0]+".wal" || !bytes.Equal(store, read(t, kept[0])) || !bytes.Equal(log, read(t, kept[1])) ||
		!strings.Contains(out, kept[0]) || !strings.Contains(out, "is not in this ledger") {
		t.Fatalf("exit code %d, kept %v, %v\n%s", code, kept, err, out)
	}
	s.startCA()
	s.ready(http.StatusOK, "ok")
	s.bundle(1000)
	serial := s.workload("db", "fresh", "")
	s.until("db is renewed", func() error { return another(s, serial) })
	s.workload("web", "denied", "")
	if denials := s.order("denials", "list"); !strings.Contains(denials, thief) {
		t.Errorf("denied are\n%s", denials)
	}
}

// another is nil once the workload db has another certificate.
func another(s *site, serial string) error {
	if s.workload("db", "fresh", "") == serial {
		return os.ErrNotExist
	}
	return nil
}

// The disk is lost, and only the old backup is left: the agent that has seen more tells, the CA stops, over a restart too,
// and goes on when an operator has put back what was missing.
func TestAnOldBackupAfterTheDiskWasLost(t *testing.T) {
	s := backedUp(t)
	check(t, os.RemoveAll(s.file("state")))
	out, code := s.restore(s.file("old.backup"))
	if code != 0 || !strings.Contains(out, "certctl ca accept-rollback") || !strings.Contains(out, s.file("root/root.key")) {
		t.Fatalf("exit code %d\n%s", code, out)
	}
	s.startCA()
	s.ready(http.StatusServiceUnavailable, "CA_ROLLED_BACK")
	if out, code := s.run("certctl", "--socket", s.file("admin.sock"), "check"); code != 1 || !strings.Contains(out, "the store is an old one") {
		t.Errorf("certctl check: exit code %d\n%s", code, out)
	}
	// It issues nothing, and tells the agent nothing that would lift the denial.
	s.until("db is refused", func() error {
		a, err := s.agentSays()
		for _, w := range a.Workloads {
			if w.Socket == s.file("db.sock") && w.LastRefusal.Reason == "CA_ROLLED_BACK" {
				return err
			}
		}
		return os.ErrNotExist
	})
	s.workload("web", "denied", "")
	s.killCA()
	s.startCA()
	s.ready(http.StatusServiceUnavailable, "CA_ROLLED_BACK")
	s.workload("web", "denied", "")

	s.order("svid", "deny", thief, "--why", "its key is on a laptop")
	s.order("ca", "root", "import", s.file("other.crt"))
	if out, code := s.run("certctl", "--socket", s.file("admin.sock"), "ca", "accept-rollback"); code != 2 || !strings.Contains(out, "--yes") {
		t.Errorf("unasked: exit code %d\n%s", code, out)
	}
	s.order("ca", "accept-rollback", "--yes")
	s.ready(http.StatusOK, "ok")
	s.bundle(1000)
	s.workload("db", "fresh", "")
	s.workload("web", "denied", "")
	if bundle := s.must("certctl", "--agent="+s.file("run/admin.sock"), "bundle", "show"); !strings.Contains(bundle, "Another Root") {
		t.Errorf("the agent trusts\n%s", bundle)
	}
	if audit := string(read(t, s.file("audit.log"))); !strings.Contains(audit, `"verb":"ca accept-rollback","peer":"uid `) {
		t.Errorf("the audit log does not tell who accepted it")
	}
	if out, code := s.run("certctl", "--socket", s.file("admin.sock"), "ca", "accept-rollback"); code != 1 || !strings.Contains(out, "nothing to accept") {
		t.Errorf("again: exit code %d\n%s", code, out)
	}
}

// The lost decision was a root: agents trust the one that the restored CA does not serve under any more, and refuse it.
// What docs/operations.md says brings the CA back to them.
func TestAnOldBackupOfAnotherRoot(t *testing.T) {
	s := newSite(t)
	s.startCA()
	s.ready(http.StatusOK, "ok")
	s.startAgent()
	s.workload("db", "fresh", "")
	s.order("backup", s.file("old.backup"))
	s.order("ca", "rotate", "root")
	s.rolledOut()
	s.killCA()
	check(t, os.Remove(s.file("state/meshca.db"))) // the roots beside it were kept
	if out, code := s.restore(s.file("old.backup")); code != 0 {
		t.Fatalf("exit code %d\n%s", code, out)
	}
	s.startCA()
	s.ready(http.StatusOK, "ok") // nobody can tell it yet
	s.until("the agent refuses the CA", func() error {
		if out, _ := s.run("certctl", "--agent="+s.file("run/admin.sock"), "check"); !strings.Contains(out, "CA_UNTRUSTED") {
			return errors.New(out)
		}
		return nil
	})

	var status struct{ Candidates []struct{ Ref string } }
	check(t, json.Unmarshal([]byte(s.order("ca", "status", "-o", "json")), &status))
	if len(status.Candidates) != 1 {
		t.Fatalf("candidates are %+v", status)
	}
	s.order("ca", "taint", "root", "--issuer", status.Candidates[0].Ref, "--within", "20s", "--yes")
	s.ready(http.StatusServiceUnavailable, "CA_ROLLED_BACK")
	s.order("ca", "accept-rollback", "--yes")
	s.rolledOut()
	s.ready(http.StatusOK, "ok")
	s.bundle(1000)
	s.workload("db", "fresh", "")
}

// rolledOut waits until a rollout of a root is over.
func (s *site) rolledOut() {
	s.t.Helper()
	s.until("the rollout is over", func() error {
		out := s.order("ca", "status", "-o", "json")
		var status struct {
			Rollout struct {
				Step string
				By   string
			}
		}
		if err := json.Unmarshal([]byte(out), &status); err != nil {
			return err
		}
		if status.Rollout.Step != "out" || status.Rollout.By == "the first start" {
			return errors.New(out)
		}
		return nil
	})
}
