package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/sds"
)

// maxWorkloads bounds one agent; a node runs a few hundred pods at most.
const maxWorkloads = 5000

// Config is what an Agent is made of.
type Config struct {
	// TrustDomain of the CA and of every workload. Required.
	TrustDomain spiffeid.TrustDomain
	// Cluster is this node's cluster, as the CA's configuration names it. Required.
	Cluster string
	// Server is the CA's host:port. Required.
	Server string
	// TokenFile holds the agent's own service-account token, audience `meshca-agent`; it is read at each use. Required.
	TokenFile string
	// BundleFile is the first trust: SPIFFE bundle JSON or PEM. It is read at the start and at each handshake with the CA
	// that fails; the higher sequence wins. Required.
	BundleFile string
	// RuntimeDir holds keys/, the lock against a second agent, and by default the admin socket. Required.
	RuntimeDir string
	// StateDir holds the trust bundle, which outlives a reboot; RuntimeDir where it is empty.
	StateDir string
	// CleanUp takes away what the agent keeps in both when it ends and has no workload: there is nothing then that the next
	// run would serve. An agent that is uninstalled leaves nothing so.
	CleanUp bool
	// AdminSocket is where AgentAdminService is served; RuntimeDir/admin.sock where it is empty.
	AdminSocket string
	// OpsAddress is where /livez, /readyz and /metrics are served over HTTP; nowhere where it is empty.
	OpsAddress string
	// Workloads to keep and to serve.
	Workloads []Workload
	// Sources tell of workloads that come and go.
	Sources []Source
	// PlainValidation, SystemBundle and SDS go to the SDS server: see sds.Config.
	PlainValidation bool
	SystemBundle    string
	SDS             sds.Limits
	// ConnectionsPerSocket bounds the open connections of one workload's socket; 32 where it is 0.
	ConnectionsPerSocket int
	// ConnectionsPerPod and StreamsPerPod bound what all sockets of a pod have open together; 16 and 24 where they are 0.
	ConnectionsPerPod, StreamsPerPod int
	// Version is told to the CA and in status.
	Version string
	// Log gets what happens; slog.Default where it is nil.
	Log *slog.Logger
	// Dial opens connections to the CA below TLS; TCP where it is nil.
	Dial func(ctx context.Context, address string) (net.Conn, error)

	now func() instant // the machine's clocks where it is nil
}

// Workload is one identity on this node: the token that proves it and the socket that serves it.
type Workload struct {
	// Socket is the path of its unix socket, at most 107 bytes.
	Socket string
	// TokenFile holds its service-account token, audience `meshca`; it is read again at each use.
	TokenFile string
	// Mode of the socket; 0600 where it is 0. Whoever may write to the socket gets the identity.
	Mode fs.FileMode
	// UID and GID own the socket; the agent's own where nil.
	UID, GID *int
	// TTL asks for a shorter life than policy grants, and for ten minutes at least; 0: what policy grants.
	TTL time.Duration
	// Pod is whom it is for, where that is a pod: for status and logs. Who it is, the token alone proves.
	Pod Pod
	// PodUID, in the place of TokenFile, is the UID of a pod on this node that the agent vouches for: the CA must know it, and
	// policy open that way. Socket is then a name alone: there is no socket of its own, and whoever found out that a connection
	// is the pod's hands it over by Kept.Serve.
	PodUID string
}

// Pod names a pod. Workloads of one UID share what one may cost: connections, streams, names.
type Pod struct{ Namespace, Name, UID string }

// String is empty where no pod is named.
func (p Pod) String() string {
	if p == (Pod{}) {
		return ""
	}
	return p.Namespace + "/" + p.Name
}

// withDefaults fills what may be left out.
func (c Config) withDefaults() Config {
	if c.StateDir == "" {
		c.StateDir = c.RuntimeDir
	}
	if c.AdminSocket == "" {
		c.AdminSocket = filepath.Join(c.RuntimeDir, "admin.sock")
	}
	if c.ConnectionsPerSocket == 0 {
		c.ConnectionsPerSocket = 32
	}
	if c.ConnectionsPerPod == 0 {
		c.ConnectionsPerPod = 16
	}
	if c.StreamsPerPod == 0 {
		c.StreamsPerPod = 24
	}
	if c.now == nil {
		c.now = machineClocks()
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	c.AdminSocket = filepath.Clean(c.AdminSocket)
	workloads := make([]Workload, len(c.Workloads))
	for i, w := range c.Workloads {
		workloads[i] = w.withDefaults()
	}
	c.Workloads = workloads
	return c
}

func (w Workload) withDefaults() Workload {
	if w.Mode == 0 {
		w.Mode = 0o600
	}
	if w.Socket != "" {
		w.Socket = filepath.Clean(w.Socket)
	}
	return w
}

// Check finds what is wrong with the configuration as such, all of it at once; files are not looked at.
func (c Config) Check() error {
	c = c.withDefaults()
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.TrustDomain.IsZero() {
		wrong("trustDomain is missing: name the CA's trust domain")
	}
	if !isLabel(c.Cluster) {
		wrong("cluster %q is not an RFC 1123 label: use the cluster's name in the CA's configuration", c.Cluster)
	}
	if host, port, err := net.SplitHostPort(c.Server); err != nil || host == "" || port == "" {
		wrong("server %q is not host:port", c.Server)
	}
	for _, field := range []struct{ name, value string }{
		{"tokenFile", c.TokenFile}, {"bundleFile", c.BundleFile}, {"runtimeDir", c.RuntimeDir},
	} {
		if field.value == "" {
			wrong("%s is missing", field.name)
		}
	}
	if c.OpsAddress != "" {
		if _, _, err := net.SplitHostPort(c.OpsAddress); err != nil {
			wrong("opsAddress %q is not host:port", c.OpsAddress)
		}
	}
	if c.ConnectionsPerSocket < 0 || c.ConnectionsPerPod < 0 || c.StreamsPerPod < 0 {
		wrong("connectionsPerSocket, connectionsPerPod or streamsPerPod is negative")
	}
	if len(c.Workloads) > maxWorkloads {
		wrong("%d workloads: at most %d are kept", len(c.Workloads), maxWorkloads)
	}
	taken := map[string]string{c.AdminSocket: "the admin socket"}
	for i, w := range c.Workloads {
		what := fmt.Sprintf("workloads[%d]", i)
		errs = append(errs, w.check(what))
		if by, ok := taken[w.Socket]; ok && w.Socket != "" {
			wrong("%s: the socket %s is already %s", what, w.Socket, by)
		}
		taken[w.Socket] = "that of " + what
	}
	return errors.Join(errs...)
}

func (w Workload) check(what string) error {
	var errs []error
	wrong := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: "+format, append([]any{what}, args...)...))
	}
	if w.Socket == "" {
		wrong("socket is missing")
	} else if err := checkSocketPath(w.Socket); err != nil {
		wrong("%w", err)
	}
	switch {
	case w.TokenFile == "" && w.PodUID == "":
		wrong("tokenFile is missing")
	case w.TokenFile != "" && w.PodUID != "":
		wrong("it has both a token file and the UID of a pod to vouch for")
	}
	if w.Mode&^fs.ModePerm != 0 {
		wrong("mode %v holds more than permissions", w.Mode)
	}
	if w.UID != nil && *w.UID < 0 || w.GID != nil && *w.GID < 0 {
		wrong("uid and gid are numbers from 0 on")
	}
	if w.TTL < 0 {
		wrong("ttl is negative")
	}
	return errors.Join(errs...)
}

// isLabel reports whether s is an RFC 1123 label, as cluster names are.
func isLabel(s string) bool {
	if len(s) == 0 || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}
