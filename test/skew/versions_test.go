// Package skew runs an agent and a CA of different versions together: this one, and the one before it. An upgrade has
// either order on some node for a while.
package skew

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/test/parts"
)

// version is a folder with the binaries of one.
type version struct{ name, bin string }

// current builds this checkout.
func current(t *testing.T) version {
	t.Helper()
	root, err := parts.Root()
	check(t, err)
	return build(t, "current", root)
}

// previous builds the version before this one: the commit that the file of that name holds. A release writes its own commit
// into it, so that what is tested next is the step from that release.
func previous(t *testing.T) version {
	t.Helper()
	root, err := parts.Root()
	check(t, err)
	text, err := os.ReadFile("previous")
	check(t, err)
	commit := strings.TrimSpace(string(text))
	dir := t.TempDir()
	if err := checkout(root, commit, dir); err != nil {
		why := fmt.Sprintf("the previous version, commit %s, is not in this clone (%v): git fetch --unshallow", commit, err)
		if os.Getenv("CI") == "true" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	return build(t, "previous", dir)
}

// checkout writes a commit's files into dir; the repository stays as it is.
func checkout(root, commit, dir string) error {
	archive := exec.Command("git", "-C", root, "archive", commit, "--", "go.mod", "go.sum", "agent", "api", "attestor", "ca", "cmd", "rotation")
	unpack := exec.Command("tar", "-x", "-C", dir)
	from, to := io.Pipe()
	var problems strings.Builder
	archive.Stdout, archive.Stderr, unpack.Stdin = to, &problems, from
	if err := unpack.Start(); err != nil {
		return err
	}
	err := archive.Run()
	_ = to.CloseWithError(err)
	if unpacked := unpack.Wait(); err == nil {
		err = unpacked
	}
	if err != nil {
		return errors.Join(err, errors.New(strings.TrimSpace(problems.String())))
	}
	return nil
}

func build(t *testing.T, name, source string) version {
	t.Helper()
	v := version{name, t.TempDir()}
	parts.SeeSource()
	cmd := exec.Command("go", "build", "-o", v.bin+"/", "./cmd/meshca", "./cmd/meshca-agent", "./cmd/certctl")
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath -buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the %s version: %v\n%s", name, err, out)
	}
	return v
}

func (v version) path(program string) string { return filepath.Join(v.bin, program) }
