package parts_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/test/parts"
)

func TestFind(t *testing.T) {
	checkout, elsewhere := t.TempDir(), t.TempDir()
	write(t, filepath.Join(checkout, "go.mod"), "module github.com/meshca/meshca\n\ngo 1.26\n", 0o644)
	inner := filepath.Join(checkout, "test", "demo")
	write(t, filepath.Join(inner, "go.mod"), "module github.com/meshca/meshca/test/demo\n", 0o644)
	t.Chdir(inner)
	t.Setenv("PATH", elsewhere)

	_, err := parts.Find("etcd")
	if err == nil || !strings.Contains(err.Error(), "make parts") {
		t.Fatalf("nothing stands anywhere: got error %v, want one that names `make parts`", err)
	}

	onPath := filepath.Join(elsewhere, "etcd")
	write(t, onPath, "#!/bin/sh\n", 0o755)
	built := filepath.Join(checkout, ".parts", "bin", "etcd")
	write(t, built, "not a program", 0o644)
	expect(t, "only the PATH has a program", onPath)

	if err := os.Chmod(built, 0o755); err != nil {
		t.Fatal(err)
	}
	expect(t, "the checkout has one too", built)
}

func TestRootOutsideACheckout(t *testing.T) {
	t.Chdir(t.TempDir())
	if root, err := parts.Root(); err == nil {
		t.Fatalf("got %s, want an error", root)
	}
}

func expect(t *testing.T, when, want string) {
	t.Helper()
	got, err := parts.Find("etcd")
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	if got != want {
		t.Errorf("%s: got %s, want %s", when, got, want)
	}
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}
