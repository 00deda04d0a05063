package csi

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

const (
	// DriverName is the name of the CSIDriver object, and what pods write as `driver`.
	DriverName = "csi.meshca.io"
	// Audience of the tokens that the CSIDriver object must have the kubelet ask for.
	Audience = "meshca"

	// kubeletTimeout is how long a kubelet waits for NodePublishVolume.
	kubeletTimeout = 2 * time.Minute
	// maxSocketPath is sun_path of unix(7) without its final NUL.
	maxSocketPath = 107
)

// Config is what a Driver is made of.
type Config struct {
	// Name of the driver; DriverName where it is empty.
	Name string
	// Version that the kubelet is told. Required.
	Version string
	// Dir holds a directory for each volume, with tokens in it: it is the driver's alone, and belongs on a tmpfs. Required.
	Dir string
	// KubeletDir is the kubelet's own directory, at the same path as the kubelet has it; /var/lib/kubelet where it is
	// empty. Volumes are mounted below it and nowhere else.
	KubeletDir string
	// Socket is where the kubelet calls; KubeletDir/plugins/<Name>/csi.sock where it is empty.
	Socket string
	// RegistrationDir is where the kubelet looks for drivers; KubeletDir/plugins_registry where it is empty.
	RegistrationDir string
	// NodeName is the node ID that the kubelet is told; what the agent's own token says, else the host's name, where it
	// is empty.
	NodeName string
	// Timeout bounds how long a pod's first mount waits for its first SVID; 105 s where it is 0. The kubelet's own limit
	// is two minutes.
	Timeout time.Duration
	// Writer makes files of what a workload has; volumes cannot ask for files where it is nil.
	Writer Writer
	// Log gets what happens; slog.Default where it is nil.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	set := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	set(&c.Name, DriverName)
	set(&c.KubeletDir, "/var/lib/kubelet")
	set(&c.Socket, filepath.Join(c.KubeletDir, "plugins", c.Name, "csi.sock"))
	set(&c.RegistrationDir, filepath.Join(c.KubeletDir, "plugins_registry"))
	if c.Timeout == 0 {
		c.Timeout = kubeletTimeout - 15*time.Second
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c
}

// registrationSocket is the one that the kubelet finds; its name must not begin with a dot.
func (c Config) registrationSocket() string {
	return filepath.Join(c.RegistrationDir, c.Name+"-reg.sock")
}

// driverName is a CSI driver's name: CSI spec, GetPluginInfoResponse.name, and 63 bytes.
var driverName = regexp.MustCompile(`^[A-Za-z0-9]([-.A-Za-z0-9]{0,61}[A-Za-z0-9])?$`)

// Check finds what is wrong with the configuration as such, all of it at once; files are not looked at.
func (c Config) Check() error {
	c = c.withDefaults()
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf("csi: "+format, args...)) }
	if !driverName.MatchString(c.Name) {
		wrong("driver %.80q is no driver's name: letters, digits, dots and dashes, at most 63", c.Name)
	}
	for _, p := range []struct{ key, path string }{
		{"the runtime directory", c.Dir}, {"kubeletDir", c.KubeletDir}, {"socket", c.Socket}, {"registrationDir", c.RegistrationDir},
	} {
		if !filepath.IsAbs(p.path) || p.path != filepath.Clean(p.path) || strings.ContainsRune(p.path, 0) {
			wrong("%s: %q is no absolute path in its shortest form", p.key, p.path)
		}
	}
	longest := newVolume(c.Dir, keyOf("")).socket()
	for _, path := range []string{c.Socket, c.registrationSocket(), longest} {
		if len(path) > maxSocketPath {
			wrong("the socket %s would have a path of %d bytes, at most %d fit: choose a shorter directory", path, len(path), maxSocketPath)
		}
	}
	if c.Timeout < 0 || c.Timeout >= kubeletTimeout {
		wrong("timeout %v must be below the kubelet's own %v", c.Timeout, kubeletTimeout)
	}
	return errors.Join(errs...)
}
