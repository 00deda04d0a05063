package csi

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/api/refusal"
)

// TestTheLastAgentLeavesNothing: where pods have volumes, what their agent keeps is for the next one; where none has,
// nobody needs it.
func TestTheLastAgentLeavesNothing(t *testing.T) {
	n := newNode(t)
	n.config.CleanUp = true
	n.start()
	web := n.pod("web")
	must(t, web.publish())
	before := web.sees()
	n.halt()
	n.ca.Stop()
	n.start()
	if web.sees() != before {
		t.Error("the pod is not served what its agent held before the restart")
	}
	must(t, web.unpublish())
	n.halt()
	var left []string
	must(t, filepath.WalkDir(n.dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && (!entry.IsDir() || filepath.Base(path) == "csi.meshca.io") {
			rel, err := filepath.Rel(n.dir, path)
			must(t, err)
			left = append(left, rel)
		}
		return err
	}))
	slices.Sort(left)
	if want := []string{"agent.token", "bundle.json"}; !slices.Equal(left, want) {
		t.Errorf("left are %q, want %q alone, which are not the agent's", left, want)
	}
	if matches, _ := filepath.Glob(n.path("run")); len(matches) > 0 {
		t.Error("the runtime directory is left")
	}
}

// TestWhatIsNotOursAtTheTargetStays: somebody took the mount away and put something in its place. The kubelet is told, and
// tries again; the identity ends all the same.
func TestWhatIsNotOursAtTheTargetStays(t *testing.T) {
	n := newNode(t)
	n.start()
	web := n.pod("web")
	must(t, web.publish())
	must(t, unix.Unmount(web.target, 0))
	foreign := filepath.Join(web.target, "foreign")
	must(t, os.WriteFile(foreign, []byte("precious"), 0o600))
	for range 2 {
		err := web.unpublish()
		if refusal.Of(err) != refusal.MountFailed || strings.Count(err.Error(), web.target+" ") != 1 || !strings.Contains(err.Error(), "is not this driver's") {
			t.Errorf("the kubelet is told %v", err)
		}
		if left := web.left(); len(left) != 1 || left[0] != web.target || n.kept() > 0 || len(n.driver.all()) > 0 {
			t.Errorf("left are %v, %d keys, %d volumes", left, n.kept(), len(n.driver.all()))
		}
	}
	if data, err := os.ReadFile(foreign); err != nil || string(data) != "precious" {
		t.Errorf("what is somebody else's was touched: %v", err)
	}
	if log := n.log.String(); !strings.Contains(log, "is not this driver's") {
		t.Error("the log does not tell it")
	}
	must(t, os.Remove(foreign))
	must(t, web.unpublish())
	if left := web.left(); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
}
