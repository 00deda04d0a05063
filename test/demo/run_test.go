package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/meshca/meshca/test/parts"
)

// TestRun is `RUN_FOR=24s SVID_TTL=20s make run`, without make: real Envoys, real rotations, and the last line.
func TestRun(t *testing.T) {
	d := start(t, "-svid-ttl=20s", "-run-for=24s")
	if err := d.wait(t); err != nil {
		t.Fatalf("%v\n%s", err, d.out.String())
	}
	last := regexp.MustCompile(`\nrequests ok=([0-9]+) failed=0 rotations=([0-9]+)\n$`).FindStringSubmatch(d.out.String())
	if last == nil || len(last[1]) < 3 || last[2] < "2" {
		t.Errorf("the last line is not `requests ok=N failed=0 rotations=K` with hundreds of requests and a rotation of each:\n%s", d.out.String())
	}
	for _, want := range []string{"client is spiffe://demo.test/ns/demo/sa/client\n", "server is spiffe://demo.test/ns/demo/sa/server\n"} {
		if !strings.Contains(d.out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, d.out.String())
		}
	}
	d.leavesNothing(t)
}

// TestRotateRootInVault is `UPSTREAM=vault make run`, and in a second terminal the command that it shows: each step of the
// rollout comes by, and no request fails.
func TestRotateRootInVault(t *testing.T) {
	parts.Path(t, "vault")
	d := start(t, "-upstream=vault", "-svid-ttl=15s")
	d.await(t, "the CA's root is in Vault at https://127.0.0.1:")
	d.await(t, "ok=")
	hint := regexp.MustCompile(`look inside: bin/certctl (--socket .* ca rotate root --watch)\n`).FindStringSubmatch(d.out.String())
	if hint == nil {
		t.Fatalf("it does not tell how to replace the root:\n%s", d.out.String())
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, program(t, "./cmd/certctl"), strings.Fields(hint[1])...).CombinedOutput()
	if err != nil {
		t.Fatalf("certctl: %v\n%s", err, out)
	}
	steps := regexp.MustCompile(`(?m)^\S+ \S+ ([a-z]+): `).FindAllStringSubmatch(string(out), -1)
	var seen []string
	for _, s := range steps {
		if len(seen) == 0 || seen[len(seen)-1] != s[1] {
			seen = append(seen, s[1])
		}
	}
	if want := []string{"chosen", "published", "confirmed", "signing", "retired", "leaving", "out"}; !slices.Equal(seen, want) {
		t.Errorf("--watch showed the steps %v, want %v:\n%s", seen, want, out)
	}
	if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := d.wait(t); err != nil {
		t.Errorf("%v\n%s", err, d.out.String())
	}
	if !regexp.MustCompile(`\nrequests ok=[1-9][0-9]{2,} failed=0 rotations=[1-9][0-9]*\n$`).MatchString(d.out.String()) {
		t.Errorf("requests failed, or nothing rotated:\n%s", d.out.String())
	}
	d.leavesNothing(t)
}

// TestInterrupted: Ctrl-C is no fault, and ends everything.
func TestInterrupted(t *testing.T) {
	d := start(t)
	d.await(t, "ok=")
	if got := d.running(); len(got) != 3 {
		t.Fatalf("%d processes run below %s, want meshca and two Envoys: %v", len(got), d.state, got)
	}
	if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := d.wait(t); err != nil {
		t.Errorf("%v\n%s", err, d.out.String())
	}
	if !regexp.MustCompile(`\nrequests ok=[0-9]+ failed=0 rotations=0\n$`).MatchString(d.out.String()) {
		t.Errorf("no summary:\n%s", d.out.String())
	}
	d.leavesNothing(t)
}

// TestKilled: what the demo started does not outlive it, even when it could not say good-bye.
func TestKilled(t *testing.T) {
	d := start(t)
	d.await(t, "ok=")
	if err := d.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = d.wait(t)
	d.leavesNothing(t)
}

// TestLoses: whatever ends by itself, the demo says what it was, fails, and still ends in the line for programs.
func TestLoses(t *testing.T) {
	for what, c := range map[string]struct{ command, says string }{
		"its CA":   {"svid-ttl", "meshca dev ended by itself"},
		"an Envoy": {"envoy/server.yaml", "an Envoy ended by itself"},
	} {
		t.Run(what, func(t *testing.T) {
			d := start(t)
			d.await(t, "ok=")
			killed := 0
			for pid, command := range d.running() {
				if strings.Contains(command, c.command) {
					if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
						t.Fatal(err)
					}
					killed++
				}
			}
			if killed != 1 {
				t.Fatalf("%d processes are %s: %v", killed, what, d.running())
			}
			var exit *exec.ExitError
			if err := d.wait(t); !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Errorf("got %v, want exit code 1", err)
			}
			if !strings.Contains(d.out.String(), c.says) {
				t.Errorf("it does not say what ended:\n%s", d.out.String())
			}
			if !regexp.MustCompile(`\nrequests ok=[1-9][0-9]* failed=[0-9]+ rotations=[0-9]+\n$`).MatchString(d.out.String()) {
				t.Errorf("the last line is not the result:\n%s", d.out.String())
			}
			d.leavesNothing(t)
		})
	}
}

func TestNothingToRun(t *testing.T) {
	root, err := parts.Root()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		dir  string
		args []string
		want string
		code int
	}{
		"no meshca":       {root, []string{"-meshca", "bin/absent"}, "make build", 1},
		"a senseless TTL": {root, []string{"-svid-ttl", "1s"}, "10s to 6h", 2},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), program(t, "./test/demo"), c.args...)
			cmd.Dir = c.dir
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != c.code || !strings.Contains(string(out), c.want) {
				t.Errorf("error %v, output %q; want exit code %d and %q", err, out, c.code, c.want)
			}
			if ran := strings.HasSuffix(string(out), "\nrequests ok=0 failed=0 rotations=0\n"); ran != (c.code == 1) {
				t.Errorf("output %q: the last line is the result: %t", out, ran)
			}
		})
	}
}

// running is a demo as a process of its own, as people have it.
type running struct {
	cmd   *exec.Cmd
	out   *output
	state string
	ended chan struct{}
	err   error // of Wait; read once ended is closed
}

func start(t *testing.T, args ...string) *running {
	t.Helper()
	state, err := os.MkdirTemp("", "demo") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(state) })
	root, err := parts.Root()
	if err != nil {
		t.Fatal(err)
	}
	parts.Path(t, "envoy")
	d := &running{out: &output{}, state: state, ended: make(chan struct{})}
	d.cmd = exec.Command(program(t, "./test/demo"), append(args, "-meshca", program(t, "./cmd/meshca"), "-state", state)...)
	d.cmd.Dir, d.cmd.Stdout, d.cmd.Stderr = root, d.out, d.out
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { defer close(d.ended); d.err = d.cmd.Wait() }()
	t.Cleanup(func() { _ = d.cmd.Process.Kill(); <-d.ended })
	return d
}

// program builds a command; Go's cache makes the second time quick.
func program(t *testing.T, pkg string) string {
	t.Helper()
	root, err := parts.Root()
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), filepath.Base(pkg))
	build := exec.CommandContext(t.Context(), "go", "build", "-o", binary, pkg)
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", pkg, err, out)
	}
	return binary
}

func (d *running) wait(t *testing.T) error {
	t.Helper()
	select {
	case <-d.ended:
		return d.err
	case <-time.After(90 * time.Second):
		t.Fatalf("it does not end:\n%s", d.out.String())
		return nil
	}
}

func (d *running) await(t *testing.T, text string) {
	t.Helper()
	for end := time.Now().Add(40 * time.Second); !strings.Contains(d.out.String(), text); time.Sleep(50 * time.Millisecond) {
		select {
		case <-d.ended:
			t.Fatalf("it ended (%v):\n%s", d.err, d.out.String())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("it does not print %q:\n%s", text, d.out.String())
		}
	}
}

// running lists the processes whose command line names the state directory, the demo itself aside.
func (d *running) running() map[int]string {
	found := map[int]string{}
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		command, err := os.ReadFile(path)
		if err != nil { // it ended meanwhile
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil || pid == d.cmd.Process.Pid {
			continue
		}
		if text := string(bytes.ReplaceAll(command, []byte{0}, []byte(" "))); strings.Contains(text, d.state) {
			found[pid] = text
		}
	}
	return found
}

func (d *running) leavesNothing(t *testing.T) {
	t.Helper()
	var left map[int]string
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if left = d.running(); len(left) == 0 {
			return
		}
	}
	t.Errorf("still running: %v", left)
}

// output is a buffer that may be read while it is written.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}
