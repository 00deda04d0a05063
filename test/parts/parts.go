// Package parts finds the real servers that the tests run against (Envoy, etcd, kube-apiserver …) and runs them so that
// none outlives its test. `make parts` gets them into .parts/bin of the repository.
package parts

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Path is the part's binary. The test fails, it is not skipped, where the part is absent.
func Path(t testing.TB, name string) string {
	t.Helper()
	path, err := Find(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Find is Path for programs that are no tests. What stands in the repository's .parts/bin comes before the PATH.
func Find(name string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, ".parts", "bin", name)
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
		return path, nil
	}
	if elsewhere, err := exec.LookPath(name); err == nil {
		return filepath.Abs(elsewhere)
	}
	return "", fmt.Errorf("%s is neither at %s nor on the PATH: run `make parts`", name, path)
}

// Root is the repository's root: the nearest folder upwards whose go.mod is the main module's. Folders below it hold
// modules of their own.
func Root() (string, error) {
	SeeSource()
	return findRoot()
}

func findRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(mod), "module github.com/meshca/meshca\n") {
			return dir, nil
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("not inside meshca's repository: run this from a folder of its working tree")
		}
		dir = up
	}
}
