package node

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestHierarchies(t *testing.T) {
	const (
		tmpfs   = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
		memory  = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
		cpu     = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
		systemd = "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
		unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
		v2      = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
	)
	for name, test := range map[string]struct {
		mounts, own string
		want        []hierarchy
		problem     string
	}{
		"v1, this process in a group of its own": {
			tmpfs + memory + cpu, "4:memory:/user/one\n2:cpu,cpuacct:/\n0::/\n",
			[]hierarchy{{"/sys/fs/cgroup/memory", "/sys/fs/cgroup/memory/user/one", false}, {"/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct", false}}, "",
		},
		"systemd's own, and v2 without controllers": {
			tmpfs + systemd + unified, "1:name=systemd:/init.scope\n0::/init.scope\n",
			[]hierarchy{{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/systemd/init.scope", false}}, "",
		},
		"v2": {v2, "0::/user.slice/session-1.scope\n", []hierarchy{{"/sys/fs/cgroup", "/sys/fs/cgroup", true}}, ""},
		"a container that sees its own part of v1": {
			"35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n", "4:memory:/docker/abc/in\n",
			[]hierarchy{{"/sys/fs/cgroup/memory", "/sys/fs/cgroup/memory/in", false}}, "",
		},
		"a container that does not see its own": {
			"35 31 0:32 /docker/other /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n", "4:memory:/docker/abc\n", nil, "cannot be seen",
		},
		"none": {tmpfs, "", nil, "no cgroup file system"},
	} {
		got, err := hierarchies(test.mounts, test.own)
		if !slices.Equal(got, test.want) || (err == nil) != (test.problem == "") || err != nil && !strings.Contains(err.Error(), test.problem) {
			t.Errorf("%s: got %v, %v; want %v, %q", name, got, err, test.want, test.problem)
		}
	}
}

func TestLibraries(t *testing.T) {
	got := libraries(`	linux-vdso.so.1 (0x00007ffc)
	libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f1)
	libgone.so => not found
	/lib64/ld-linux-x86-64.so.2 (0x00007f2)
`)
	if want := []string{"/lib/x86_64-linux-gnu/libm.so.6", "/lib64/ld-linux-x86-64.so.2"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// The folder of a node whose owner lives stays, whoever sweeps.
func TestSweep(t *testing.T) {
	parent := t.TempDir()
	living, err := claim(parent)
	if err != nil {
		t.Fatal(err)
	}
	killed, err := claim(parent)
	if err != nil {
		t.Fatal(err)
	}
	killed.lock.Close() // as the kernel does
	others := filepath.Join(parent, "somebody-else")
	if err := os.Mkdir(others, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := sweep(parent); err != nil {
		t.Fatal(err)
	}
	if !exists(living.dir) || exists(killed.dir) || !exists(others) {
		t.Errorf("after the sweep: the living one's folder is there: %v; the killed one's: %v; another: %v", exists(living.dir), exists(killed.dir), exists(others))
	}
	if err := living.remove(); err != nil || exists(living.dir) {
		t.Errorf("its owner removes it: %v, it is there: %v", err, exists(living.dir))
	}
}

// verdict is what a test came to.
type verdict struct {
	testing.TB
	skipped, failed string
}

func (v *verdict) Skip(args ...any)  { v.skipped = args[0].(string) }
func (v *verdict) Fatal(args ...any) { v.failed = args[0].(string); panic("ended") }

// What cannot run is skipped with its reason on a person's machine, and fails in CI.
func TestPassOver(t *testing.T) {
	for ci, failed := range map[string]bool{"": false, "false": false, "true": true} {
		t.Setenv("CI", ci)
		v := &verdict{TB: t}
		func() {
			defer func() { _ = recover() }()
			passOver(v, []string{"runc missing", "it must be started by root"})
		}()
		said := v.skipped + v.failed
		if (v.failed != "") != failed || !strings.Contains(said, "runc missing; it must be started by root") {
			t.Errorf("CI=%q: failed %q, skipped %q", ci, v.failed, v.skipped)
		}
	}
}
