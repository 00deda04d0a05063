package csi

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/api/refusal"
)

// TestARestartServesInTheSamePlace, with the CA gone: what the pod has mounted is the directory that the new socket is in.
func TestARestartServesInTheSamePlace(t *testing.T) {
	n := newNode(t)
	n.start()
	web := n.pod("web")
	must(t, web.publish())
	before := web.sees()
	var dir, after unix.Stat_t
	must(t, unix.Stat(web.target, &dir))
	n.halt()
	n.ca.Stop()
	n.start()
	if web.sees() != before {
		t.Error("not what was served before")
	}
	must(t, unix.Stat(web.target, &after))
	if dir.Ino != after.Ino {
		t.Error("the directory is another: pods that run would not see it")
	}
	web.freshToken(2)
	must(t, web.publish())
	if token, err := os.ReadFile(filepath.Join(web.dir(), "token")); err != nil || string(token) != web.token {
		t.Errorf("the fresh token is not in use: %v", err)
	}
	if s := n.driver.Standing(); len(s.Faults) > 0 {
		t.Errorf("faults %v", s.Faults)
	}
	must(t, web.unpublish())
	if left := web.left(); len(left) > 0 || n.kept() > 0 {
		t.Errorf("left are %v and %d keys", left, n.kept())
	}
}

func TestUnpublishWhileTheAgentWasAway(t *testing.T) {
	n := newNode(t)
	n.start()
	web := n.pod("web")
	must(t, web.publish())
	n.halt()
	n.start()
	must(t, web.unpublish())
	if left := web.left(); len(left) > 0 || n.kept() > 0 {
		t.Errorf("left are %v and %d keys", left, n.kept())
	}
	must(t, n.pod("never").unpublish())
}

// TestAReboot takes the mounts, and the runtime directory where it lies on a tmpfs. The kubelet's directories stay, and it
// asks for the volumes of its pods, which have the UIDs of before, anew.
func TestAReboot(t *testing.T) {
	for name, tmpfs := range map[string]bool{"of a node with a tmpfs": true, "of a node that keeps the runtime directory": false} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.start()
			web, gone := n.pod("web"), n.pod("gone")
			must(t, web.publish())
			must(t, gone.publish())
			n.halt()
			next := "the next boot"
			n.boot = &next
			for _, p := range []*made{web, gone} {
				must(t, unix.Unmount(p.target, 0))
			}
			if tmpfs {
				must(t, os.RemoveAll(n.config.RuntimeDir))
			}
			n.start()
			if _, err := os.Lstat(web.dir()); !errors.Is(err, os.ErrNotExist) || n.kept() > 0 {
				t.Errorf("what was not mounted is still there (%v), with %d keys", err, n.kept())
			}
			n.refuse(web, refusal.New(refusal.PolicyDenied, "the test says so"))
			if err := web.publish(); refusal.Of(err) != refusal.PolicyDenied {
				t.Errorf("the first mount after a reboot is taken for a republish: %v", err)
			}
			n.ca.Refuse(nil)
			must(t, web.publish())
			if web.sees() == "" {
				t.Error("nothing is served")
			}
			must(t, gone.unpublish())
			if left := gone.left(); len(left) > 0 {
				t.Errorf("left are %v", left)
			}
		})
	}
}

// TestDamagedStateIsHealed: the pod still has the directory mounted, and the kubelet tells again all that was lost. Until then
// nobody takes the volume away, however long ago its directory changed.
func TestDamagedStateIsHealed(t *testing.T) {
	n := newNode(t)
	n.start()
	web, ended, unmounted := n.pod("web"), n.pod("ended"), n.pod("unmounted")
	for _, p := range []*made{web, ended, unmounted} {
		must(t, p.publish())
	}
	n.halt()
	old := time.Now().Add(-2 * abandoned)
	for _, p := range []*made{web, ended, unmounted} {
		must(t, os.WriteFile(filepath.Join(p.dir(), "state.json"), []byte("{"), 0o600))
		must(t, os.Chtimes(p.dir(), old, old))
	}
	var before, after unix.Stat_t
	must(t, unix.Stat(web.target, &before))
	n.start()
	n.driver.sweep(time.Now().Add(sweepEvery))
	n.driver.sweep(time.Now().Add(24 * time.Hour)) // a kubelet that is away for as long
	n.ca.Stop()                                    // a republish does not wait for it
	must(t, web.publish())
	_, err := n.ca.Start()
	must(t, err)
	if web.sees() == "" {
		t.Error("the pod does not have its identity back")
	}
	if must(t, unix.Stat(web.target, &after)); before.Ino != after.Ino {
		t.Error("the directory is another: the container that runs does not see it")
	}
	must(t, ended.unpublish())
	if left := ended.left(); len(left) > 0 {
		t.Errorf("of a volume that the kubelet ended, left are %v", left)
	}
	must(t, unix.Unmount(unmounted.target, 0))
	n.driver.sweep(time.Now())
	if left := unmounted.left(); len(left) != 1 || left[0] != unmounted.target {
		t.Errorf("of a volume that nobody uses, left are %v", left)
	}
	if web.sees() == "" {
		t.Error("the volume of a pod that runs was swept away")
	}
}

// TestAbandonedVolumesAreSwept: a kubelet that gave up a mount does not always say so.
func TestAbandonedVolumesAreSwept(t *testing.T) {
	n := newNode(t)
	n.csi.Timeout = 200 * time.Millisecond
	n.start()
	web, given, unmounted := n.pod("web"), n.pod("given-up"), n.pod("unmounted")
	n.csi.Timeout = 0
	n.refuse(given, refusal.New(refusal.LedgerUnavailable, "the test says so"))
	for _, p := range []*made{web, unmounted} {
		eventually(t, "it is mounted", func() bool { return p.publish() == nil })
	}
	if err := given.publish(); refusal.Of(err) != refusal.SVIDPending {
		t.Fatal(err)
	}
	must(t, unix.Unmount(unmounted.target, 0))
	n.driver.sweep(time.Now().Add(abandoned - time.Minute))
	if _, err := os.Lstat(given.dir()); err != nil {
		t.Errorf("a mount that the kubelet may come back for was swept: %v", err)
	}
	n.driver.sweep(time.Now().Add(abandoned + time.Second))
	for _, p := range []*made{given, unmounted} {
		if left := p.left(); len(left) > 0 {
			t.Errorf("left are %v", left)
		}
	}
	if web.sees() == "" || len(n.driver.all()) != 1 {
		t.Error("the volume of a pod that runs was swept away")
	}
}

// TestARepublishBringsItsToken whatever else of the call is not understood: an attribute that an agent of a later version knew,
// say. Without the token the SVID could not be renewed once the old one has ended.
func TestARepublishBringsItsToken(t *testing.T) {
	for name, change := range map[string]func(*csi.NodePublishVolumeRequest){
		"an attribute of a later version": func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["fils"] = "tls" },
		"a value of a later version":      func(r *csi.NodePublishVolumeRequest) { r.VolumeContext[attributeOptional] = "perhaps" },
		"no word of the pod":              func(r *csi.NodePublishVolumeRequest) { delete(r.VolumeContext, keyPodUID) },
		"writable":                        func(r *csi.NodePublishVolumeRequest) { r.Readonly = false },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.start()
			web := n.pod("web")
			must(t, web.publish())
			publish := func() {
				t.Helper()
				r := web.request()
				change(r)
				_, err := csi.NewNodeClient(n.conn).NodePublishVolume(t.Context(), r)
				must(t, err)
			}
			has := func() string {
				t.Helper()
				data, err := os.ReadFile(filepath.Join(web.dir(), "token"))
				must(t, err)
				return string(data)
			}
			web.freshToken(2)
			publish()
			if has() != web.token {
				t.Error("the kubelet's fresh token was thrown away")
			}
			if s := n.driver.Standing(); len(s.Faults) != 1 || refusal.Of(s.Faults[0]) != refusal.VolumeInvalid {
				t.Errorf("the fault is not shown: %v", s.Faults)
			}
			before := has()
			web.token = tokenFor("db", "other", 3)
			publish()
			if has() != before {
				t.Error("another pod's token was taken")
			}
			must(t, web.unpublish())
		})
	}
}
