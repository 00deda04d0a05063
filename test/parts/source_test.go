package parts_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestCacheSeesSource: a result that Go keeps is one of the source that there is, also where a test has it built by itself.
func TestCacheSeesSource(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "go.mod"), "module github.com/meshca/meshca\n\ngo 1.26\n", 0o644)
	write(t, filepath.Join(dir, "test/it/it_test.go"), `package it

import (
	"testing"

	"github.com/meshca/meshca/test/parts"
)

// What runs before the tests is not seen.
func TestMain(m *testing.M) {
	if p, err := parts.Start(parts.Command{Path: "true"}); err == nil {
		<-p.Done()
	}
	m.Run()
}

func Test(t *testing.T) {
	p, err := parts.Start(parts.Command{Path: "true"})
	if err != nil {
		t.Fatal(err)
	}
	<-p.Done()
}
`, 0o644)
	command := filepath.Join(dir, "cmd/some/main.go")
	write(t, command, "package main\n\nfunc main() {}\n", 0o644)
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, source := range sources {
		if strings.HasSuffix(source, "_test.go") {
			continue
		}
		text, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, "test/parts", source), string(text), 0o644)
	}
	run := func() (cached bool) {
		t.Helper()
		test := exec.CommandContext(t.Context(), "go", "test", "./test/it")
		test.Dir = dir
		out, err := test.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return strings.Contains(string(out), "(cached)")
	}
	age(t, dir, time.Hour) // what is as new as the test is not kept at all
	run()
	if !run() {
		t.Fatal("nothing has changed, and the result was not kept: this proves nothing")
	}
	write(t, command, "package main\n\nfunc main() { panic(0) }\n", 0o644)
	age(t, filepath.Dir(command), time.Minute)
	if run() {
		t.Error("a command has changed, and the result before was kept")
	}
}

func age(t *testing.T, dir string, by time.Duration) {
	t.Helper()
	then := time.Now().Add(-by)
	err := filepath.Walk(dir, func(path string, _ os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, then, then)
	})
	if err != nil {
		t.Fatal(err)
	}
}
