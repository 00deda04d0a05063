package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/pods"
	"github.com/meshca/meshca/attestor/unixpeer"
)

// SharedSocketConfig is one socket for the pods of a node that have no volume of the CSI driver. Who connects is found out by
// the kernel's word, the agent vouches for the pod at the CA, and a policy rule must say `nodeVouched` for it there. In a pod
// of its own the agent needs hostPID and, to see the host's cgroups, a privileged container.
type SharedSocketConfig struct {
	// Enabled switches it on. Default false.
	Enabled bool `json:"enabled"`
	// Path of the socket. Pods mount its directory, so nothing else may lie there; the agent makes it. Default
	// "<runtimeDir>/shared/agent.sock".
	Path string `json:"path"`
	// CgroupRoot is the kubelet's --cgroup-root, below which the control groups of its pods are. Default "/".
	CgroupRoot string `json:"cgroupRoot"`
}

func (c SharedSocketConfig) path(runtimeDir string) string {
	if c.Path == "" {
		return filepath.Join(runtimeDir, "shared", "agent.sock")
	}
	return filepath.Clean(c.Path)
}

// check finds what is wrong with the section; whole is the configuration that it is part of.
func (c SharedSocketConfig) check(whole *Config) error {
	if !c.Enabled {
		if c != (SharedSocketConfig{}) {
			return errors.New("sharedSocket: it has settings, and is not enabled: set sharedSocket.enabled to true, or take them out")
		}
		return nil
	}
	errs := []error{absolute("sharedSocket.path", c.Path)}
	if c.CgroupRoot != "" && (!path.IsAbs(c.CgroupRoot) || path.Clean(c.CgroupRoot) != c.CgroupRoot) {
		errs = append(errs, fmt.Errorf("sharedSocket.cgroupRoot: %q is no absolute path without detours: name the kubelet's --cgroup-root", c.CgroupRoot))
	}
	return errors.Join(append(errs, c.apart(whole))...)
}

// apart refuses a directory in which there is more than the socket: pods that run as root would find it, such as the keys
// of all others.
func (c SharedSocketConfig) apart(whole *Config) error {
	const mend = "leave the path out, or name one in a directory of its own"
	socket := c.path(whole.RuntimeDir)
	dir := filepath.Dir(socket)
	for _, name := range []string{"keys", "pods", "streams"} {
		if own := filepath.Join(whole.RuntimeDir, name); lies(own, dir) {
			return fmt.Errorf("sharedSocket.path: %s lies in %s, which the agent keeps to itself: %s", socket, own, mend)
		}
	}
	type place struct{ path, what string }
	others := []place{
		{whole.RuntimeDir, "keys"}, {whole.StateDir, "the trust bundle"}, {whole.AdminSocket, "the admin socket"},
		{whole.TokenFile, "the agent's token"}, {whole.BundleFile, "the bundle file"},
	}
	for i, w := range whole.Workloads {
		whose := fmt.Sprintf("workloads[%d]'s ", i)
		others = append(others, place{w.Socket, whose + "socket"}, place{w.TokenFile, whose + "token"})
		for _, f := range w.Files {
			others = append(others, place{f.Dir, whose + "files"})
		}
	}
	for _, other := range others {
		if lies(dir, other.path) {
			return fmt.Errorf("sharedSocket.path: pods mount its directory, and %s holds %s: %s", dir, other.what, mend)
		}
	}
	return nil
}

// lies reports whether path is dir or lies below it, by their names or by what their links lead to.
func lies(dir, path string) bool {
	return within(dir, filepath.Clean(path)) || within(resolved(dir), resolved(path))
}

// maxLinks is how many links the kernel follows in a path (path_resolution(7)).
const maxLinks = 40

// resolved follows the links in an absolute path, also those to what is not there yet: it may come to be later.
func resolved(path string) string {
	at, links := "/", 0
	for todo := strings.Split(path, "/"); len(todo) > 0; {
		next := filepath.Join(at, todo[0]) // "" and "." stay, ".." is the parent of where the links led
		todo = todo[1:]
		to, err := os.Readlink(next)
		if err != nil || links == maxLinks {
			at = next
			continue
		}
		if links++; filepath.IsAbs(to) {
			at = "/"
		}
		todo = slices.Concat(strings.Split(to, "/"), todo)
	}
	return at
}

// within reports whether path is dir or lies below it.
func within(dir, path string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// source is the section as the agent takes it. Switched off, it is what takes away what an agent left that had the socket where
// it is by default; nil where that place is something else's by now.
func (c SharedSocketConfig) source(whole *Config, log *slog.Logger) agent.Source {
	config := pods.Config{
		Socket: c.path(whole.RuntimeDir), StateFile: filepath.Join(whole.RuntimeDir, "shared.json"), CleanUp: whole.CleanUp, Log: log,
		Attest: func(l *net.UnixListener, refused func(error)) (pods.Peers, error) {
			return unixpeer.New(l, unixpeer.Config{CgroupRoot: c.CgroupRoot, Refused: refused})
		},
	}
	switch {
	case c.Enabled:
		return pods.New(config)
	case c.apart(whole) != nil:
		return nil
	}
	return pods.NewLeftovers(config)
}
