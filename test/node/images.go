package node

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/meshca/meshca/test/parts"
)

// nonroot is the user of images that need no root; what distroless images call so.
const nonroot = "65532:65532"

// Tool is localhost/inpod:test, with what tests have done in pods: see test/node/inpod. Every node has it.
func Tool(ctx context.Context, dir string) (Image, error) {
	return Programs(ctx, "localhost/inpod:test", dir, "./test/node/inpod")
}

// Programs makes an image of commands of this module. The first is the entrypoint.
func Programs(ctx context.Context, name, dir string, packages ...string) (Image, error) {
	image := Image{Name: name, Entrypoint: []string{"/" + path.Base(packages[0])}, Files: map[string]string{}}
	for _, pkg := range packages {
		binary := filepath.Join(dir, path.Base(pkg))
		if err := build(ctx, binary, pkg); err != nil {
			return image, err
		}
		image.Files["/"+path.Base(pkg)] = binary
	}
	return image, nil
}

// How commands are built; the Makefile and deploy/Dockerfile add the version.
const (
	buildFlags = "-ldflags=-s -w"
	goFlags    = "-trimpath -buildvcs=false"
)

// build builds a command of this module as the Makefile does, so that Go's cache serves both.
func build(ctx context.Context, out, pkg string) error {
	root, err := parts.Root()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", buildFlags, "-o", out, pkg)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS="+goFlags)
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, text)
	}
	return nil
}

// Envoy is localhost/envoy:test, with the libraries that this machine's loader finds for it.
func Envoy(ctx context.Context) (Image, error) {
	image := Image{Name: "localhost/envoy:test", Entrypoint: []string{"/envoy"}, User: nonroot}
	binary, err := parts.Find("envoy")
	if err != nil {
		return image, err
	}
	ldd, err := lookPath("ldd")
	if err != nil {
		return image, err
	}
	out, err := exec.CommandContext(ctx, ldd, binary).CombinedOutput()
	if err != nil {
		return image, fmt.Errorf("ldd %s: %w: %s", binary, err, out)
	}
	image.Files = map[string]string{"/envoy": binary}
	for _, library := range libraries(string(out)) {
		image.Files[library] = library
	}
	return image, nil
}

// libraries reads what ldd prints: "libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x…)", and the loader alone.
func libraries(ldd string) []string {
	var found []string
	for line := range strings.Lines(ldd) {
		fields := strings.Fields(line)
		for i, field := range fields {
			if strings.HasPrefix(field, "/") && (i == 0 || fields[i-1] == "=>") {
				found = append(found, field)
			}
		}
	}
	return found
}
