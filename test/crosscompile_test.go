package test

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/meshca/meshca/test/parts"
)

// TestCrossCompile builds what a release consists of, for every platform it is for. Binaries for Linux are static: they
// run in an image that holds nothing else.
func TestCrossCompile(t *testing.T) {
	everything := []string{"meshca", "meshca-agent", "certctl"}
	for _, target := range []struct {
		os, arch string
		commands []string
	}{
		{"linux", "amd64", everything},
		{"linux", "arm64", everything},
		{"darwin", "amd64", []string{"certctl"}},
		{"darwin", "arm64", []string{"certctl"}},
		{"windows", "amd64", []string{"certctl"}},
		{"windows", "arm64", []string{"certctl"}},
	} {
		t.Run(target.os+"-"+target.arch, func(t *testing.T) {
			dir := t.TempDir()
			args := []string{"build", "-trimpath", "-ldflags=-s -w", "-o", dir + string(filepath.Separator)}
			for _, command := range target.commands {
				args = append(args, module+"/cmd/"+command)
			}
			parts.SeeSource()
			build := exec.CommandContext(t.Context(), "go", args...)
			build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+target.os, "GOARCH="+target.arch)
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("it does not build: %v\n%s", err, out)
			}
			for _, command := range target.commands {
				switch target.os {
				case "linux":
					expectStatic(t, filepath.Join(dir, command))
				case "windows":
					command += ".exe"
				}
				if info, err := os.Stat(filepath.Join(dir, command)); err != nil || info.Size() == 0 {
					t.Errorf("no binary came of %s: %v", command, err)
				}
			}
		})
	}
}

// expectStatic fails where the binary asks for a loader or a library.
func expectStatic(t *testing.T, binary string) {
	t.Helper()
	f, err := elf.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			t.Errorf("%s asks for a dynamic loader", filepath.Base(binary))
		}
	}
	if libraries, err := f.ImportedLibraries(); err != nil || len(libraries) > 0 {
		t.Errorf("%s asks for libraries %v (error %v)", filepath.Base(binary), libraries, err)
	}
}
