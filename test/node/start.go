package node

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/test/parts"
)

// Start starts a node that ends with the test. Where the machine cannot run one the test is skipped, in CI it fails. What
// the node's programs and pods printed is kept when the test fails.
func Start(t testing.TB) *Node {
	t.Helper()
	if missing := Missing(); len(missing) > 0 {
		passOver(t, missing)
	}
	n, err := Launch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			kept, err := n.keepLogs(t.Name())
			t.Logf("what the node and its pods printed: %s (%v)", kept, err)
		}
		if err := n.Close(); err != nil {
			t.Errorf("taking the node away: %v", err)
		}
	})
	t.Logf("the node was Ready after %v", n.Took.Round(10*time.Millisecond))
	return n
}

// passOver ends a test that cannot run here. In CI a test that did not run would be taken for one that passed.
func passOver(t testing.TB, missing []string) {
	t.Helper()
	why := "a Kubernetes node cannot run here: " + strings.Join(missing, "; ")
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// keepLogs copies the logs to a folder of the checkout, named after the test, in place of those of its last failure.
func (n *Node) keepLogs(test string) (string, error) {
	root, err := parts.Root()
	if err != nil {
		return "", err
	}
	kept := filepath.Join(root, ".logs", strings.ReplaceAll(test, "/", "-"))
	if err := os.RemoveAll(kept); err != nil {
		return kept, err
	}
	if err := os.CopyFS(filepath.Join(kept, "programs"), os.DirFS(n.Logs())); err != nil {
		return kept, err
	}
	// Only kubelet makes this one. The links to its files that stand beside it are left out.
	if pods := filepath.Join(n.place.dir, "log", "pods"); exists(pods) {
		if err := os.CopyFS(filepath.Join(kept, "pods"), os.DirFS(pods)); err != nil {
			return kept, err
		}
	}
	if n.Clientset == nil {
		return kept, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	for file, args := range map[string][]string{"events.txt": {"events", "-A"}, "pods.yaml": {"get", "pods", "-A", "-o", "yaml"}} {
		text, err := n.Kubectl(ctx, args...)
		if err != nil {
			text += err.Error()
		}
		if err := os.WriteFile(filepath.Join(kept, file), []byte(text), 0o644); err != nil {
			return kept, err
		}
	}
	return kept, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
