package files

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestHooksThatAreRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		hook Hook
		want string
	}{
		"none":              {Hook{}, "name one of"},
		"two":               {Hook{Signal: &Signal{Name: "HUP", Process: "nginx"}, Command: &Command{Argv: []string{"/bin/true"}}}, "name one of"},
		"signal KILL":       {Hook{Signal: &Signal{Name: "KILL", Process: "nginx"}}, `"KILL" is none of`},
		"signal to nobody":  {Hook{Signal: &Signal{Name: "HUP"}}, "pidFile, a process"},
		"relative pid file": {Hook{Signal: &Signal{Name: "HUP", PIDFile: "nginx.pid"}}, "absolute"},
		"process by path":   {Hook{Signal: &Signal{Name: "HUP", Process: "/usr/sbin/nginx"}}, "is a path"},
		"no program":        {Hook{Command: &Command{}}, "missing"},
		"relative program":  {Hook{Command: &Command{Argv: []string{"reload"}}}, "absolute"},
		"NUL":               {Hook{Command: &Command{Argv: []string{"/bin/true", "a\x00b"}}}, "NUL"},
		"too patient":       {Hook{Command: &Command{Argv: []string{"/bin/true"}, Timeout: time.Hour}}, "timeout"},
		"impatient":         {Hook{HTTP: &HTTP{URL: "http://localhost/", Timeout: -1}}, "timeout"},
		"no url":            {Hook{HTTP: &HTTP{}}, "url is missing"},
		"ftp":               {Hook{HTTP: &HTTP{URL: "ftp://localhost/"}}, "is not http"},
		"elsewhere":         {Hook{HTTP: &HTTP{URL: "http://169.254.169.254/"}}, "not this machine"},
		"a name":            {Hook{HTTP: &HTTP{URL: "http://localhost.example/"}}, "not this machine"},
		"password":          {Hook{HTTP: &HTTP{URL: "http://a:b@localhost/"}}, "password"},
		"CA without TLS":    {Hook{HTTP: &HTTP{URL: "http://localhost/", CAFile: "/ca.pem"}}, "caFile"},
		"relative socket":   {Hook{HTTP: &HTTP{URL: "http://localhost/", Socket: "a.sock"}}, "absolute"},
	} {
		if err := tt.hook.check(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

// program is a copy of a program under a name that nothing else on this machine has.
func program(t *testing.T, of, name string) string {
	t.Helper()
	data, err := os.ReadFile(of)
	must(t, err)
	path := filepath.Join(t.TempDir(), name)
	must(t, os.WriteFile(path, data, 0o755))
	return path
}

// sleeper is a process with a name of its own, and ended is closed once it has ended.
func sleeper(t *testing.T, name string) (pid int, begun time.Time, ended <-chan error) {
	t.Helper()
	sleep, err := exec.LookPath("sleep")
	must(t, err)
	c := exec.Command(program(t, sleep, name), "600")
	begun = time.Now()
	must(t, c.Start())
	done := make(chan error, 1)
	go func() { done <- c.Wait() }()
	t.Cleanup(func() { _ = c.Process.Kill() })
	return c.Process.Pid, begun, done
}

// telling tells as Keep does: again while the process is starting, which it did when it had begun or later.
func telling(t *testing.T, begun time.Time, s Signal) error {
	t.Helper()
	for {
		err := s.tell(t.Context(), nil)
		if !errors.Is(err, errStarting) {
			if err == nil && time.Since(begun) < settle {
				t.Error("a process was signalled that had just begun to run")
			}
			return err
		}
		time.Sleep(time.Millisecond) // less than the tick that ages are cut to
	}
}

func expectSignal(t *testing.T, ended <-chan error, want syscall.Signal) {
	t.Helper()
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != want {
			t.Errorf("it ended with %v, want %v", err, want)
		}
	case <-time.After(30 * time.Second):
		t.Error("it was not signalled")
	}
}

func uniqueName(n int) string { return fmt.Sprintf("mshc%d-%d", os.Getpid()%100000, n) }

func TestSignals(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "a.pid")
	write := func(text string) { must(t, os.WriteFile(pidFile, []byte(text), 0o644)) }

	pid, begun, ended := sleeper(t, uniqueName(1))
	write(strconv.Itoa(pid) + "\n")
	must(t, telling(t, begun, Signal{Name: "SIGUSR1", PIDFile: pidFile}))
	expectSignal(t, ended, syscall.SIGUSR1)
	if err := (Signal{Name: "USR1", PIDFile: pidFile}).tell(t.Context(), nil); !errors.Is(err, errNobody) {
		t.Errorf("of a process that ended: %v", err)
	}

	_, begun, ended = sleeper(t, uniqueName(2)) // by a signal that no shell has its children ignore, as nohup does HUP
	must(t, telling(t, begun, Signal{Name: "USR2", Process: uniqueName(2)}))
	expectSignal(t, ended, syscall.SIGUSR2)
	if err := (Signal{Name: "USR2", Process: uniqueName(2)}).tell(t.Context(), nil); !errors.Is(err, errNobody) {
		t.Errorf("of a name that nobody has: %v", err)
	}

	pid, _, _ = sleeper(t, uniqueName(3))
	write(strconv.Itoa(pid))
	for name, tt := range map[string]struct {
		text, process, want string
		mode                os.FileMode
	}{
		"another program":    {strconv.Itoa(pid), "nginx", "and not", 0o644},
		"init":               {"1", "", "no process that may", 0o644},
		"the agent itself":   {strconv.Itoa(os.Getpid()), "", "no process that may", 0o644},
		"a group":            {"-" + strconv.Itoa(pid), "", "no process that may", 0o644},
		"no number":          {"nginx", "", "no process that may", 0o644},
		"writable by others": {strconv.Itoa(pid), "", "only its owner can write", 0o666},
	} {
		must(t, os.RemoveAll(pidFile))
		write(tt.text)
		must(t, os.Chmod(pidFile, tt.mode))
		if err := (Signal{Name: "HUP", PIDFile: pidFile, Process: tt.process}).tell(t.Context(), nil); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	must(t, os.Remove(pidFile))
	if err := (Signal{Name: "HUP", PIDFile: pidFile}).tell(t.Context(), nil); !errors.Is(err, errNobody) {
		t.Errorf("without a file: %v", err)
	}
	if os.Geteuid() == 0 {
		write(strconv.Itoa(pid))
		must(t, os.Chown(pidFile, 4321, -1))
		if err := (Signal{Name: "HUP", PIDFile: pidFile}).tell(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "may not name it") {
			t.Errorf("a stranger's file names root's process: %v", err)
		}
	}
	if p, err := look(pid); err != nil || p.name != uniqueName(3) || p.parent != os.Getpid() || p.uid != os.Getuid() {
		t.Errorf("it was signalled all the same, or is not known: %+v, %v", p, err)
	}
}

// TestWorkersAreNotSignalled: their master tells them.
func TestWorkersAreNotSignalled(t *testing.T) {
	name := uniqueName(4)
	sh := program(t, "/bin/sh", name)
	c := exec.Command(sh, "-c", `"$0" -c 'read x' <&3 & wait`, sh) // a worker of its master's name
	r, w, err := os.Pipe()
	must(t, err)
	defer w.Close()
	c.ExtraFiles = []*os.File{r}
	must(t, c.Start())
	defer func() { _ = c.Process.Kill(); _ = c.Wait() }()
	both := func() (n int) {
		all, err := os.ReadDir("/proc")
		must(t, err)
		for _, e := range all {
			if pid, err := strconv.Atoi(e.Name()); err == nil {
				if p, err := look(pid); err == nil && p.name == name {
					n++
				}
			}
		}
		return n
	}
	for end := time.Now().Add(30 * time.Second); both() < 2; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the worker did not come")
		}
	}
	if pids, err := named(name); err != nil || len(pids) != 1 || pids[0] != c.Process.Pid {
		t.Errorf("%v, %v; the master is %d", pids, err, c.Process.Pid)
	}
}

func shell(script string, more ...string) runner {
	return runner{Command{Argv: append([]string{"/bin/sh", "-c", script}, more...)}, "/etc/web/tls"}
}

func TestCommands(t *testing.T) {
	t.Setenv("MESHCA_TEST_SECRET", "hunter2")
	out := filepath.Join(t.TempDir(), "env")
	must(t, shell(`pwd > "$0"; env >> "$0"; ls -l /proc/self/fd >> "$0"`, out).tell(t.Context(), nil))
	env, err := os.ReadFile(out)
	must(t, err)
	if !strings.HasPrefix(string(env), "/\n") || !strings.Contains(string(env), "MESHCA_DIR=/etc/web/tls\n") || strings.Contains(string(env), "hunter2") {
		t.Errorf("it sees\n%s", env)
	}

	if err := shell(`echo "it does not"; echo "work" >&2; exit 3`).tell(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "exit status 3; it said: it does not work") {
		t.Errorf("got %v", err)
	}
	if err := shell(`i=0; while [ $i -lt 20000 ]; do echo "line $i"; i=$((i+1)); done; echo end; exit 1`).tell(t.Context(), nil); err == nil || len(err.Error()) > 700 {
		t.Errorf("%d bytes of error", len(err.Error()))
	}
	if err := (runner{Command{Argv: []string{"/no/such/program"}}, "/"}).tell(t.Context(), nil); err == nil {
		t.Error("a program that is not there ran")
	}
}

func TestCommandsThatHang(t *testing.T) {
	left := filepath.Join(t.TempDir(), "left")
	r := shell(`(sleep 600; touch "$0") & echo $! > "$0.pid"; wait`, left)
	r.Timeout = 300 * time.Millisecond
	if err := r.tell(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "longer than 300ms") {
		t.Errorf("got %v", err)
	}
	data, err := os.ReadFile(left + ".pid")
	must(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	must(t, err)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(state), ") Z ") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("what it started runs on: %s", state)
		}
	}
}

func TestNoKeyIsRepeated(t *testing.T) {
	r := newRoot(t)
	files, err := render(everySet, newSVID(t, r), r.Bundle(1))
	must(t, err)
	secrets := secretsOf(files)
	if len(secrets) < 8 {
		t.Fatalf("%d parts", len(secrets))
	}
	key := string(files["tls.key"].data)
	body := strings.TrimSpace(strings.Split(key, "-----")[2])
	for name, text := range map[string]string{
		"the file": key, "the body": body, "a line": strings.Split(body, "\n")[1], "broken off": body[20:60], "the bundle": string(files["credentialbundle.pem"].data),
	} {
		err := shell(`printf '%s' "$0"; exit 1`, text).tell(t.Context(), secrets)
		if err == nil || strings.Contains(err.Error(), body[24:40]) || !strings.Contains(err.Error(), "withheld") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := shell(`printf '%s' "$0"; exit 1`, string(files["tls.crt"].data)[:200]).tell(t.Context(), secrets); strings.Contains(err.Error(), "withheld") {
		t.Errorf("a certificate is no secret: %v", err)
	}
}

func TestHTTP(t *testing.T) {
	var got []string
	answer := http.StatusNoContent
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got = append(got, fmt.Sprintf("%s %s %q", r.Method, r.URL.Path, body))
		if answer == http.StatusFound {
			http.Redirect(w, r, "/elsewhere", answer)
			return
		}
		w.WriteHeader(answer)
		if answer >= 300 {
			_, _ = io.WriteString(w, "no\x1b[31m\nnot now")
		}
	})
	plain := httptest.NewServer(handler)
	defer plain.Close()
	must(t, HTTP{URL: plain.URL + "/reload"}.tell(t.Context(), nil))
	if want := `POST /reload ""`; len(got) != 1 || got[0] != want {
		t.Errorf("it got %q", got)
	}
	answer = http.StatusServiceUnavailable
	if err := (HTTP{URL: plain.URL}).tell(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "answered 503: no [31m not now") {
		t.Errorf("got %v", err)
	}
	answer, got = http.StatusFound, nil
	if err := (HTTP{URL: plain.URL}).tell(t.Context(), nil); err == nil || len(got) != 1 {
		t.Errorf("a redirect was followed: %v, %q", err, got)
	}
	answer = http.StatusOK

	socket := filepath.Join(t.TempDir(), "a.sock")
	l, err := net.Listen("unix", socket)
	must(t, err)
	unix := &http.Server{Handler: handler}
	go func() { _ = unix.Serve(l) }()
	defer unix.Close()
	must(t, HTTP{URL: "http://localhost/reload", Socket: socket}.tell(t.Context(), nil))

	secure := httptest.NewTLSServer(handler)
	defer secure.Close()
	if err := (HTTP{URL: secure.URL}).tell(t.Context(), nil); err == nil {
		t.Error("a certificate that nobody vouches for was taken")
	}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	must(t, os.WriteFile(ca, pemOf([]*x509.Certificate{secure.Certificate()}), 0o600))
	must(t, HTTP{URL: secure.URL, CAFile: ca}.tell(t.Context(), nil))

	hang := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer hang.Close()
	if err := (HTTP{URL: hang.URL, Timeout: 100 * time.Millisecond}).tell(t.Context(), nil); err == nil {
		t.Error("a server that says nothing counts as told")
	}
}

// TestANameThatLeadsElsewhereIsNotFollowed: what is dialled is looked at, not what the name says.
func TestANameThatLeadsElsewhereIsNotFollowed(t *testing.T) {
	transport, err := HTTP{URL: "http://localhost/"}.transport()
	must(t, err)
	conn, err := transport.DialContext(t.Context(), "tcp", "192.0.2.1:80")
	if err == nil {
		conn.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "not this machine") {
		t.Errorf("got %v", err)
	}
}
