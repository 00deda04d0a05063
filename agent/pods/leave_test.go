package pods

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
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

// longAway has a pod whose connections are closed be away for longer than any proxy is that comes back.
func (n *node) longAway(uid string) {
	n.t.Helper()
	n.eventually("its connections are closed", func() bool {
		n.source.mu.Lock()
		defer n.source.mu.Unlock()
		p := n.source.served[uid]
		if p.kept.Open() > 0 {
			return false
		}
		p.seen, n.source.since = p.seen.Add(-away), n.source.since.Add(-away)
		return true
	})
}

// sentAway has a peer come that is not told, by the test's word.
func (n *node) sentAway(word string) {
	n.t.Helper()
	began := time.Now()
	conn, err := net.Dial("unix", n.socket())
	must(n.t, err)
	_, err = conn.Write([]byte(word + uidA[len(word):]))
	must(n.t, err)
	_, _ = conn.Read(make([]byte, 1))
	must(n.t, conn.Close())
	n.eventually("it was sent away", func() bool {
		n.source.mu.Lock()
		defer n.source.mu.Unlock()
		return n.source.at.After(began)
	})
}

// An agent cannot know whether it ends for good. Pods that use the socket are served by the next one, also with the CA
// gone; of those that do not nothing stays, and where there is none of the agent neither.
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
	n.longAway(uidB)
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
	n.longAway(uidA)
	n.stop()
	if left := n.left(); left != nil {
		t.Errorf("left are %q", left)
	}
}

// The next one may end before the proxies are back: until then what they have is theirs, and it is known that they have a
// bundle.
func TestAnAgentThatEndsAgainKeepsWhoMayComeBack(t *testing.T) {
	for what, again := range map[string]func(n *node, p *proxy){
		"the end of the run before cut them off": func(n *node, p *proxy) {
			n.stop()
			n.start()
			must(n.t, p.conn.Close())
			n.stop()
		},
		"they were cut off before the end": func(n *node, p *proxy) {
			must(n.t, p.conn.Close())
			n.eventually("the connection is closed", func() bool {
				n.source.mu.Lock()
				defer n.source.mu.Unlock()
				return n.source.served[uidA].kept.Open() == 0
			})
			n.stop()
		},
		"the socket was not open": func(n *node, p *proxy) {
			n.stop()
			must(n.t, p.conn.Close())
			n.label = func(string) error { return errors.New("the test says so") }
			n.begin()
			n.eventually("it failed to open", func() bool { return strings.Contains(n.source.Standing().NotReady.Error(), "the test says so") })
			n.longAway(uidA)
			n.stop()
			n.label = nil
		},
		"nobody could be told": func(n *node, p *proxy) {
			n.stop()
			must(n.t, p.conn.Close())
			n.start()
			n.sentAway("-?")
			n.longAway(uidA)
			n.stop()
		},
		"nobody was found": func(n *node, p *proxy) {
			n.stop()
			must(n.t, p.conn.Close())
			n.start()
			n.longAway(uidA)
			n.sentAway("-") // as below a wrong cgroupRoot
			n.stop()
		},
	} {
		t.Run(what, func(t *testing.T) {
			n := newNode(t)
			n.config.CleanUp = true
			n.ca.Pod(uidA, "/ns/shop/sa/a")
			n.start()
			p := n.connect(uidA)
			had := p.served()
			must(t, p.stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA"}, TypeUrl: secretType}))
			if _, err := p.stream.Recv(); err != nil {
				t.Fatal(err)
			}
			again(n, p)
			if streams, _ := os.ReadDir(n.path("run/streams")); len(streams) != 1 || len(n.keys()) != 1 {
				t.Fatalf("kept are %q, and that streams are awaited: %q", n.keys(), streams)
			}
			n.ca.Stop()
			n.start()
			if n.connect(uidA).served() != had {
				t.Error("who comes back is served something else")
			}
		})
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
