package csi

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// own is set in the environment of a process that has a mount namespace of its own.
const own = "MESHCA_TEST_OWN_MOUNTS"

// TestMain runs the tests once more in a mount namespace of their own, where they may mount and what they leave is gone
// with them. The processes that fuzzing starts stay where they are: they mount nothing.
func TestMain(m *testing.M) {
	fuzzing := strings.Contains(strings.Join(os.Args[1:], " "), "-test.fuzz=") || strings.Contains(strings.Join(os.Args[1:], " "), "-test.fuzzworker")
	if os.Geteuid() != 0 || os.Getenv(own) != "" || fuzzing {
		goleak.VerifyTestMain(m)
		return
	}
	again := exec.Command(os.Args[0], os.Args[1:]...)
	again.Env = append(os.Environ(), own+"=1")
	again.Stdin, again.Stdout, again.Stderr = os.Stdin, os.Stdout, os.Stderr
	again.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} // with it, Go makes all mounts private
	err := again.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	case errors.Is(err, syscall.EPERM):
		fmt.Fprintln(os.Stderr, "no mount namespace of one's own here:", err)
		goleak.VerifyTestMain(m)
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// needMounts skips, loudly, where nothing can be mounted.
func needMounts(t *testing.T) {
	t.Helper()
	if os.Getenv(own) == "" {
		t.Skip("SKIPPED: this needs root and a mount namespace of one's own, to mount what pods see. Run it as root.")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
