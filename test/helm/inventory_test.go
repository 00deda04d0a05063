package helm_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/meshca/meshca/test/helm"
)

// fleeting are kinds whose objects come and go by themselves on any cluster.
var fleeting = []string{"events", "events.events.k8s.io", "leases.coordination.k8s.io"}

// inventory lists all objects of all kinds in the cluster: kind, namespace, name.
func inventory(t *testing.T, s *helm.Site) []string {
	t.Helper()
	kinds := strings.Fields(must(s.Kubectl(t.Context(), "api-resources", "--verbs=list", "-o", "name"))(t))
	if len(kinds) < 40 {
		t.Fatalf("the cluster has %d kinds: %q", len(kinds), kinds)
	}
	var all []string
	for _, kind := range kinds {
		if slices.Contains(fleeting, kind) {
			continue
		}
		out := must(s.Kubectl(t.Context(), "get", kind, "--all-namespaces", "--ignore-not-found", "-o",
			`jsonpath={range .items[*]}{.kind} {.metadata.namespace}/{.metadata.name}{"\n"}{end}`))(t)
		for line := range strings.Lines(out) {
			all = append(all, kind+" "+strings.TrimSpace(line))
		}
	}
	return all
}

// hostTraces are the files, directories, sockets and mounts on the node that are meshca's, but for the runtime directory itself,
// which the kubelet makes and which lies in memory: empty, it stays till the next boot.
func hostTraces(t *testing.T, s *helm.Site) []string {
	t.Helper()
	var found []string
	for _, dir := range []string{"/run", "/var/lib/kubelet", "/var/lib"} {
		base := s.Path(dir)
		_ = filepath.WalkDir(base, func(path string, entry fs.DirEntry, err error) error {
			if err != nil {
				return nil //nolint:nilerr // gone meanwhile
			}
			rel := strings.TrimPrefix(path, base)
			switch {
			case entry.IsDir() && (rel == "/node" || rel == "/parts" || rel == "/containerd" || rel == "/volumes" || dir == "/var/lib" && rel == "/kubelet"):
				return filepath.SkipDir
			case strings.Contains(rel, "meshca") && dir+rel != "/run/meshca-agent":
				found = append(found, dir+rel)
			}
			return nil
		})
	}
	mounts := must(os.ReadFile(s.Path("/proc/1/mountinfo")))(t)
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 4 && (strings.Contains(fields[3], "meshca-agent") || strings.Contains(fields[4], "meshca-agent") || strings.Contains(fields[4], "kubernetes.io~csi")) {
			found = append(found, "mount "+fields[4])
		}
	}
	return found
}
