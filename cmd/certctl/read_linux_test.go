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

	"golang.org/x/sys/unix"
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

// silent is a standard input that stays open and says nothing after a first byte. taken waits until a process has read that:
// it is then past whatever it does at its start.
func silent(t *testing.T) (r *os.File, taken func()) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = r.Close(), w.Close() })
	if _, err := w.Write([]byte{'e'}); err != nil {
		t.Fatal(err)
	}
	return r, func() {
		t.Helper()
		await(t, func() bool {
			left, err := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ)
			return err == nil && left == 0
		})
	}
}

// writer opens a named pipe that a process reads from, as soon as it does.
func writer(t *testing.T, fifo string) *os.File {
	t.Helper()
	var w *os.File
	await(t, func() bool {
		var err error
		w, err = os.OpenFile(fifo, os.O_WRONLY|syscall.O_NONBLOCK, 0) // without a reader it fails
		return err == nil
	})
	t.Cleanup(func() { _ = w.Close() })
	return w
}

func await(t *testing.T, met func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !met(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nobody reads")
		}
	}
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

// blocking are the verbs that read something, of which nothing comes; FIFO stands for a named pipe, FILE for a certificate.
var blocking = map[string]string{
	"certificate on the standard input": "svid inspect -",
	"certificate in a pipe":             "svid inspect FIFO",
	"bundle in a pipe":                  "svid inspect FILE --bundle FIFO",
	"token on the standard input":       "policy test --token-file -",
	"token in a pipe":                   "policy test --token-file FIFO",
	"policy in a pipe":                  "policy test a/b --file FIFO --trust-domain mesh.example --cluster eu",
}

func TestReadingEndsInTime(t *testing.T) {
	for name, line := range blocking {
		t.Run(name, func(t *testing.T) {
			fifo, file := pipe(t)
			cmd, stderr := itself(t, strings.Fields(strings.NewReplacer("FIFO", fifo, "FILE", file).Replace(line)+" --timeout=300ms")...)
			cmd.Stdin, _ = silent(t)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if code := endsWithin(t, cmd, 20*time.Second); code != exitUnreachable || !strings.Contains(stderr.String(), "did not come to its end in time. Try a longer --timeout") {
				t.Errorf("exit code %d: %s", code, stderr)
			}
		})
	}
}

func TestReadingEndsBySignal(t *testing.T) {
	for name, line := range blocking {
		for _, signal := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
			t.Run(fmt.Sprint(name, ", ", signal), func(t *testing.T) {
				fifo, file := pipe(t)
				cmd, stderr := itself(t, strings.Fields(strings.NewReplacer("FIFO", fifo, "FILE", file).Replace(line))...)
				stdin, taken := silent(t)
				cmd.Stdin = stdin
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				if strings.Contains(line, "FIFO") {
					writer(t, fifo)
				} else {
					taken()
				}
				if err := cmd.Process.Signal(signal); err != nil {
					t.Fatal(err)
				}
				if code := endsWithin(t, cmd, 20*time.Second); code != exitNo || stderr.String() != "certctl: interrupted\n" {
					t.Errorf("exit code %d: %q", code, stderr)
				}
			})
		}
	}
}

// A second signal ends it also where the first finds nothing that listens, such as output that nobody takes.
func TestSecondSignalKills(t *testing.T) {
	fifo, file := pipe(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	room, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 4096)
	if err != nil {
		t.Fatal(err)
	}
	cmd, _ := itself(t, "svid", "inspect", fifo)
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	feed(t, writer(t, fifo), file, 20) // what is told of so many is more than there is room for
	await(t, func() bool {
		printed, err := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ)
		return err == nil && printed >= room
	})
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	for deadline := time.Now().Add(20 * time.Second); ; {
		if time.Now().After(deadline) {
			_ = cmd.Process.Kill()
		}
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

// feed writes a file to a pipe, so many times, and ends it.
func feed(t *testing.T, w *os.File, file string, times int) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(bytes.Repeat(data, times)); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
}

func TestReadKinds(t *testing.T) {
	fifo, file := pipe(t)
	cmd, stderr := itself(t, "svid", "inspect", fifo)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	feed(t, writer(t, fifo), file, 1)
	if code := endsWithin(t, cmd, 20*time.Second); code != exitFine {
		t.Errorf("a pipe that is written to: exit code %d, %s", code, stderr)
	}
	for _, path := range []string{"/dev/zero", t.TempDir()} {
		cmd, stderr := itself(t, "svid", "inspect", path)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if code := endsWithin(t, cmd, 20*time.Second); code != exitNo || !strings.Contains(stderr.String(), path+" is neither a file nor a pipe") {
			t.Errorf("%s: exit code %d, %s", path, code, stderr)
		}
	}
}
