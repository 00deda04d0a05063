package files

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Command runs a program, as the agent's user, without a shell.
type Command struct {
	// Argv is the program, by its absolute path, and its arguments. Required.
	Argv []string
	// Timeout bounds it; then it and what it started is killed. 30 s where it is 0, at most 5 min.
	Timeout time.Duration
}

// maxArgv bounds the arguments.
const maxArgv = 64

func (c *Command) check() error {
	var errs []error
	switch {
	case len(c.Argv) == 0 || c.Argv[0] == "":
		errs = append(errs, errors.New("command: the program is missing"))
	case !filepath.IsAbs(c.Argv[0]):
		errs = append(errs, fmt.Errorf("command: %q is not an absolute path", c.Argv[0]))
	case len(c.Argv) > maxArgv:
		errs = append(errs, fmt.Errorf("command: more than %d arguments", maxArgv))
	}
	for _, arg := range c.Argv {
		if strings.ContainsRune(arg, 0) {
			errs = append(errs, errors.New("command: an argument holds a NUL"))
		}
	}
	if err := checkTimeout(c.Timeout); err != nil {
		errs = append(errs, fmt.Errorf("command: %w", err))
	}
	return errors.Join(errs...)
}

// runner is a command for a directory.
type runner struct {
	Command
	dir string
}

var _ teller = runner{}

// String is the program; arguments may be anything.
func (r runner) String() string { return "run " + r.Argv[0] }

func (r runner) tell(ctx context.Context, secrets []string) error {
	timeout := timeoutOf(r.Timeout)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var out tail
	cmd := exec.CommandContext(ctx, r.Argv[0], r.Argv[1:]...)
	// A directory and an environment of its own: nothing of the agent's is inherited.
	cmd.Dir, cmd.Env = "/", []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C", "MESHCA_DIR=" + r.dir}
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 2 * time.Second // for a daemon that it started and that keeps its output open
	err := cmd.Run()
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return nil
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		err = fmt.Errorf("it took longer than %v and was killed", timeout)
	}
	if text := said(out.String(), secrets); text != "" {
		return fmt.Errorf("%s: %w; it said: %s", r.Argv[0], err, text)
	}
	return fmt.Errorf("%s: %w", r.Argv[0], err)
}

// tail keeps the end of what is written to it. Only one goroutine of exec.Cmd writes.
type tail struct{ b bytes.Buffer }

func (t *tail) Write(p []byte) (int, error) {
	n := len(p)
	if len(p) > maxSaid {
		p = p[len(p)-maxSaid:]
	}
	if over := t.b.Len() + len(p) - maxSaid; over > 0 {
		t.b.Next(over)
	}
	t.b.Write(p)
	return n, nil
}

func (t *tail) String() string { return t.b.String() }
