// Package systemd holds the systemd units to what systemd itself says of them, and to what the daemons do.
package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/meshca/meshca/test/parts"
)

// exposure is the most that systemd-analyze may give a unit, in tenths of its points, of which ten are the worst. The
// agent is root.
var exposure = map[string]string{"meshca.service": "15", "meshca-agent.service": "30"}

// TestUnits has systemd read the units, as far as the machine has it.
func TestUnits(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("systemd-analyze is missing (Debian: apt-get install systemd)")
		}
		t.Skip("systemd-analyze is missing (Debian: apt-get install systemd)")
	}
	for unit, most := range exposure {
		// Its program has to be there: it is looked for.
		text := regexp.MustCompile(`(?m)^ExecStart=/usr/bin/\S+`).ReplaceAllString(read(t, "deploy/systemd/"+unit), "ExecStart=/bin/true")
		file := filepath.Join(t.TempDir(), unit)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(analyze, "verify", "--man=no", "--recursive-errors=no", file).CombinedOutput()
		if err != nil || strings.Contains(string(out), unit) {
			t.Errorf("systemd-analyze verify %s: %v\n%s", unit, err, out)
		}
		if out, err := exec.Command(analyze, "security", "--offline=yes", "--threshold="+most, file).CombinedOutput(); err != nil {
			t.Errorf("systemd-analyze security %s: %v\n%s", unit, err, out)
		}
	}
}

// TestTheAgentsKeysOutliveAStop: proxies live on while the unit is stopped, and hold what its runtime directory tells of.
func TestTheAgentsKeysOutliveAStop(t *testing.T) {
	unit := read(t, "deploy/systemd/meshca-agent.service")
	for _, line := range []string{"RuntimeDirectory=meshca-agent", "RuntimeDirectoryPreserve=yes"} {
		if !slices.Contains(strings.Split(unit, "\n"), line) {
			t.Errorf("the unit lacks %s", line)
		}
	}
}

// TestPlaces: what the daemons write, by the examples of their configuration and their defaults, lies where the units let
// them.
func TestPlaces(t *testing.T) {
	for unit, test := range map[string]struct {
		example  string
		defaults map[string]string
		written  []string
	}{
		"meshca.service": {"docs/examples/meshca.yaml",
			map[string]string{"stateDir": "/var/lib/meshca", "adminSocket": "/run/meshca/admin.sock"},
			[]string{"stateDir", "adminSocket", "bundleFile", "audit.file"}},
		"meshca-agent.service": {"docs/examples/meshca-agent.yaml",
			map[string]string{"stateDir": "/var/lib/meshca-agent", "runtimeDir": "/run/meshca-agent"},
			[]string{"stateDir", "runtimeDir", "workloads.0.socket"}},
	} {
		allowed := places(read(t, "deploy/systemd/"+unit))
		var config any
		if err := yaml.Unmarshal([]byte(read(t, test.example)), &config); err != nil {
			t.Fatal(err)
		}
		for _, key := range test.written {
			path, ok := at(config, key)
			if !ok {
				path = test.defaults[key]
			}
			if path == "" {
				t.Errorf("%s has no %s", test.example, key)
			}
			if !below(path, allowed) {
				t.Errorf("%s: %s is %s, and the unit lets it write in %q alone", unit, key, path, allowed)
			}
		}
	}
	if below("/etc/x", []string{"/var/lib/meshca"}) || !below("/var/lib/meshca", []string{"/var/lib/meshca"}) || below("/var/lib/meshca2", []string{"/var/lib/meshca"}) {
		t.Error("below does not tell what is below")
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	root, err := parts.Root()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// places are the directories that a unit makes or lets be written.
func places(unit string) (dirs []string) {
	for line := range strings.Lines(unit) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if parent, ok := map[string]string{"StateDirectory": "/var/lib/", "RuntimeDirectory": "/run/", "LogsDirectory": "/var/log/", "ReadWritePaths": ""}[key]; ok {
			dirs = append(dirs, parent+value)
		}
	}
	return dirs
}

func at(config any, key string) (string, bool) {
	for name := range strings.SplitSeq(key, ".") {
		switch c := config.(type) {
		case map[string]any:
			config = c[name]
		case []any:
			config = c[int(name[0]-'0')]
		}
	}
	s, ok := config.(string)
	return s, ok
}

func below(path string, dirs []string) bool {
	for _, dir := range dirs {
		if path == dir || strings.HasPrefix(path, dir+"/") {
			return true
		}
	}
	return false
}
