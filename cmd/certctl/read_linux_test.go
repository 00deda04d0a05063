package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// itself makes a command of this test's own binary, which is certctl when it is called so: see TestMain.
func itself(t *testing.T, args ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "certctl")
	if err := os.Symlink(binary, name); err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stderr = &stderr
	return cmd, &stderr
}

// endsWithin waits for a process and returns its exit code.
func endsWithin(t *testing.T, cmd *exec.Cmd, limit time.Duration) int {
	t.Helper()
	late := time.AfterFunc(limit, func() { _ = cmd.Process.Kill() })
	err := cmd.Wait()
	if !late.Stop() {
		t.Fatalf("%v does not end within %v", cmd.Args[1:], limit)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode()
}

// silent is a standard input that stays open and says nothing.
func silent(t *testing.T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = r.Close(), w.Close() })
	return r
}

// pipe is a named one that nobody writes to, and a file to stand beside it.
func pipe(t *testing.T) (fifo, file string) {
	t.Helper()
	dir := t.TempDir()
	fifo, file = filepath.Join(dir, "fifo"), filepath.Join(dir, "file.pem")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := newFacts()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, encodePEM(f.svid.Certificates), 0o600); err != nil {
		t.Fatal(err)
	}
	return fifo, file
}

// blocking are the verbs that read something, of which nothing comes.
func blocking(t *testing.T) map[string][]string {
	fifo, file := pipe(t)
	return map[string][]string{
		"certificate on the standard input": {"svid", "inspect", "-"},
		"certificate in a pipe":             {"svid", "inspect", fifo},
		"bundle in a pipe":                  {"svid", "inspect", file, "--bundle", fifo},
		"token on the standard input":       {"policy", "test", "--token-file", "-"},
		"token in a pipe":                   {"policy", "test", "--token-file", fifo},
		"policy in a pipe":                  {"policy", "test", "a/b", "--file", fifo, "--trust-domain", "mesh.example", "--cluster", "eu"},
	}
}

func TestReadingEndsInTime(t *testing.T) {
	for name, args := range blocking(t) {
		t.Run(name, func(t *testing.T) {
			cmd, stderr := itself(t, append(args, "--timeout=300ms")...)
			cmd.Stdin = silent(t)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if code := endsWithin(t, cmd, 10*time.Second); code != exitUnreachable || !strings.Contains(stderr.String(), "did not come to its end in time. Try a longer --timeout") {
				t.Errorf("exit code %d: %s", code, stderr)
			}
		})
	}
}

func TestReadingEndsBySignal(t *testing.T) {
	for name, args := range blocking(t) {
		for _, signal := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
			t.Run(fmt.Sprint(name, ", ", signal), func(t *testing.T) {
				cmd, stderr := itself(t, args...)
				cmd.Stdin = silent(t)
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				awaitHandler(t, cmd.Process.Pid)
				if err := cmd.Process.Signal(signal); err != nil {
					t.Fatal(err)
				}
				if code := endsWithin(t, cmd, 10*time.Second); code != exitNo || stderr.String() != "certctl: interrupted\n" {
					t.Errorf("exit code %d: %q", code, stderr)
				}
			})
		}
	}
}

// A second signal ends it also where the first finds nothing that listens, such as output that nobody takes.
func TestSecondSignalKills(t *testing.T) {
	_, file := pipe(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	fill(t, w)
	cmd, _ := itself(t, "svid", "inspect", file)
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	awaitHandler(t, cmd.Process.Pid)
	late := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	for {
		_ = cmd.Process.Signal(os.Interrupt)
		select {
		case <-ended:
			if s, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || s.Signal() != syscall.SIGINT {
				t.Errorf("it ended so: %v", cmd.ProcessState)
			}
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// fill writes until the pipe takes no more.
func fill(t *testing.T, w *os.File) {
	t.Helper()
	if err := w.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := w.Write(make([]byte, 4096)); err != nil {
			return
		}
	}
}

// awaitHandler waits until the process handles SIGINT itself.
func awaitHandler(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.SplitSeq(string(status), "\n") {
			var caught uint64
			if n, _ := fmt.Sscanf(line, "SigCgt: %x", &caught); n == 1 && caught&(1<<(uint(syscall.SIGINT)-1)) != 0 {
				time.Sleep(100 * time.Millisecond) // it has yet to come to what it waits for
				return
			}
		}
	}
	t.Fatal("it handles no SIGINT")
}

func TestReadKinds(t *testing.T) {
	fifo, file := pipe(t)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	cmd, stderr := itself(t, "svid", "inspect", fifo)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(fifo, os.O_WRONLY, 0) // waits for the reader
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	if code := endsWithin(t, cmd, 10*time.Second); code != exitFine {
		t.Errorf("a pipe that is written to: exit code %d, %s", code, stderr)
	}
	for _, path := range []string{"/dev/zero", t.TempDir()} {
		cmd, stderr := itself(t, "svid", "inspect", path)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if code := endsWithin(t, cmd, 10*time.Second); code != exitNo || !strings.Contains(stderr.String(), path+" is neither a file nor a pipe") {
			t.Errorf("%s: exit code %d, %s", path, code, stderr)
		}
	}
}
