package csi

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/api/refusal"
)

// A symbolic link at the target would lead the mount to wherever it points.
func TestALinkAtTheTargetIsNotFollowed(t *testing.T) {
	n := newNode(t)
	n.start()
	web, elsewhere := n.pod("web"), n.path("elsewhere")
	must(t, os.Mkdir(elsewhere, 0o750))
	must(t, os.Symlink(elsewhere, web.target))
	if err := web.publish(); refusal.Of(err) != refusal.MountFailed || !strings.Contains(err.Error(), "is no directory") {
		t.Errorf("the call says %v", err)
	}
	all, err := mounts()
	must(t, err)
	if mountPointAt(all, elsewhere) {
		t.Error("the volume is mounted where a link leads to")
	}
}

// Any user of the pod must reach the socket, whatever the agent's umask is; nobody else may enter the directories above.
func TestModesWhateverTheUmaskIs(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pods")
	must(t, os.Mkdir(dir, 0o700))
	must(t, os.Chmod(dir, 0o777)) // as somebody else may have left it
	must(t, private(dir))
	before := unix.Umask(0o077)
	defer unix.Umask(before)
	v := newVolume(dir, "key")
	must(t, v.prepare(&state{}, func(string) error { return nil }))
	for path, want := range map[string]os.FileMode{dir: 0o700, v.dir: 0o700, v.inside(): 0o755} {
		if info, err := os.Lstat(path); err != nil || info.Mode() != os.ModeDir|want {
			t.Errorf("%s has mode %v, want %v", path, info.Mode(), want)
		}
	}
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(dir, link))
	if err := private(link); err == nil || !strings.Contains(err.Error(), "is no directory") {
		t.Errorf("a link is taken for a directory of the agent's own: %v", err)
	}
}

// An optional volume waits for its socket, and not for ever: a proxy that starts finds it.
func TestAnOptionalVolumeWaitsForItsSocket(t *testing.T) {
	n := newNode(t)
	n.csi.Timeout = 1 // what is in the way stays there
	n.start()
	web := n.pod("web")
	web.attributes[attributeOptional] = "true"
	must(t, os.MkdirAll(filepath.Join(web.dir(), "mount", "socket"), 0o755))
	must(t, web.publish())
	if log := n.log.String(); !strings.Contains(log, "an optional volume is mounted before its socket is open") {
		t.Error("it is not waited for, or not told that it was in vain")
	}
}
