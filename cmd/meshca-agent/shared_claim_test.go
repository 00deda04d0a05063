package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/agent/pods"
	"github.com/meshca/meshca/attestor/unixpeer"
)

// The two do not know each other, and must mean the same.
func TestThePeersThatNobodySees(t *testing.T) {
	if pods.Invisible != unixpeer.Invisible {
		t.Errorf("%q is not %q", pods.Invisible, unixpeer.Invisible)
	}
}

// Switched off, the agent takes away what one before it left where the socket is by default, unless something else is there.
func TestASharedSocketThatIsOff(t *testing.T) {
	whole := &Config{RuntimeDir: "/run/meshca-agent", StateDir: "/var/lib/meshca-agent", AdminSocket: "/run/meshca-agent/admin.sock"}
	if _, is := whole.SharedSocket.source(whole, slog.New(slog.DiscardHandler)).(pods.Leftovers); !is {
		t.Error("what is left stays")
	}
	whole.Workloads = []WorkloadConfig{{Socket: "/run/meshca-agent/shared/agent.sock"}}
	if s := whole.SharedSocket.source(whole, slog.New(slog.DiscardHandler)); s != nil {
		t.Errorf("a workload's socket is taken for what is left: %v", s)
	}
	whole.Workloads, whole.SharedSocket.Enabled = nil, true
	if _, is := whole.SharedSocket.source(whole, slog.New(slog.DiscardHandler)).(*pods.Source); !is {
		t.Error("switched on, it is not there")
	}
}

// What a directory is named does not tell what it is: /var/run is a link to /run nearly everywhere.
func TestASharedSocketBehindALink(t *testing.T) {
	dir := t.TempDir()
	for _, err := range []error{
		os.MkdirAll(filepath.Join(dir, "run/agent"), 0o755), os.Mkdir(filepath.Join(dir, "own"), 0o755),
		os.Symlink(filepath.Join(dir, "run"), filepath.Join(dir, "varrun")), os.Symlink("../own/token", filepath.Join(dir, "run/token")),
		os.WriteFile(filepath.Join(dir, "own/token"), nil, 0o600),
		os.Symlink("../later/new", filepath.Join(dir, "own/pub")), os.Symlink("../varrun/agent/new/..", filepath.Join(dir, "own/all")),
		os.Symlink(filepath.Join(dir, "state"), filepath.Join(dir, "later")),
		os.Symlink(filepath.Join(dir, "run/agent/keys"), filepath.Join(dir, "pub")), os.Symlink("round", filepath.Join(dir, "round")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for socket, want := range map[string]string{
		"varrun/agent/agent.sock":          "holds keys",
		"varrun/agent/keys/new/agent.sock": "lies in " + dir + "/run/agent/keys",
		"varrun/agent.sock":                "holds keys",
		"own/agent.sock":                   "holds the agent's token",
		"varrun/agent/shared/agent.sock":   "",
		"varrun/agents/agent.sock":         "",
		"pub/agent.sock":                   "lies in " + dir + "/run/agent/keys", // which is not there yet
		"later/agent.sock":                 "holds the trust bundle",
		"own/pub/agent.sock":               "",
		"own/pub/streams/agent.sock":       "",
		"own/all/streams/agent.sock":       "lies in " + dir + "/run/agent/streams",
		"round/agent.sock":                 "",
	} {
		whole := &Config{
			RuntimeDir: dir + "/run/agent", StateDir: dir + "/state", AdminSocket: dir + "/run/agent/admin.sock", TokenFile: dir + "/run/token",
			BundleFile: dir + "/etc/bundle", SharedSocket: SharedSocketConfig{Enabled: true, Path: filepath.Join(dir, socket)},
		}
		if err := whole.SharedSocket.check(whole); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", socket, err, want)
		}
	}
}
