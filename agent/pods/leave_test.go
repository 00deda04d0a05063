package pods

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// left is what lies in the agent's directory; nil where that is gone.
func (n *node) left() (names []string) {
	n.t.Helper()
	err := filepath.WalkDir(n.path("run"), func(path string, _ fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(n.path("run"), path); err == nil && rel != "." {
			names = append(names, rel)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.t.Error(err)
	}
	return names
}

// An agent cannot know whether it ends for good. Pods that are connected are served by the next one, also with the CA gone; of those
// that are not nothing stays, and where there is none of the agent neither.
func TestAnAgentThatEndsKeepsWhatIsInUse(t *testing.T) {
	n := newNode(t)
	n.config.CleanUp = true
	n.ca.Pod(uidA, "/ns/shop/sa/a")
	n.ca.Pod(uidB, "/ns/shop/sa/b")
	n.start()
	stays, goes := n.connect(uidA), n.connect(uidB)
	had := stays.served()
	goes.served()
	must(t, goes.conn.Close())
	n.eventually("a connection is closed", func() bool {
		n.source.mu.Lock()
		defer n.source.mu.Unlock()
		return n.source.served[uidB].kept.Open() == 0
	})
	n.stop()
	if keys, known := n.keys(), n.source.kept(); len(keys) != 1 || !slices.Equal(known, []string{uidA}) {
		t.Errorf("kept are %q, and the pods %q", keys, known)
	}
	n.ca.Stop()
	n.start()
	again := n.connect(uidA)
	if again.served() != had {
		t.Error("who stayed connected is served something else")
	}
	must(t, again.conn.Close())
	must(t, stays.conn.Close())
	n.eventually("nobody is connected", func() bool {
		n.source.mu.Lock()
		defer n.source.mu.Unlock()
		return n.source.served[uidA].kept.Open() == 0
	})
	n.stop()
	if left := n.left(); left != nil {
		t.Errorf("left are %q", left)
	}
}

// A pod that has the directory mounted, and is not connected at this moment, would not see one that is made in its place.
func TestADirectoryThatIsMountedStays(t *testing.T) {
	n := newNode(t)
	n.config.CleanUp, n.mounted = true, true
	n.start()
	n.stop()
	if left := n.left(); !slices.Equal(left, []string{"shared"}) {
		t.Errorf("left are %q", left)
	}
	n.mounted = false
	n.start()
	n.stop()
	if left := n.left(); left != nil {
		t.Errorf("when nobody has it mounted left are %q", left)
	}
}

// An agent whose shared socket was switched off takes away what is left of it: the pods' keys, who they were, the directory.
func TestASocketThatIsSwitchedOff(t *testing.T) {
	n := newNode(t)
	n.ca.Pod(uidA, "/ns/shop/sa/a")
	n.start()
	n.connect(uidA).served()
	n.stop()
	if _, err := os.Stat(n.path("run/shared.json")); err != nil || len(n.keys()) != 1 {
		t.Fatalf("nothing is left to be taken away: %v", err)
	}
	killed, err := os.Create(n.path("run/shared.json.new")) // amid a write
	must(t, err)
	must(t, killed.Close())
	off := NewLeftovers(Config{Socket: n.socket(), StateFile: n.path("run/shared.json"), Log: n.config.Log})
	n.run(off)
	n.eventually("it is gone", func() bool {
		for _, path := range []string{"run/shared.json", "run/shared.json.new", "run/shared"} {
			if _, err := os.Lstat(n.path(path)); !errors.Is(err, fs.ErrNotExist) {
				return false
			}
		}
		return len(n.keys()) == 0
	})
	n.stop()

	must(t, os.Mkdir(filepath.Dir(n.socket()), 0o755)) // what is not its own stays
	other := filepath.Join(filepath.Dir(n.socket()), "other")
	must(t, os.WriteFile(other, nil, 0o600))
	must(t, off.Run(t.Context(), nil))
	if _, err := os.Stat(other); err != nil {
		t.Error(err)
	}
}
