package files

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// unit is the one in which the agent is shipped.
const unit = "../../deploy/systemd/meshca-agent.service"

// capabilities are those that the unit may name.
var capabilities = map[string]int{
	"CAP_CHOWN": unix.CAP_CHOWN, "CAP_FOWNER": unix.CAP_FOWNER, "CAP_DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "CAP_KILL": unix.CAP_KILL,
}

// powersOf are the capabilities that the unit leaves the agent, as /proc/PID/status writes them.
func powersOf(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(unit)
	must(t, err)
	var set uint64
	for line := range strings.Lines(string(text)) {
		key, names, _ := strings.Cut(strings.TrimSpace(line), "=")
		if key == "ProtectProc" || key == "ProcSubset" {
			t.Fatalf("%s has %s, which these tests do not play: it hides from signals whom they are for", unit, key)
		}
		if key != "CapabilityBoundingSet" {
			continue
		}
		for name := range strings.FieldsSeq(names) {
			number, ok := capabilities[name]
			if !ok {
				t.Fatalf("%s has %s, which this test does not know: does the agent need it?", unit, name)
			}
			set |= 1 << number
		}
	}
	if set == 0 {
		t.Fatalf("%s leaves the agent no capabilities, or says so in another way", unit)
	}
	return fmt.Sprintf("%016x", set)
}

// needRoot skips, loudly, where no other users can be played.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: this plays the agent as its unit has it, and processes of other users. Run it as root.")
	}
}

// daemon starts a process of a name and a user, in a PID namespace of its own where flags say so.
func daemon(t *testing.T, name string, uid int, flags uintptr) (pid int, ended <-chan error) {
	t.Helper()
	c := as("daemon", nameKey+"="+name, fmt.Sprintf("%s=%d", uidKey, uid))
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	_, err := c.StdinPipe() // which ends with this process
	must(t, err)
	out, err := c.StdoutPipe()
	must(t, err)
	if err := c.Start(); err != nil && flags != 0 {
		t.Skipf("SKIPPED: a process cannot be started so here (%v): in a container it takes --privileged", err)
	} else if err != nil {
		t.Fatal(err)
	}
	said := make([]byte, len("ready\n"))
	if _, err := io.ReadFull(out, said); err != nil || string(said) != "ready\n" {
		t.Fatalf("a daemon: %q, %v", said, err)
	}
	done := make(chan error, 1)
	go func() { done <- c.Wait() }()
	t.Cleanup(func() { _ = c.Process.Kill() })
	return c.Process.Pid, done
}

// underTheUnit is what comes of a signal that the agent sends with the powers that its unit leaves it.
func underTheUnit(t *testing.T, s Signal) string {
	t.Helper()
	c := as("agent", signalKey+"="+asJSON(t, s), powersKey+"="+powersOf(t))
	out, err := c.Output()
	if err != nil || strings.HasPrefix(string(out), "fault:") {
		t.Fatalf("the agent: %v, %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

func asJSON(t *testing.T, s Signal) string {
	t.Helper()
	data, err := json.Marshal(s)
	must(t, err)
	return string(data)
}

// TestSignalsUnderTheUnit: the unit's agent may look into no process of another user, nor into one of root that has more
// powers than itself (PTRACE_MODE_READ in ptrace(2)), and these are the ones that it is to tell.
func TestSignalsUnderTheUnit(t *testing.T) {
	needRoot(t)
	type process struct {
		name string
		by   Signal
		pid  int
		end  <-chan error
	}
	var processes []*process
	for i, uid := range []int{4321, 0} {
		user := fmt.Sprintf("uid %d", uid)
		name, filed := uniqueName(10+2*i), uniqueName(11+2*i)
		byName := &process{name: user + " by name", by: Signal{Name: "TERM", Process: name}}
		byName.pid, byName.end = daemon(t, name, uid, 0)
		byFile := &process{name: user + " by file", by: Signal{Name: "TERM", PIDFile: filepath.Join(t.TempDir(), "a.pid"), Process: filed}}
		byFile.pid, byFile.end = daemon(t, filed, uid, 0)
		must(t, os.WriteFile(byFile.by.PIDFile, []byte(strconv.Itoa(byFile.pid)), 0o644))
		processes = append(processes, byName, byFile)
	}
	for _, p := range processes {
		if got := underTheUnit(t, p.by); got != "told" {
			t.Errorf("%s: %s", p.name, got)
			continue
		}
		expectSignal(t, p.end, syscall.SIGTERM)
		if got := underTheUnit(t, p.by); got != "nobody" {
			t.Errorf("%s, when it has ended: %s", p.name, got)
		}
	}
}

// TestContainersAreNotSignalled: a process in a PID namespace below the agent's has the same name, and is not meant.
func TestContainersAreNotSignalled(t *testing.T) {
	needRoot(t)
	name := uniqueName(20)
	pid, ended := daemon(t, name, 4321, syscall.CLONE_NEWPID)
	if p, err := look(pid); err != nil || p.name != name {
		t.Fatalf("it is not seen: %+v, %v", p, err)
	}
	if got := underTheUnit(t, Signal{Name: "TERM", Process: name}); got != "nobody" {
		t.Errorf("got %q", got)
	}
	select {
	case err := <-ended:
		t.Errorf("it ended: %v", err)
	default:
	}
	beside, ended := daemon(t, name, 4321, 0)
	if pids, err := named(name); err != nil || len(pids) != 1 || pids[0] != beside {
		t.Errorf("%v, %v; the one that is meant is %d", pids, err, beside)
	}
	if got := underTheUnit(t, Signal{Name: "TERM", Process: name}); got != "told" {
		t.Fatalf("beside a container: %s", got)
	}
	expectSignal(t, ended, syscall.SIGTERM)
}

// TestSignalsInAContainer: the agent runs beside its daemon in PID and mount namespaces of their own. Where /proc does
// not say who runs there, that is a fault, and no word that nobody does.
func TestSignalsInAContainer(t *testing.T) {
	needRoot(t)
	own := func(options string) *string { return &options }
	for name, tt := range map[string]struct {
		proc           *string
		byName, byFile string // what is said, in part
	}{
		"a /proc of its own":      {own(""), "told", "told"},
		"/proc of the host":       {nil, "/proc is that of another PID namespace", "/proc is that of another PID namespace"},
		"others cannot be read":   {own("hidepid=1,gid=4322"), "process 1 cannot be looked at", "cannot be looked at"},
		"others are not listed":   {own("hidepid=2,gid=4322"), "/proc does not show all processes", "cannot be looked at"},
		"only what can be traced": {own("hidepid=4"), "/proc does not show all processes", "cannot be looked at"},
		"nothing but processes":   {own("subset=pid"), "/proc/uptime", "/proc/uptime"},
	} {
		for by, want := range map[string]string{"name": tt.byName, "file": tt.byFile} {
			t.Run(name+" by "+by, func(t *testing.T) {
				t.Parallel()
				s := Signal{Name: "TERM", Process: uniqueName(30)}
				file := filepath.Join(t.TempDir(), "a.pid")
				if by == "file" {
					s.PIDFile = file
				}
				c := as("node", signalKey+"="+asJSON(t, s), powersKey+"="+powersOf(t), nameKey+"="+s.Process, uidKey+"=4321", pidFileKey+"="+file)
				if tt.proc != nil {
					c.Env = append(c.Env, procKey+"="+*tt.proc)
				}
				c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
				out, err := c.Output()
				switch said := string(out); {
				case c.ProcessState == nil || strings.HasPrefix(said, "unable:"):
					t.Skipf("SKIPPED: a container with such a /proc cannot be made here (%v, %s): it takes --privileged in one, and Linux 5.8", err, said)
				case err != nil || !strings.Contains(said, want) || strings.Contains(said, "the daemon: signal") != (want == "told"):
					t.Errorf("%v, %s\nwant %q", err, said, want)
				}
			})
		}
	}
}

// TestTheFirstProcessIsNotSignalled: it has the name, and cannot be told by it.
func TestTheFirstProcessIsNotSignalled(t *testing.T) {
	if os.Getpid() == 1 {
		t.Skip("SKIPPED: this is the first process. Start it from a shell.")
	}
	p, err := look(1)
	must(t, err)
	if err := (Signal{Name: "WINCH", Process: p.name}).tell(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "process 1") {
		t.Errorf("got %v", err)
	}
}
