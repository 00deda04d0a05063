package main

import (
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/meshca/meshca/test/parts"
)

// etc holds what the programs and ip read; it stands in dir.
//
//go:embed etc
var etc embed.FS

// startLimit is for all programs together, on a machine that has other things to do.
const startLimit = 90 * time.Second

// endGrace is how long a program has that was asked to end.
const endGrace = 20 * time.Second

// keeper holds the node's programs.
type keeper struct {
	mu       sync.Mutex
	programs map[string]program
	running  map[string]*parts.Process
}

// keep starts everything, says that it is ready by opening its door, and lasts until it is killed.
func keep() error {
	if err := os.CopyFS(dir, etc); err != nil {
		return err
	}
	if err := network(); err != nil {
		return err
	}
	k := &keeper{programs: maps.Clone(programs), running: map[string]*parts.Process{}}
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	err := k.startAll(ctx)
	cancel()
	if err != nil {
		return err
	}
	door, err := net.FileListener(os.NewFile(doorFD, "door"))
	if err != nil {
		return err
	}
	go lead(door, apiAddress)
	control, err := net.Listen("unix", filepath.Join(dir, "control.sock"))
	if err != nil {
		return err
	}
	return (&http.Server{Handler: k.control(), ReadHeaderTimeout: 5 * time.Second}).Serve(control)
}

// control is what package node may ask for: GET /ready, POST /PROGRAM/start, /PROGRAM/stop and /PROGRAM/end, and with a path
// and arguments as JSON /PROGRAM/add.
func (k *keeper) control() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ready", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("POST /{program}/start", func(w http.ResponseWriter, r *http.Request) {
		answer(w, k.start(r.Context(), r.PathValue("program")))
	})
	mux.HandleFunc("POST /{program}/stop", func(w http.ResponseWriter, r *http.Request) {
		answer(w, k.stop(r.PathValue("program"), (*parts.Process).Kill))
	})
	mux.HandleFunc("POST /{program}/end", func(w http.ResponseWriter, r *http.Request) {
		answer(w, k.stop(r.PathValue("program"), func(p *parts.Process) { p.Stop(endGrace) }))
	})
	mux.HandleFunc("POST /{program}/add", func(w http.ResponseWriter, r *http.Request) {
		var p struct {
			Path string   `json:"path"`
			Args []string `json:"args"`
		}
		if err := json.NewDecoder(r.Body).Decode(&p); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		answer(w, k.add(r.PathValue("program"), program{path: p.Path, args: p.Args}))
	})
	return mux
}

func answer(w http.ResponseWriter, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
	}
}

// startAll starts the programs in the order in which they need each other.
func (k *keeper) startAll(ctx context.Context) error {
	for _, name := range []string{"etcd", "containerd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "coredns"} {
		if err := k.start(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// add adds a program; it does not start it.
func (k *keeper) add(name string, p program) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.programs[name]; ok {
		return fmt.Errorf("the node has a program %q already", name)
	}
	k.programs[name] = p
	return nil
}

// start starts one and waits until it answers, where others need that.
func (k *keeper) start(ctx context.Context, name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	p, ok := k.programs[name]
	if !ok {
		return fmt.Errorf("the node has no program %q", name)
	}
	if running := k.running[name]; running != nil && !ended(running) {
		return fmt.Errorf("%s runs already", name)
	}
	log, err := os.OpenFile(filepath.Join(dir, "logs", name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	process, err := parts.Start(parts.Command{Path: cmp.Or(p.path, filepath.Join(bin, name)), Args: p.args, Dir: dir, Log: log})
	if err != nil {
		return err
	}
	k.running[name] = process
	go func() {
		<-process.Done()
		log.Close()
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.running[name] == process {
			fmt.Fprintf(os.Stderr, "node: %s ended by itself; it printed last:\n%s\n", name, process.Output())
		}
	}()
	if p.ready == nil {
		return nil
	}
	return process.Await(ctx, p.ready)
}

// stop stops one in the given way.
func (k *keeper) stop(name string, how func(*parts.Process)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	process := k.running[name]
	if process == nil || ended(process) {
		return fmt.Errorf("%s does not run", name)
	}
	delete(k.running, name)
	how(process)
	return nil
}

func ended(p *parts.Process) bool {
	select {
	case <-p.Done():
		return true
	default:
		return false
	}
}

// network gives the node its addresses. It has no way out: there is no interface but its own.
func network() error {
	ip := exec.Command("ip", "-batch", filepath.Join(dir, "etc", "addresses"))
	if out, err := ip.CombinedOutput(); err != nil {
		return fmt.Errorf("ip: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
}

// lead connects whoever comes to the listener with address.
func lead(l net.Listener, address string) {
	for {
		from, err := l.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				fmt.Fprintln(os.Stderr, "node: nobody reaches the API server from outside any more:", err)
			}
			return
		}
		go func() {
			defer from.Close()
			to, err := (&net.Dialer{Timeout: 5 * time.Second}).Dial("tcp", address)
			if err != nil {
				return
			}
			defer to.Close()
			go func() {
				defer to.Close()
				_, _ = io.Copy(to, from)
			}()
			_, _ = io.Copy(from, to)
		}()
	}
}
