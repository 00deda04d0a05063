package readme

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/parts"
)

func TestREADME(t *testing.T) {
	root, err := parts.Root()
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	snippets, err := Parse(string(readme), Here)
	if err != nil {
		t.Fatal(err)
	}
	if len(snippets) < 3 {
		t.Fatalf("the README has %d blocks that are marked to run: the test would prove little", len(snippets))
	}
	s := session{dir: copyOf(t, root), whole: t}
	for _, sn := range snippets {
		t.Run(fmt.Sprintf("line %d", sn.Line), func(t *testing.T) { s.expect(t, sn) })
	}
}

// session runs blocks one after the other in one directory, as a person would.
type session struct {
	dir   string
	whole *testing.T // what blocks leave in the background ends with it
}

// patience is how long a block that shows something may need until it does: what a block before it started in the
// background comes up meanwhile, as it does while a person types.
const patience = 20 * time.Second

func (s session) expect(t *testing.T, sn Snippet) {
	t.Helper()
	var output, lacks string
	for end := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		var err error
		output, err = s.run(t, sn.Commands)
		if lacks = Missing(output, sn.Shows); err == nil && lacks == "" {
			return
		}
		if sn.Shows == nil || time.Now().After(end) {
			t.Fatalf("%s\n\nerror: %v\nmissing: %q\nprinted:\n%s", sn.Commands, err, lacks, output)
		}
	}
}

// run runs one block.
func (s session) run(t *testing.T, commands string) (string, error) {
	t.Helper()
	// A file, not a pipe: a pipe would be waited for until the background lets go of it too.
	log, err := os.Create(filepath.Join(t.TempDir(), "output"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", commands)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	group := -cmd.Process.Pid
	cmd.Cancel = func() error { return syscall.Kill(group, syscall.SIGKILL) }
	s.whole.Cleanup(func() { end(group) })
	err = cmd.Wait()
	output, readErr := os.ReadFile(log.Name())
	return string(output), errors.Join(err, readErr)
}

// end ends a process group: politely, then for good.
func end(group int) {
	for range 50 {
		if err := syscall.Kill(group, syscall.SIGTERM); err != nil { // nobody is left
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	_ = syscall.Kill(group, syscall.SIGKILL)
}

// copyOf is a clone as of now: what git would commit. The real servers are not fetched again.
func copyOf(t *testing.T, root string) string {
	t.Helper()
	list := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	list.Dir = root
	files, err := list.Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	dir := t.TempDir()
	for name := range bytes.SplitSeq(bytes.TrimSuffix(files, []byte{0}), []byte{0}) {
		copyFile(t, filepath.Join(root, string(name)), filepath.Join(dir, string(name)))
	}
	if err := os.Symlink(filepath.Join(root, ".parts"), filepath.Join(dir, ".parts")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	info, err := os.Stat(from)
	if errors.Is(err, os.ErrNotExist) { // deleted, and not committed yet
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, info.Mode().Perm()); err != nil {
		t.Fatal(err)
	}
}

// The volumes that the README shows are volumes, and their tokens are for those who are to get them.
func TestVolumes(t *testing.T) {
	root, err := parts.Root()
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(readme), "```yaml\nvolumes:\n")
	rest = "volumes:\n" + rest
	block, _, ends := strings.Cut(rest, "```\n")
	var pod corev1.PodSpec
	if err := yaml.UnmarshalStrict([]byte(block), &pod); err != nil || !found || !ends {
		t.Fatalf("%v in\n%s", err, block)
	}
	audiences := map[string]string{}
	for _, v := range pod.Volumes {
		audiences[v.Name] = v.Projected.Sources[0].ServiceAccountToken.Audience
	}
	if want := map[string]string{"meshca": registration.WorkloadAudience, "meshca-agent": registration.AgentAudience}; !maps.Equal(audiences, want) {
		t.Errorf("audiences %v, want %v", audiences, want)
	}
}

func TestParse(t *testing.T) {
	const text = "# x\n\n<!-- runs -->\n```sh\nmake build\nls\n```\n\n<!-- shows -->\n```text\na …\n```\n\n```sh\nnot run\n```\n" +
		"<!-- runs on a cluster -->\n```sh\nkubectl\n```\n<!-- shows -->\n```\nb\n```\n<!-- runs -->\n```sh\ntrue\n```\n"
	for where, want := range map[string][]Snippet{
		Here:       {{Line: 5, Commands: "make build\nls", Shows: []string{"a …"}}, {Line: 27, Commands: "true"}},
		OnACluster: {{Line: 19, Commands: "kubectl", Shows: []string{"b"}}},
	} {
		if got, err := Parse(text, where); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %v", where, got, err)
		}
	}
	for _, bad := range []string{"<!-- runs -->\n\n```sh\n```\n", "<!-- runs -->\n```sh\nls\n", "<!-- shows -->\n```\nx\n```\n"} {
		if got, err := Parse(bad, Here); err == nil {
			t.Errorf("%q: got %+v, want an error", bad, got)
		}
	}
}

// The volume that the README shows is the one of its example.
func TestExampleIsShown(t *testing.T) {
	root, err := parts.Root()
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(readme), "```yaml\n      volumes:\n")
	block, _, ends := strings.Cut(rest, "```\n")
	if !found || !ends || !strings.Contains(block, "csi.meshca.io") {
		t.Fatalf("the README shows no volume:\n%s", block)
	}
	for _, name := range []string{"greeter", "visitor"} {
		example, err := os.ReadFile(filepath.Join(root, "deploy", "examples", name+".yaml"))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(example), "      volumes:\n"+block) {
			t.Errorf("%s.yaml has another volume than the README", name)
		}
	}
}

func TestMissing(t *testing.T) {
	const output = "one\n  two  words\nthree (3) more\n"
	for want, lacks := range map[string]string{
		"one\nthree … more": "", "two words": "", "three (3) …": "", "…": "",
		"three … more\none": "one", "on": "on", "four": "four",
	} {
		if got := Missing(output, strings.Split(want, "\n")); got != lacks {
			t.Errorf("%q: missing %q, want %q", want, got, lacks)
		}
	}
}
