package csi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/meshca/meshca/api/refusal"
)

// another is one more volume of the pod.
func (p *made) another(i int) *made {
	next := *p
	next.target, next.volume = fmt.Sprintf("%s-%d", p.target, i), fmt.Sprintf("%s-%d", p.volume, i)
	return &next
}

// Each volume is an SVID twice in a life, a socket and its memory: nobody needs them without an end.
func TestVolumesOfOnePodAreBounded(t *testing.T) {
	n := newNode(t)
	n.start()
	greedy := n.pod("greedy")
	for i := range maxPerPod {
		must(t, greedy.another(i).publish())
	}
	last := greedy.another(maxPerPod)
	err := last.publish()
	if refusal.Of(err) != refusal.VolumeInvalid || !strings.Contains(err.Error(), "pod shop/greedy has 16 volumes of csi.meshca.io, as many as it may") {
		t.Errorf("the next one: %v", err)
	}
	if left := last.left(); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
	must(t, n.pod("modest").publish())
	must(t, greedy.another(3).publish()) // a republish

	n.halt()
	n.start()
	if err := last.publish(); refusal.Of(err) != refusal.VolumeInvalid {
		t.Errorf("after a restart: %v", err)
	}
	must(t, greedy.another(3).unpublish())
	must(t, last.publish())
}

// How often SVIDs are signed is for policy to say. A pod that stands with such a volume keeps it, and its fresh tokens.
func TestAVolumeCannotAskForTheShortestLives(t *testing.T) {
	n := newNode(t)
	n.start()
	web := n.pod("web")
	for ttl, good := range map[string]bool{"5s": false, "9m59s": false, "10m": true} {
		web.attributes[attributeTTL] = ttl
		err := web.publish()
		if good {
			must(t, err)
		} else if refusal.Of(err) != refusal.VolumeInvalid || !strings.Contains(err.Error(), "less than the 10m0s") || !strings.Contains(err.Error(), "policy") {
			t.Errorf("ttl %s: %v", ttl, err)
		}
		must(t, web.unpublish())
	}
	web.attributes[attributeTTL] = "1h"
	must(t, web.publish())
	web.attributes[attributeTTL] = "5s"
	web.freshToken(2)
	must(t, web.publish())
	if saved, err := os.ReadFile(web.dir() + "/token"); err != nil || string(saved) != web.token {
		t.Errorf("the fresh token is not in use: %v", err)
	}
}

// A free turn is taken, also for a call that comes while the agent stops.
func TestARepublishFindsItsTurnWhileTheAgentStops(t *testing.T) {
	d, err := New(Config{Version: "v0-test", Dir: "/run/none"})
	must(t, err)
	ended, end := context.WithCancel(t.Context())
	end()
	for range 100 { // by chance each other one would fail
		_, release, err := d.take(ended, keyOf("volume"))
		must(t, err)
		release()
	}
	_, release, err := d.take(t.Context(), keyOf("volume"))
	must(t, err)
	if _, _, err := d.take(ended, keyOf("volume")); refusal.Of(err) != refusal.CallEnded {
		t.Errorf("a turn that is not free: %v", err)
	}
	release()
	if len(d.volumes) > 0 {
		t.Errorf("%d volumes are remembered that nobody has", len(d.volumes))
	}
}

func TestVolumesAreLabelled(t *testing.T) {
	n := newNode(t)
	var labelled []string
	n.label = func(path string) error { labelled = append(labelled, path); return nil }
	n.start()
	web := n.pod("web")
	must(t, web.publish())
	if want := web.dir() + "/mount"; !slices.Contains(labelled, want) {
		t.Errorf("labelled are %v, not %s: with SELinux no container could enter it", labelled, want)
	}
	n.halt()
	n.label = func(string) error { return errors.New("no such label") }
	n.start()
	db := n.pod("db")
	if err := db.publish(); refusal.Of(err) != refusal.MountFailed || !strings.Contains(err.Error(), "no such label") {
		t.Errorf("a directory that no container could enter is mounted: %v", err)
	}
}
