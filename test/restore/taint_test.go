package restore

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
)

// root reads a root's certificate.
func (s *site) root(file string) *x509.Certificate {
	s.t.Helper()
	block, _ := pem.Decode(read(s.t, s.file(file)))
	c, err := x509.ParseCertificate(block.Bytes)
	check(s.t, err)
	return c
}

// made is the root that the upstream made, and its name there.
func (s *site) made() *x509.Certificate {
	s.t.Helper()
	files, err := filepath.Glob(s.file("state/roots/*.crt"))
	check(s.t, err)
	if len(files) != 1 {
		s.t.Fatalf("the upstream has made %q", files)
	}
	name, err := filepath.Rel(s.dir, files[0])
	check(s.t, err)
	return s.root(name)
}

// has reports whether a root is in a trust bundle.
func has(bundle []byte, root *x509.Certificate) bool {
	return bytes.Contains(bundle, []byte(base64.StdEncoding.EncodeToString(root.Raw)))
}

// gone waits until a root is in the bundle file no more.
func (s *site) gone(root *x509.Certificate) {
	s.t.Helper()
	s.until("the bundle file has lost the root", func() error {
		if has(read(s.t, s.file("bundle.json")), root) {
			return errors.New("it is there")
		}
		return nil
	})
}

// never looks all the while whether a root is in the trust bundle that the agent has, or in the bundle file, until the
// returned function is called.
func (s *site) never(root *x509.Certificate) (stop func()) {
	found, ended := make(chan struct{}), make(chan string)
	go func() {
		for first := ""; ; time.Sleep(10 * time.Millisecond) {
			for _, file := range []string{"agent/bundle.json", "bundle.json"} {
				if data, err := os.ReadFile(s.file(file)); first == "" && err == nil && has(data, root) {
					first = fmt.Sprintf("%s has the root at %s: %s", file, time.Now(), data)
				}
			}
			select {
			case <-found:
				ended <- first
				return
			default:
			}
		}
	}()
	return func() {
		s.t.Helper()
		close(found)
		if says := <-ended; says != "" {
			s.t.Error(says)
		}
	}
}

// below tells under which of the roots each workload's SVID is, by its socket's name; the agent's own is "agent".
func (s *site) below(roots ...*x509.Certificate) (ids map[string]string, err error) {
	s.t.Helper()
	out, code := s.run("certctl", "--agent="+s.file("run/admin.sock"), "status", "-o", "json")
	var all struct {
		Agent struct {
			Self      struct{ Chain [][]byte }
			Workloads []struct {
				Socket string
				Svid   struct{ Chain [][]byte }
			}
		}
	}
	if code != 0 {
		return nil, fmt.Errorf("certctl status: %s", out)
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return nil, err
	}
	chains := map[string][][]byte{"agent": all.Agent.Self.Chain}
	for _, w := range all.Agent.Workloads {
		chains[strings.TrimSuffix(filepath.Base(w.Socket), ".sock")] = w.Svid.Chain
	}
	ids = map[string]string{}
	for name, chain := range chains {
		if len(chain) == 0 {
			return nil, fmt.Errorf("%s has no SVID", name)
		}
		last, err := x509.ParseCertificate(chain[len(chain)-1])
		if err != nil {
			return nil, err
		}
		for _, r := range roots {
			if last.CheckSignatureFrom(r) == nil {
				ids[name] = ca.RootID(r)
			}
		}
	}
	return ids, nil
}

// allBelow waits until all SVIDs are below a root.
func (s *site) allBelow(root *x509.Certificate, among ...*x509.Certificate) {
	s.t.Helper()
	s.until("all SVIDs are renewed", func() error {
		ids, err := s.below(append(among, root)...)
		for _, name := range []string{"agent", "web", "db"} {
			if err == nil && ids[name] != ca.RootID(root) {
				err = fmt.Errorf("%s is below %q", name, ids[name])
			}
		}
		return err
	})
}

// trusted are the roots of the CA's trust bundle.
func (s *site) trusted() (ids []string) {
	s.t.Helper()
	var status struct{ Roots []struct{ ID string } }
	check(s.t, json.Unmarshal([]byte(s.order("ca", "status", "-o", "json")), &status))
	for _, r := range status.Roots {
		ids = append(ids, r.ID)
	}
	return ids
}

// cannot wants certctl to be refused, and to say this.
func (s *site) cannot(says string, args ...string) {
	s.t.Helper()
	if out, code := s.run("certctl", append([]string{"--socket", s.file("admin.sock")}, args...)...); code != 1 || !strings.Contains(out, says) {
		s.t.Errorf("certctl %q: exit code %d\n%s", args, code, out)
	}
}

// A backup of before the taint of the root that signs, over a store that knows of it: the CA signs nothing under that root and
// tells nobody of it, and a second taint, which names the root that signed since, leads out.
func TestABackupOfBeforeATaintOverTheStore(t *testing.T) {
	s := newSite(t)
	stolen := s.root("root/root.crt")
	s.startCA()
	s.ready(http.StatusOK, "ok")
	s.startAgent()
	s.workload("web", "fresh", "")
	s.workload("db", "fresh", "")
	s.order("backup", s.file("old.backup"))
	s.order("ca", "taint", "root", "--within", "20s", "--yes")
	s.rolledOut()
	next := s.made()
	s.allBelow(next, stolen)
	s.bundle(3)
	s.gone(stolen)
	s.killCA()

	stop := s.never(stolen)
	s.refused([]string{"--replace", s.file("old.backup")}, "1 taints would be forgotten, of the roots "+ca.RootID(stolen), "keeps what is tainted from signing", "Nothing was changed")
	out, code := s.restore("--replace", "--accept-rollback", s.file("old.backup"))
	if code != 0 || !strings.Contains(out, "tainted stays tainted") || !strings.Contains(out, "The root that signs by this backup was tainted since: ROOT_TAINTED") {
		t.Fatalf("exit code %d\n%s", code, out)
	}
	s.startCA()
	s.ready(http.StatusServiceUnavailable, "ROOT_TAINTED")
	s.killCA()
	s.startCA()
	s.ready(http.StatusServiceUnavailable, "certctl ca taint root --issuer REF")
	s.cannot("ROOT_TAINTED", "ca", "root", "import", s.file("root/root.crt"))
	s.order("ca", "taint", "root", "--issuer", ca.RootID(next), "--within", "20s", "--yes")
	s.rolledOut()
	s.ready(http.StatusOK, "ok")
	s.bundle(1000)
	s.workload("web", "fresh", "")
	s.workload("db", "fresh", "")
	s.allBelow(next, stolen)
	stop()
	if ids := s.trusted(); !slices.Equal(ids, []string{ca.RootID(next)}) {
		t.Errorf("trusted are %v", ids)
	}
	s.cannot("ROOT_TAINTED", "ca", "root", "import", s.file("root/root.crt"))
	s.cannot("ROOT_TAINTED", "ca", "rotate", "root", "--issuer", ca.RootID(stolen))
}

// A backup of amid the rollout away from a root that was tainted later and has left, over a store that knows of it: the rollout
// is brought to its end, and the agent is never told of that root again.
func TestABackupOfAmidARolloutOverTheStore(t *testing.T) {
	s := newSite(t)
	s.write("ca.yaml", strings.Replace(string(read(t, s.file("ca.yaml"))), "ttl: 10s", "ttl: 1h", 1)) // the old root stays for that long
	stolen := s.root("root/root.crt")
	s.startCA()
	s.ready(http.StatusOK, "ok")
	s.startAgent()
	s.workload("web", "fresh", "")
	s.workload("db", "fresh", "")
	s.order("ca", "rotate", "root")
	s.until("the old root has retired", func() error {
		if st := s.standing(); st.Rollout.Step != "retired" {
			return errors.New(st.Rollout.Step)
		}
		return nil
	})
	next := s.made()
	s.order("backup", s.file("amid.backup"))
	s.order("ca", "taint", "root", ca.RootID(stolen), "--within", "20s", "--yes")
	s.rolledOut()
	s.allBelow(next, stolen)
	s.bundle(3)
	s.gone(stolen)
	s.killCA()

	stop := s.never(stolen)
	out, code := s.restore("--replace", "--accept-rollback", s.file("amid.backup"))
	if code != 0 || !strings.Contains(out, "rollout      retired") || !strings.Contains(out, "(SHA-256 "+ca.RootID(stolen)+"), which was tainted since and had left it") {
		t.Fatalf("exit code %d\n%s", code, out)
	}
	s.startCA()
	s.ready(http.StatusOK, "ok")
	s.rolledOut()
	s.bundle(1000)
	s.allBelow(next, stolen)
	stop()
	if ids := s.trusted(); !slices.Equal(ids, []string{ca.RootID(next)}) {
		t.Errorf("trusted are %v", ids)
	}
}

// A backup of before the taint of a root that is trusted beside the one that signs, and nothing else is left: the agent has
// seen that it was taken out, and is not told of it again.
func TestABackupOfBeforeATaintAfterTheDiskWasLost(t *testing.T) {
	s := newSite(t)
	s.write("other.yaml", strings.ReplaceAll(string(read(t, s.file("ca.yaml"))), s.file("root/root."), s.file("other.")))
	s.must("meshca", "root", "create", "--config", s.file("other.yaml"), "--common-name", "Another Root")
	stolen := s.root("other.crt")
	s.startCA()
	s.ready(http.StatusOK, "ok")
	s.startAgent()
	s.workload("web", "fresh", "")
	s.workload("db", "fresh", "")
	s.order("ca", "root", "import", s.file("other.crt"))
	s.bundle(2)
	s.order("backup", s.file("old.backup"))
	s.order("ca", "taint", "root", ca.RootID(stolen), "--within", "20s", "--yes")
	s.bundle(3)
	s.gone(stolen)
	s.killCA()
	check(t, os.Remove(s.file("state/meshca.db")))

	if out, code := s.restore(s.file("old.backup")); code != 0 {
		t.Fatalf("exit code %d\n%s", code, out)
	}
	s.startCA()
	s.ready(http.StatusServiceUnavailable, "CA_ROLLED_BACK")
	// The bundle file alone may have it for the moment until the agent has told; the agent has a newer one.
	check(t, os.Remove(s.file("bundle.json")))
	stop := s.never(stolen)
	s.until("db is refused", func() error {
		a, err := s.agentSays()
		for _, w := range a.Workloads {
			if w.Socket == s.file("db.sock") && w.LastRefusal.Reason != "CA_ROLLED_BACK" {
				err = errors.New(w.LastRefusal.Reason)
			}
		}
		return err
	})
	s.order("ca", "taint", "root", ca.RootID(stolen), "--within", "20s", "--yes")
	s.order("ca", "accept-rollback", "--yes")
	if ids := s.trusted(); slices.Contains(ids, ca.RootID(stolen)) {
		t.Errorf("agents are going to be told of %v", ids)
	}
	s.ready(http.StatusOK, "ok")
	s.bundle(1000)
	s.workload("db", "fresh", "")
	stop()
	s.cannot("ROOT_TAINTED", "ca", "root", "import", s.file("other.crt"))
}

// A backup of amid an emergency: what it began is brought to its end, also for what was issued after the backup, of which the
// restored ledger knows nothing.
func TestABackupOfAmidAnEmergency(t *testing.T) {
	s := newSite(t)
	// What is held outlives the bound, so that it is renewed or lost; a reader keeps the new root waiting to be confirmed.
	s.write("ca.yaml", strings.Replace(string(read(t, s.file("ca.yaml"))), "ttl: 10s", "ttl: 1h", 1)+"readers: [{name: mirror, refresh: 1h}]\n")
	stolen := s.root("root/root.crt")
	s.startCA()
	s.ready(http.StatusOK, "ok")
	s.startAgent()
	s.workload("db", "fresh", "")
	before := s.workload("web", "fresh", "")
	s.order("ca", "taint", "root", "--within", "40s", "--yes")
	s.until("the new root is published", func() error {
		if st := s.standing(); st.Rollout.Step != "published" {
			return errors.New(st.Rollout.Step)
		}
		return nil
	})
	next := s.made()
	s.order("backup", s.file("amid.backup"))
	s.order("svid", "renew", thief, "--spread", "0s")
	var unknown string
	s.until("web is renewed", func() error {
		if unknown = s.workload("web", "fresh", ""); unknown == before {
			return errors.New("not yet")
		}
		return nil
	})
	ids, err := s.below(stolen, next)
	s.killCA()
	check(t, os.Remove(s.file("state/meshca.db")))
	out, code := s.restore(s.file("amid.backup"))
	if code != 0 {
		t.Fatalf("exit code %d\n%s", code, out)
	}
	if !strings.Contains(out, "rollout      published") || err != nil || ids["web"] != ca.RootID(stolen) {
		t.Skipf("the machine is too slow: the backup is of another step, or the renewal of another root: %v\n%s", err, out)
	}

	s.startCA()
	s.ready(http.StatusServiceUnavailable, "CA_ROLLED_BACK") // the agent has followed the order to renew
	s.order("ca", "accept-rollback", "--yes")
	if list := s.order("svid", "list", "-o", "json"); strings.Contains(list, unknown) || !strings.Contains(list, before) {
		t.Fatalf("the restored ledger knows\n%s", list)
	}
	s.until("the root is out", func() error {
		out := !has(read(t, s.file("agent/bundle.json")), stolen) // looked at first
		ids, err := s.below(stolen, next)
		for name, id := range ids {
			if out && id != ca.RootID(next) {
				t.Fatalf("nobody trusts the root any more under which %s is", name)
			}
		}
		if err == nil && !out {
			err = fmt.Errorf("not yet; SVIDs are below %v", ids)
		}
		return err
	})
	s.rolledOut()
	s.allBelow(next, stolen)
	if ids := s.trusted(); !slices.Equal(ids, []string{ca.RootID(next)}) {
		t.Errorf("trusted are %v", ids)
	}
	if serial := s.workload("web", "fresh", ""); serial == unknown || serial == before {
		t.Errorf("web still has %s", serial)
	}
	s.cannot("ROOT_TAINTED", "ca", "root", "import", s.file("root/root.crt"))
}
