package csi

import (
	"io/fs"
	"path/filepath"
	"slices"
	"testing"
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
