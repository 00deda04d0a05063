package restore

import (
	"errors"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// A CA that has lost all it had is made anew, with another root, as docs/kubernetes.md tells. An agent that has workloads, and
// so keeps the bundle that it knows, trusts it as soon as its bundle file does, and renews all that they hold.
func TestACAThatIsMadeAnew(t *testing.T) {
	s := newSite(t)
	s.write("ca.yaml", strings.Replace(string(read(t, s.file("ca.yaml"))), "ttl: 10s", "ttl: 1h", 1)) // nothing is renewed for its age
	s.startCA()
	s.ready(http.StatusOK, "ok")
	s.startAgent()
	s.workload("web", "fresh", "")
	s.workload("db", "fresh", "")
	old := s.root("root/root.crt")
	s.killCA()

	for _, gone := range []string{"root", "state"} {
		check(t, os.RemoveAll(s.file(gone)))
	}
	check(t, os.Mkdir(s.file("root"), 0o700))
	published := read(t, s.file("bundle.json"))
	if out, code := s.run("meshca", "root", "create", "--config", s.file("ca.yaml"), "--if-missing"); code == 0 {
		t.Errorf("a published bundle is no trace of a root that was lost:\n%s", out)
	}
	check(t, os.Remove(s.file("bundle.json")))
	s.must("meshca", "root", "create", "--config", s.file("ca.yaml"), "--if-missing")
	s.until("another second began", func() error { // by which sequences tell the two apart
		if time.Now().Unix() <= int64(s.first) {
			return errors.New("it is the same")
		}
		return nil
	})
	s.startCA()
	s.ready(http.StatusOK, "ok")
	if string(read(t, s.file("bundle.json"))) == string(published) {
		t.Fatal("the bundle is the one of before")
	}
	s.allBelow(s.root("root/root.crt"), old)
	s.workload("web", "fresh", "")
	s.workload("db", "fresh", "")
}
