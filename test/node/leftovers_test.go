package node_test

import (
	"context"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshca/meshca/test/node"
	"github.com/meshca/meshca/test/parts"
)

// state is what a node could change on the machine.
type state struct{ mounts, interfaces, tables, folders []string }

func machine(t *testing.T) state {
	t.Helper()
	var s state
	mounts := must(os.ReadFile("/proc/self/mountinfo"))(t)
	for line := range strings.Lines(string(mounts)) {
		s.mounts = append(s.mounts, line)
	}
	for _, i := range must(net.Interfaces())(t) {
		s.interfaces = append(s.interfaces, i.Name)
	}
	if node.Missing() == nil {
		s.tables = strings.Split(string(must(exec.Command("nft", "list", "tables").Output())(t)), "\n")
	}
	s.folders = must(filepath.Glob(filepath.Join(os.TempDir(), "meshca-node-*")))(t)
	return s
}

// cgroups are those of a node, of which others may run beside it.
func cgroups(dir string) []string {
	var found []string
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && entry.Name() == filepath.Base(dir) {
			found = append(found, path)
		}
		return nil
	})
	return found
}

// gone fails where the machine is not as it was before the node.
func gone(t *testing.T, before state, dir string) {
	t.Helper()
	for _, left := range cgroups(dir) {
		t.Errorf("left of the cgroups: %s", left)
	}
	after := machine(t)
	for what, lists := range map[string][2][]string{
		"mounts": {before.mounts, after.mounts}, "interfaces": {before.interfaces, after.interfaces},
		"nft tables": {before.tables, after.tables}, "folders": {before.folders, after.folders},
	} {
		for _, left := range lists[1] {
			if !slices.Contains(lists[0], left) {
				t.Errorf("left of the %s: %s", what, left)
			}
		}
	}
}

// TestKilled kills the program that has a node, as an impatient person would. The node is gone at once, its folder and
// cgroup with the next start.
func TestKilled(t *testing.T) {
	if missing := node.Missing(); len(missing) > 0 {
		node.Start(t) // skips, or fails in CI
	}
	t.Setenv("TMPDIR", t.TempDir())
	before := machine(t)
	program := filepath.Join(t.TempDir(), "up")
	parts.SeeSource()
	if out, err := exec.Command("go", "build", "-o", program, "./up").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	up := exec.Command(program)
	out := must(up.StdoutPipe())(t)
	if err := up.Start(); err != nil {
		t.Fatal(err)
	}
	defer up.Process.Kill()
	text := make([]byte, 4096)
	for read := 0; !strings.Contains(string(text[:read]), "Ctrl-C"); {
		more, err := out.Read(text[read:])
		if err != nil {
			t.Fatalf("%v; it printed %q", err, text[:read])
		}
		read += more
	}
	during := machine(t)
	if len(during.folders) != 1 || len(cgroups(during.folders[0])) == 0 {
		t.Fatalf("a node runs and is not to be seen: %+v", during)
	}
	groups := cgroups(during.folders[0])
	if err := up.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = up.Wait()

	deadline := time.Now().Add(time.Minute) // a process that waits for a busy disk ends when that is done
	for left := members(t, groups); len(left) > 0; left = members(t, groups) {
		if time.Now().After(deadline) {
			t.Fatalf("processes of the node live:\n%s", strings.Join(left, ""))
		}
		time.Sleep(20 * time.Millisecond)
	}
	// A node that is about to start takes away what is left, and does so also where it then cannot start.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if n, err := node.Launch(ctx); err == nil {
		n.Close()
		t.Error("a node started though nobody wanted it any more")
	}
	gone(t, before, during.folders[0])
}

// members are the processes in cgroups and below them, as /proc/PID/stat tells of them.
func members(t *testing.T, cgroups []string) []string {
	t.Helper()
	var found []string
	for _, group := range cgroups {
		_ = filepath.WalkDir(group, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				pids, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
				for pid := range strings.FieldsSeq(string(pids)) {
					stat, _ := os.ReadFile(filepath.Join("/proc", pid, "stat"))
					found = append(found, string(stat))
				}
			}
			return nil
		})
	}
	return found
}

// A user who is not root is told so.
func TestMissingRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		if missing := node.Missing(); !slices.ContainsFunc(missing, func(s string) bool { return strings.Contains(s, "root") }) {
			t.Errorf("missing: %q", missing)
		}
		return
	}
	program := filepath.Join("/tmp", "meshca-check-"+strconv.Itoa(os.Getpid())) // where nobody may look
	defer os.Remove(program)
	parts.SeeSource()
	if out, err := exec.Command("go", "build", "-o", program, "./up").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	check := exec.Command(program, "-check")
	check.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := check.CombinedOutput(); err == nil || !strings.Contains(string(out), "must be started by root") {
		t.Errorf("%v: %s", err, out)
	}
}
