package csi

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/api/refusal"
)

// move has the next agent use another runtime directory.
func (n *node) move() {
	n.config.RuntimeDir = n.path("moved")
	n.csi.Dir = n.path("moved/pods")
}

// faults are the reasons of what is wrong with volumes.
func (n *node) faults() (list []refusal.Reason) {
	for _, f := range n.driver.Standing().Faults {
		list = append(list, refusal.Of(f))
	}
	return list
}

// TestARepublishToAnAgentOfAnotherDirectory, or to one whose directory was wiped, is a republish all the same: what is
// mounted at the target says so. The pod is taken over, and whoever looks is told that containers that run do not see it.
func TestARepublishToAnAgentOfAnotherDirectory(t *testing.T) {
	for name, change := range map[string]func(*node){
		"another directory": (*node).move,
		"a wiped one":       func(n *node) { must(n.t, os.RemoveAll(n.csi.Dir)) },
		"of somebody else": func(n *node) {
			must(n.t, os.RemoveAll(n.csi.Dir))
			all, err := mounts()
			must(n.t, err)
			for _, m := range all {
				if strings.HasSuffix(m.at, "/mount") && within(n.path("kubelet"), m.at) {
					must(n.t, unix.Unmount(m.at, 0))
					must(n.t, unix.Mount("tmpfs", m.at, "tmpfs", 0, ""))
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.start()
			web, ended := n.pod("web"), n.pod("ended")
			must(t, web.publish())
			must(t, ended.publish())
			n.halt()
			change(n)
			n.ca.Stop() // a republish does not wait for it
			n.start()
			must(t, ended.unpublish())
			if left := ended.left(); len(left) > 0 {
				t.Errorf("of a volume that the kubelet ended, left are %v", left)
			}
			r := web.request()
			delete(r.VolumeContext, keyPodUID)
			_, err := csi.NewNodeClient(n.conn).NodePublishVolume(t.Context(), r) // nothing can be done about it
			must(t, err)
			if log := n.log.String(); !strings.Contains(log, "the kubelet did not say") {
				t.Error("what is wrong is told nowhere")
			}
			web.freshToken(2)
			must(t, web.publish())
			if saved, err := os.ReadFile(filepath.Join(web.dir(), "token")); err != nil || string(saved) != web.token {
				t.Errorf("the token is not in use: %v", err)
			}
			if got := n.faults(); !slices.Contains(got, refusal.VolumeReplaced) {
				t.Errorf("shown are %v", got)
			}
			_, err = n.ca.Start()
			must(t, err)
			if web.sees() == "" {
				t.Error("the pod is not served")
			}
			if all, err := mounts(); err != nil || strings.Count(placesOf(all), web.target+"\n") != 1 {
				t.Errorf("mounted are %s", placesOf(all))
			}
			n.halt()
			n.start()
			must(t, web.publish())
			if got := n.faults(); !slices.Equal(got, []refusal.Reason{refusal.VolumeReplaced}) {
				t.Errorf("the next run shows %v: the containers are those of before", got)
			}
			must(t, web.unpublish())
			if left := web.left(); len(left) > 0 || n.kept() > 0 || len(n.faults()) > 0 {
				t.Errorf("left are %v, %d keys and %v", left, n.kept(), n.faults())
			}
		})
	}
}

func placesOf(all []mountPoint) string {
	var b strings.Builder
	for _, m := range all {
		b.WriteString(m.at + "\n")
	}
	return b.String()
}

// TestATakeoverGivesNobodyAnothersIdentity: what lies in a volume's directory is not for whoever names the volume.
func TestATakeoverGivesNobodyAnothersIdentity(t *testing.T) {
	n := newNode(t)
	n.csi.Timeout = time.Second
	n.start()
	web, evil := n.pod("web"), n.pod("evil")
	eventually(t, "it is mounted", func() bool { return web.publish() == nil })
	n.halt()
	must(t, os.WriteFile(filepath.Join(web.dir(), "state.json"), []byte("{"), 0o600))
	n.start()
	must(t, os.Mkdir(evil.target, 0o750))
	must(t, unix.Mount("tmpfs", evil.target, "tmpfs", 0, ""))
	evil.volume = web.volume
	r := evil.request()
	delete(r.VolumeContext, keyTokens)
	_, err := csi.NewNodeClient(n.conn).NodePublishVolume(t.Context(), r)
	must(t, err)
	if token, err := os.ReadFile(filepath.Join(web.dir(), "token")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a token of %d bytes that the pod did not show is used for it", len(token))
	}
	must(t, evil.unpublish())

	// What was begun elsewhere, and no pod has, makes room.
	begun := n.pod("begun")
	n.refuse(begun, refusal.New(refusal.LedgerUnavailable, "the test says so"))
	if err := begun.publish(); refusal.Of(err) != refusal.SVIDPending {
		t.Fatal(err)
	}
	next := begun.another(1)
	next.volume = begun.volume
	must(t, os.MkdirAll(next.target, 0o750))
	must(t, unix.Mount("tmpfs", next.target, "tmpfs", 0, ""))
	must(t, next.publish())
	if !newVolume(n.csi.Dir, keyOf(next.volume)).at(next.target) {
		t.Error("the pod does not have what was made for it")
	}
	if _, err := os.Stat(begun.target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something is mounted where nobody asked for it: %v", err)
	}

	// Outside of the kubelet's directory a mount says nothing.
	outside := n.pod("outside")
	outside.target = n.path("outside")
	must(t, os.Mkdir(outside.target, 0o750))
	must(t, unix.Mount("tmpfs", outside.target, "tmpfs", 0, ""))
	for _, err := range []error{outside.publish(), outside.unpublish()} {
		if refusal.Of(err) != refusal.VolumeInvalid {
			t.Errorf("a mount point elsewhere: %v", err)
		}
	}
}

// TestARepublishAfterAMountWasLost while the agent was away. A reboot loses mounts, too, and then it is a first one.
func TestARepublishAfterAMountWasLost(t *testing.T) {
	for name, boots := range map[string][2]string{"in the same boot": {"one", "one"}, "in another": {"one", "two"}, "where boots have no name": {"", ""}} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.boot = &boots[0]
			n.start()
			web, given := n.pod("web"), n.pod("given-up")
			must(t, web.publish())
			n.ca.Stop()
			n.halt()
			must(t, unix.Unmount(web.target, 0))
			n.boot, n.csi.Timeout = &boots[1], 1
			n.start()
			if boots[1] != "one" {
				if err := web.publish(); refusal.Of(err) != refusal.SVIDPending {
					t.Errorf("the first mount after a reboot is taken for a republish: %v", err)
				}
				return
			}
			web.freshToken(2)
			must(t, web.publish())
			if web.sees() == "" {
				t.Error("the pod is not served what was held")
			}
			if got := n.faults(); len(got) > 0 {
				t.Errorf("shown are %v: the directory is that of before", got)
			}
			if err := given.publish(); refusal.Of(err) != refusal.SVIDPending {
				t.Errorf("a first mount: %v", err)
			}
			n.halt()
			n.start()
			if err := given.publish(); refusal.Of(err) != refusal.SVIDPending {
				t.Errorf("a first mount that an earlier run began: %v", err)
			}
		})
	}
}
