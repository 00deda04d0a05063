package parts

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// Process is a running part. It dies with the program that started it, however that ends.
type Process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
	log  *tail

	err error // of Wait; owned by the waiting goroutine until done is closed
}

// Command is what to run.
type Command struct {
	Path string
	Args []string
	Dir  string
	// Env replaces the environment where it is not nil.
	Env []string
	// Log gets what it prints; nil keeps only the end of it, for errors.
	Log io.Writer
	// Files are open in it too, from descriptor 3 on.
	Files []*os.File
	// Namespaces are those that it gets of its own, as clone(2)'s CLONE_NEW* flags.
	Namespaces uintptr
}

// Start runs the command. Linux kills it when this program dies (PR_SET_PDEATHSIG). The kernel ties that to the thread
// that forked, so one goroutine holds its thread from the fork until the process has ended.
func Start(c Command) (*Process, error) {
	SeeSource()
	p := &Process{name: c.Path, cmd: exec.Command(c.Path, c.Args...), done: make(chan struct{}), log: &tail{next: c.Log}}
	p.cmd.Dir, p.cmd.Env = c.Dir, c.Env
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.ExtraFiles = c.Files
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Cloneflags: c.Namespaces}
	p.cmd.WaitDelay = 5 * time.Second
	started := make(chan error, 1)
	go func() {
		defer close(p.done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := p.cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		p.err = p.cmd.Wait()
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", c.Path, err)
	}
	return p, nil
}

// PID is the process's id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed once the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Output is the end of what it printed, at most 16 KiB.
func (p *Process) Output() string { return p.log.String() }

// Signal sends it a signal.
func (p *Process) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// Stop asks it to end, kills it after the grace, and returns when it is gone.
func (p *Process) Stop(grace time.Duration) {
	_ = p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(grace):
		p.Kill()
	}
}

// Kill ends it at once, and returns when it is gone.
func (p *Process) Kill() {
	_ = p.Signal(syscall.SIGKILL)
	<-p.done
}

// Await calls ready every 50 ms until it returns nil, the process ends, or ctx does.
func (p *Process) Await(ctx context.Context, ready func(context.Context) error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended (%v); it printed last:\n%s", p.name, p.err, p.Output())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w; it printed last:\n%s", p.name, err, p.Output())
		case <-tick.C:
		}
	}
}

// tail keeps the end of what is written, and hands all of it on.
type tail struct {
	mu   sync.Mutex
	end  []byte
	next io.Writer
}

const tailSize = 16 << 10

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.end = append(t.end, b...)
	if over := len(t.end) - tailSize; over > 0 {
		t.end = append(t.end[:0], t.end[over:]...)
	}
	if t.next != nil {
		_, _ = t.next.Write(b)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.end)
}
