// Package readme runs what the README tells people to type, in a copy of the repository, and holds the README to what
// it says they will see.
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
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/parts"
)

// snippet is a block of commands of the README, and what it says they show.
type snippet struct {
	line     int
	commands string
	shows    []string // lines, in order; … stands for anything, and other lines may stand between
}

// The README marks the blocks, in comments that a reader does not see: <!-- runs --> stands before a block of commands
// that the test runs, <!-- shows --> before what the block above it prints.
const (
	runs  = "<!-- runs -->"
	shows = "<!-- shows -->"
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
	snippets, err := parse(string(readme))
	if err != nil {
		t.Fatal(err)
	}
	if len(snippets) < 3 {
		t.Fatalf("the README has %d blocks that are marked to run: the test would prove little", len(snippets))
	}
	s := session{dir: copyOf(t, root), whole: t}
	for _, sn := range snippets {
		t.Run(fmt.Sprintf("line %d", sn.line), func(t *testing.T) { s.expect(t, sn) })
	}
}

// parse finds the marked blocks.
func parse(text string) ([]snippet, error) {
	var out []snippet
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		mark := strings.TrimSpace(lines[i])
		if mark != runs && mark != shows {
			continue
		}
		if i+1 >= len(lines) || !strings.HasPrefix(lines[i+1], "```") {
			return nil, fmt.Errorf("line %d: no block follows %s", i+1, mark)
		}
		length := slices.Index(lines[i+2:], "```")
		if length < 0 {
			return nil, fmt.Errorf("line %d: the block has no end", i+2)
		}
		block := lines[i+2 : i+2+length]
		switch {
		case mark == runs:
			out = append(out, snippet{line: i + 3, commands: strings.Join(block, "\n")})
		case len(out) == 0 || out[len(out)-1].shows != nil:
			return nil, fmt.Errorf("line %d: no block of commands stands above", i+1)
		default:
			out[len(out)-1].shows = block
		}
		i += 2 + length
	}
	return out, nil
}

// missing returns the first line that the output does not show, or "".
func missing(output string, want []string) string {
	rest := strings.Split(output, "\n")
	for _, line := range want {
		words := strings.Fields(line)
		for i, w := range words {
			words[i] = strings.ReplaceAll(regexp.QuoteMeta(w), "…", ".*")
		}
		pattern := regexp.MustCompile(`^\s*` + strings.Join(words, `\s+`) + `\s*$`)
		i := slices.IndexFunc(rest, pattern.MatchString)
		if i < 0 {
			return line
		}
		rest = rest[i+1:]
	}
	return ""
}

// session runs blocks one after the other in one directory, as a person would.
type session struct {
	dir   string
	whole *testing.T // what blocks leave in the background ends with it
}

// patience is how long a block that shows something may need until it does: what a block before it started in the
// background comes up meanwhile, as it does while a person types.
const patience = 20 * time.Second

func (s session) expect(t *testing.T, sn snippet) {
	t.Helper()
	var output, lacks string
	for end := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		var err error
		output, err = s.run(t, sn.commands)
		if lacks = missing(output, sn.shows); err == nil && lacks == "" {
			return
		}
		if sn.shows == nil || time.Now().After(end) {
			t.Fatalf("%s\n\nerror: %v\nmissing: %q\nprinted:\n%s", sn.commands, err, lacks, output)
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
	_, rest, found := strings.Cut(string(readme), "```yaml\n")
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
	const text = "# x\n\n<!-- runs -->\n```sh\nmake build\nls\n```\n\n<!-- shows -->\n```text\na …\n```\n\n```sh\nnot run\n```\n<!-- runs -->\n```sh\ntrue\n```\n"
	got, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0].commands != "make build\nls" || !slices.Equal(got[0].shows, []string{"a …"}) ||
		got[1].commands != "true" || got[1].shows != nil {
		t.Errorf("got %+v", got)
	}
	for _, bad := range []string{"<!-- runs -->\n\n```sh\n```\n", "<!-- runs -->\n```sh\nls\n", "<!-- shows -->\n```\nx\n```\n"} {
		if got, err := parse(bad); err == nil {
			t.Errorf("%q: got %+v, want an error", bad, got)
		}
	}
}

func TestMissing(t *testing.T) {
	const output = "one\n  two  words\nthree (3) more\n"
	for want, lacks := range map[string]string{
		"one\nthree … more": "", "two words": "", "three (3) …": "", "…": "",
		"three … more\none": "one", "on": "on", "four": "four",
	} {
		if got := missing(output, strings.Split(want, "\n")); got != lacks {
			t.Errorf("%q: missing %q, want %q", want, got, lacks)
		}
	}
}
