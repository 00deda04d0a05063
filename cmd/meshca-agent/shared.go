package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path"
	"path/filepath"
	"strings"

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

// check finds what is wrong with the section.
func (c SharedSocketConfig) check(runtimeDir string) error {
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
	// Pods that run as root would find the keys of all others beside the socket.
	run := filepath.Clean(runtimeDir)
	if dir := filepath.Dir(c.path(runtimeDir)); dir == run || dir == filepath.Join(run, "keys") || dir == filepath.Join(run, "pods") || strings.HasPrefix(run, strings.TrimSuffix(dir, "/")+"/") {
		errs = append(errs, fmt.Errorf("sharedSocket.path: pods mount its directory, and %s holds keys: leave the path out, or name one in a directory of its own", dir))
	}
	return errors.Join(errs...)
}

// source is the section as the agent takes it.
func (c SharedSocketConfig) source(runtimeDir string, log *slog.Logger) *pods.Source {
	return pods.New(pods.Config{
		Socket: c.path(runtimeDir), StateFile: filepath.Join(runtimeDir, "shared.json"), Log: log,
		Attest: func(l *net.UnixListener, refused func(error)) (pods.Peers, error) {
			return unixpeer.New(l, unixpeer.Config{CgroupRoot: c.CgroupRoot, Refused: refused})
		},
	})
}
