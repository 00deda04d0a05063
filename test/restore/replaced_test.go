package restore

import (
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/meshca/meshca/ca"
)

// A backup of before a root was replaced in the ordinary way, over the store that stands: all that lives was signed under
// the new root, and everybody goes on to accept it. Tainted then, that root leaves when what it signed has been renewed.
func TestABackupOfBeforeARootWasReplaced(t *testing.T) {
	s := newSite(t)
	s.startCA()
	s.ready(http.StatusOK, "ok")
	s.startAgent()
	s.workload("db", "fresh", "")
	s.order("backup", s.file("old.backup"))
	s.order("ca", "rotate", "root")
	s.rolledOut()
	old, next := s.root("root/root.crt"), s.made()
	s.killCA()
	s.write("ca.yaml", strings.Replace(string(read(t, s.file("ca.yaml"))), "ttl: 10s", "ttl: 1h", 1))
	before := map[string]string{"web": s.workload("web", "fresh", ""), "db": s.workload("db", "fresh", "")}
	s.startCA()
	s.ready(http.StatusOK, "ok")
	for name, serial := range before {
		s.until(name+" has an SVID that lives for long", func() error {
			if s.workload(name, "fresh", "") == serial {
				return os.ErrNotExist
			}
			return nil
		})
	}
	s.allBelow(next, old)
	s.killCA()

	says := fmt.Sprintf("(SHA-256 %s) came after this backup. It signs for nobody any more, and stays trusted", ca.RootID(next))
	for _, flags := range [][]string{{"--dry-run"}, nil} {
		out, code := s.restore(append(flags, "--replace", "--accept-rollback", s.file("old.backup"))...)
		if code != 0 || !strings.Contains(out, says) {
			t.Fatalf("exit code %d\n%s", code, out)
		}
	}
	s.startCA()
	s.ready(http.StatusOK, "ok")
	s.bundle(1000)
	for _, file := range []string{"agent/bundle.json", "bundle.json"} {
		if bundle := read(t, s.file(file)); !has(bundle, old) || !has(bundle, next) {
			t.Errorf("%s lacks one of the roots: %s", file, bundle)
		}
	}
	s.workload("web", "fresh", "")
	s.workload("db", "fresh", "")
	if out := s.order("check"); !strings.Contains(out, "is unknown to the backup that was restored") {
		t.Errorf("certctl check says\n%s", out)
	}

	if out := s.order("ca", "taint", "root", ca.RootID(next), "--within", "20s", "--yes"); strings.Contains(out, "at once") {
		t.Errorf("the taint says\n%s", out)
	}
	s.gone(next)
	s.allBelow(old, next)
	if ids := s.trusted(); !slices.Equal(ids, []string{ca.RootID(old)}) {
		t.Errorf("trusted are %v", ids)
	}
}
