package main

import (
	"errors"
	"log/slog"
	"path/filepath"

	"github.com/meshca/meshca/agent/csi"
	"github.com/meshca/meshca/agent/files"
)

// CSIConfig makes the agent a CSI node driver, by whose volumes pods get their identities. All paths are the kubelet's as
// much as the agent's: in a container they are mounted at the same places, KubeletDir with mount propagation
// Bidirectional. Volumes lie below the runtime directory, which must outlive the agent's container (a hostPath) and
// belongs on a tmpfs.
type CSIConfig struct {
	// Enabled switches it on. The agent is ready then when the kubelet has registered the driver. Default false.
	Enabled bool `json:"enabled"`
	// Driver is the driver's name: that of the CSIDriver object, and what pods write as `driver`. Default "csi.meshca.io".
	Driver string `json:"driver"`
	// KubeletDir is the kubelet's root directory, below which volumes are mounted. Default "/var/lib/kubelet".
	KubeletDir string `json:"kubeletDir"`
	// Socket is where the kubelet calls the driver, at most 107 bytes. Default "<kubeletDir>/plugins/<driver>/csi.sock".
	Socket string `json:"socket"`
	// RegistrationDir is where the kubelet looks for drivers. Default "<kubeletDir>/plugins_registry".
	RegistrationDir string `json:"registrationDir"`
	// NodeName is what the CSINode object shows as the driver's node ID. Default: the node in the agent's own token, and
	// where API servers write none into it (before Kubernetes 1.30) the host's name.
	NodeName string `json:"nodeName"`
	// Timeout is how long a pod's first mount waits for its first SVID. It must be below the kubelet's own two minutes.
	// Default "1m45s".
	Timeout Duration `json:"timeout"`
}

// check finds what is wrong with the section.
func (c CSIConfig) check(runtimeDir string) error {
	if !c.Enabled {
		if c != (CSIConfig{}) {
			return errors.New("csi: it has settings, and is not enabled: set csi.enabled to true, or take them out")
		}
		return nil
	}
	return c.driver(runtimeDir, nil).Check()
}

// driver is the section as the driver takes it.
func (c CSIConfig) driver(runtimeDir string, log *slog.Logger) csi.Config {
	return csi.Config{
		Name: c.Driver, Version: version, Dir: filepath.Join(runtimeDir, "pods"), KubeletDir: c.KubeletDir, Socket: c.Socket,
		RegistrationDir: c.RegistrationDir, NodeName: c.NodeName, Timeout: c.Timeout.Duration,
		Writer: files.NewVolumes(log), Log: log,
	}
}
