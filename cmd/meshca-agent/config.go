package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/cmd/internal/strictyaml"
)

// maxConfigBytes bounds what is read of a configuration file.
const maxConfigBytes = 4 << 20

// Config is the configuration file of `meshca-agent run`: YAML, read strictly (an unknown key is an error, also
// one that differs in case alone). This struct is its manual. Paths are absolute; durations are Go's ("6h", "90s").
type Config struct {
	// TrustDomain is the SPIFFE trust domain, such as "mesh.example", as the CA has it. Required.
	TrustDomain string `json:"trustDomain"`
	// Cluster is this node's cluster, by its name under `clusters` in the CA's configuration. Required.
	Cluster string `json:"cluster"`
	// Server is the CA's gRPC address, host:port. Required.
	Server string `json:"server"`
	// TokenFile holds the agent's own service-account token, audience "meshca-agent", bound to its pod. It is read again
	// at each use. Default "/var/run/secrets/meshca/token".
	TokenFile string `json:"tokenFile"`
	// BundleFile is how the agent knows the CA the first time: a SPIFFE bundle (JSON with its sequence) or PEM, which only
	// the CA may write. It is read at the start and again at each handshake with the CA that fails; the higher sequence
	// wins. Default "/etc/meshca/bundle.json".
	BundleFile string `json:"bundleFile"`
	// RuntimeDir holds keys/ (mode 0700; put it on a tmpfs) and the admin socket. Default "/run/meshca-agent".
	RuntimeDir string `json:"runtimeDir"`
	// StateDir holds the trust bundle, which must outlive a reboot. Default "/var/lib/meshca-agent".
	StateDir string `json:"stateDir"`
	// CleanUp has the agent take away what it keeps in both when it ends and has no workload. In a cluster that is so
	// when it is uninstalled, or a node has no pods with its volumes and none that uses the shared socket; what it needs
	// to start anew comes by bundleFile. Default false.
	CleanUp bool `json:"cleanUp"`
	// AdminSocket is the unix socket that certctl speaks to, mode 0600. Default "<runtimeDir>/admin.sock".
	AdminSocket string `json:"adminSocket"`
	// OpsAddress is the address of /livez, /readyz and /metrics, plain HTTP. Default "127.0.0.1:9091".
	OpsAddress string `json:"opsAddress"`
	// Workloads are the identities to keep and to serve on this node.
	Workloads []WorkloadConfig `json:"workloads"`
	// CSI gives identities to the pods of a Kubernetes node: see docs/csi.md.
	CSI CSIConfig `json:"csi"`
	// StartupTaint is the key of a taint that new nodes register with, and that the agent takes off its node when it is ready:
	// so no pod is put on a node that cannot give it its identity yet. The agent must run in a pod then, and its service
	// account may get and patch nodes; the node is csi.nodeName, or that in the agent's token. Default: none.
	StartupTaint string `json:"startupTaint"`
	// SharedSocket gives identities to pods without such a volume: see docs/shared-socket.md.
	SharedSocket SharedSocketConfig `json:"sharedSocket"`
	// SDS is how secrets are served.
	SDS SDSConfig `json:"sds"`
	// LogLevel is debug, info, warn or error. Default "info". The log goes to stderr, a JSON object a line.
	LogLevel string `json:"logLevel"`
}

// WorkloadConfig is one identity: the token that proves it, and the socket that serves it.
type WorkloadConfig struct {
	// Socket is the path of the workload's own unix socket, at most 107 bytes. Required.
	Socket string `json:"socket"`
	// TokenFile holds the workload's service-account token, audience "meshca", bound to its pod. It is read again at each
	// use. Required.
	TokenFile string `json:"tokenFile"`
	// Mode of the socket, octal in quotes. Whoever can write to the socket gets the identity. Default "0600".
	Mode string `json:"mode"`
	// UID and GID own the socket. Default: the agent's own.
	UID *int `json:"uid"`
	GID *int `json:"gid"`
	// TTL asks for SVIDs that live shorter than policy grants; what is less than 10m asks for 10m. Default: what policy grants.
	TTL Duration `json:"ttl"`
	// Files are directories in which the same stands as files, for what does not speak SDS: see docs/files.md.
	Files []FilesConfig `json:"files"`
}

// SDSConfig is how secrets are served, and what one proxy may cost.
type SDSConfig struct {
	// PlainValidation writes validation contexts as a bare trusted_ca instead of envoy.tls.cert_validator.spiffe, for
	// proxies that do not know the latter. A proxy gets that for itself by node metadata
	// `disable_spiffe_cert_validation: true`. Default false.
	PlainValidation bool `json:"plainValidation"`
	// SystemBundle is the path, in the proxy's file system, that the name `file-root:system` stands for. Default
	// "/etc/ssl/certs/ca-certificates.crt".
	SystemBundle string `json:"systemBundle"`
	// ConnectionsPerSocket is how many connections each of `workloads` may have open; further ones wait. Default 32.
	ConnectionsPerSocket int `json:"connectionsPerSocket"`
	// StreamsPerSocket is how many SDS streams and fetches each of `workloads` may have open; an Envoy opens one for each secret
	// that its configuration names. Default 32. On each of them a proxy can leave a request half sent, for firstRequest.
	StreamsPerSocket int `json:"streamsPerSocket"`
	// ConnectionsPerPod is how many a pod may have open over all its volumes and the shared socket; further ones wait, at the
	// shared socket they are closed. Default 16.
	ConnectionsPerPod int `json:"connectionsPerPod"`
	// StreamsPerPod is how many SDS streams and fetches a pod may have open over all its volumes and the shared socket. Default
	// 24. With the defaults 110 pods of 16 volumes each that do their worst take 431 MiB together, of the 512 that the chart gives
	// an agent: for each pod 24 streams of 114 KiB, 16 connections of 24 KiB, 512 KiB of names, and 64 KiB of answers that it
	// leaves unread; and 34 MiB for all that ask for more names, or leave more unread, than that.
	StreamsPerPod int `json:"streamsPerPod"`
	// Streams is how many all workloads may have open together. Default 20000.
	Streams int `json:"streams"`
	// NamesPerStream is how many secrets a stream may ask for at once. Default 10000.
	NamesPerStream int `json:"namesPerStream"`
	// StreamsPerConnection is how many a connection carries at once; further ones wait in the proxy. Default 100.
	StreamsPerConnection uint32 `json:"streamsPerConnection"`
	// NameBytesPerSocket is what the names that a workload, or a pod, asks for over all its streams can take, in bytes, with 128
	// for the keeping of each, whatever others take. A `file-` name counts three times its length. Default 524288 (512 KiB).
	NameBytesPerSocket int `json:"nameBytesPerSocket"`
	// SpareNameBytes is what names can take beyond that, of all workloads together. Default 8388608 (8 MiB).
	SpareNameBytes int `json:"spareNameBytes"`
	// RequestBytes is the size of a request that a proxy can leave half sent on each of its streams: about a thousand names, by
	// default 65536 (64 KiB).
	RequestBytes int `json:"requestBytes"`
	// LargeRequestBytes is the size of a request at most: ten thousand names, by default 786432 (768 KiB). Of those larger than
	// requestBytes, LargeRequests may be on their way at a time, of all workloads together; when more come, the oldest of who has
	// most of them gives way, with its connection. Default 2.
	LargeRequestBytes int `json:"largeRequestBytes"`
	LargeRequests     int `json:"largeRequests"`
	// AnswerBytes is the size at which an answer is split. gRPC clients take 4 MiB by default. Default 2097152 (2 MiB).
	AnswerBytes int `json:"answerBytes"`
	// AnswerBacklogPerSocket is what a workload, or a pod, can leave unread of answers, in bytes, whatever others do; further
	// answers wait. Default 65536 (64 KiB).
	AnswerBacklogPerSocket int `json:"answerBacklogPerSocket"`
	// SpareAnswerBacklog is what can be left unread beyond that, by all workloads together. Default 8388608 (8 MiB).
	SpareAnswerBacklog int `json:"spareAnswerBacklog"`
	// RequestsPerSecond is how many requests of a workload, or a pod, are read, over all its streams and fetches, in bursts of as
	// many; those beyond wait, 384 of a stream at most: with more the connection is closed. Default 1000.
	RequestsPerSecond int `json:"requestsPerSecond"`
	// FirstRequest is how long a stream may say nothing at first, and a request that has begun take to arrive: else the
	// connection is closed. Default "10s".
	FirstRequest Duration `json:"firstRequest"`
	// Send is how long a proxy may leave an answer unread; after twice as long without any reading the connection is closed.
	// Default "30s".
	Send Duration `json:"send"`
}

// Duration is a time.Duration that is written as a string.
type Duration struct{ time.Duration }

// UnmarshalJSON wants "90s", not a number of nanoseconds.
func (d *Duration) UnmarshalJSON(b []byte) error {
	s, err := strconv.Unquote(string(b))
	if err == nil {
		d.Duration, err = time.ParseDuration(s)
	}
	return err // strictyaml says where, and how it is written
}

// loadConfig reads, completes and checks a configuration file.
func loadConfig(file string) (*Config, error) {
	data, err := readBounded(file)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	c, err := parseConfig(data)
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", file, err)
	}
	return c, nil
}

func parseConfig(data []byte) (*Config, error) {
	var c Config
	if err := strictyaml.Decode(data, &c); err != nil {
		return nil, err
	}
	c.complete()
	if _, err := c.agent(nil); err != nil {
		return nil, err
	}
	if err := errors.Join(c.CSI.check(c.RuntimeDir), c.SharedSocket.check(&c)); err != nil {
		return nil, err
	}
	if _, err := c.logLevel(); err != nil {
		return nil, err
	}
	return &c, nil
}

// complete fills in defaults.
func (c *Config) complete() {
	set := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	set(&c.TokenFile, "/var/run/secrets/meshca/token")
	set(&c.BundleFile, "/etc/meshca/bundle.json")
	set(&c.RuntimeDir, "/run/meshca-agent")
	set(&c.StateDir, "/var/lib/meshca-agent")
	set(&c.AdminSocket, filepath.Join(c.RuntimeDir, "admin.sock"))
	set(&c.OpsAddress, "127.0.0.1:9091")
	set(&c.LogLevel, "info")
	for i := range c.Workloads {
		set(&c.Workloads[i].Mode, "0600")
	}
}

// agent is the checked configuration as the agent takes it.
func (c *Config) agent(log *slog.Logger) (agent.Config, error) {
	td, err := trustDomain(c.TrustDomain)
	if err != nil {
		return agent.Config{}, err
	}
	var errs []error
	for _, p := range []struct{ key, path string }{
		{"tokenFile", c.TokenFile}, {"bundleFile", c.BundleFile}, {"runtimeDir", c.RuntimeDir}, {"stateDir", c.StateDir}, {"adminSocket", c.AdminSocket},
	} {
		errs = append(errs, absolute(p.key, p.path))
	}
	errs = append(errs, c.SDS.check())
	a := agent.Config{
		TrustDomain: td, Cluster: c.Cluster, Server: c.Server, TokenFile: c.TokenFile, BundleFile: c.BundleFile,
		RuntimeDir: c.RuntimeDir, StateDir: c.StateDir, CleanUp: c.CleanUp, AdminSocket: c.AdminSocket, OpsAddress: c.OpsAddress,
		PlainValidation: c.SDS.PlainValidation, SystemBundle: c.SDS.SystemBundle, ConnectionsPerSocket: c.SDS.ConnectionsPerSocket,
		ConnectionsPerPod: c.SDS.ConnectionsPerPod, StreamsPerPod: c.SDS.StreamsPerPod,
		SDS:     c.SDS.limits(),
		Version: version, Log: log,
	}
	_, err = c.files(log)
	errs = append(errs, err)
	for i, w := range c.Workloads {
		made, err := w.agent(fmt.Sprintf("workloads[%d]", i))
		errs = append(errs, err)
		a.Workloads = append(a.Workloads, made)
	}
	errs = append(errs, a.Check())
	return a, errors.Join(errs...)
}

func (c *SDSConfig) limits() sds.Limits {
	return sds.Limits{
		Names: c.NamesPerStream, NameBytes: c.NameBytesPerSocket, SpareNameBytes: c.SpareNameBytes, RequestBytes: c.RequestBytes,
		LargeRequestBytes: c.LargeRequestBytes, LargeRequests: c.LargeRequests, AnswerBytes: c.AnswerBytes,
		AnswerBacklog: c.AnswerBacklogPerSocket, SpareAnswerBacklog: c.SpareAnswerBacklog,
		Streams: c.Streams, StreamsPerPeer: c.StreamsPerSocket, StreamsPerConnection: c.StreamsPerConnection,
		RequestsPerSecond: c.RequestsPerSecond, FirstRequest: c.FirstRequest.Duration, Send: c.Send.Duration,
		Called: limitKeys,
	}
}

// limitKeys are the settings by the fields of sds.Limits that they go to: what a refusal names is what can be changed.
var limitKeys = map[string]string{
	"Names": "sds.namesPerStream", "NameBytes": "sds.nameBytesPerSocket", "SpareNameBytes": "sds.spareNameBytes", "RequestBytes": "sds.requestBytes",
	"LargeRequestBytes": "sds.largeRequestBytes", "LargeRequests": "sds.largeRequests", "AnswerBytes": "sds.answerBytes",
	"AnswerBacklog": "sds.answerBacklogPerSocket", "SpareAnswerBacklog": "sds.spareAnswerBacklog",
	"Streams": "sds.streams", "StreamsPerPeer": "sds.streamsPerSocket", "StreamsPerConnection": "sds.streamsPerConnection",
	"RequestsPerSecond": "sds.requestsPerSecond", "FirstRequest": "sds.firstRequest", "Send": "sds.send",
}

// check finds the limits that bound nothing.
func (c *SDSConfig) check() error {
	var errs []error
	for key, n := range map[string]int64{
		"connectionsPerSocket": int64(c.ConnectionsPerSocket), "streamsPerSocket": int64(c.StreamsPerSocket),
		"connectionsPerPod": int64(c.ConnectionsPerPod), "streamsPerPod": int64(c.StreamsPerPod), "streams": int64(c.Streams),
		"namesPerStream": int64(c.NamesPerStream), "nameBytesPerSocket": int64(c.NameBytesPerSocket), "requestBytes": int64(c.RequestBytes),
		"spareNameBytes": int64(c.SpareNameBytes), "largeRequestBytes": int64(c.LargeRequestBytes), "largeRequests": int64(c.LargeRequests),
		"answerBacklogPerSocket": int64(c.AnswerBacklogPerSocket), "spareAnswerBacklog": int64(c.SpareAnswerBacklog),
		"answerBytes": int64(c.AnswerBytes), "requestsPerSecond": int64(c.RequestsPerSecond),
		"firstRequest": int64(c.FirstRequest.Duration), "send": int64(c.Send.Duration),
	} {
		if n < 0 {
			errs = append(errs, fmt.Errorf("sds.%s is negative: leave it out for its default", key))
		}
	}
	if c.AnswerBytes > math.MaxInt32 {
		errs = append(errs, errors.New("sds.answerBytes is more than a gRPC message can hold"))
	}
	return errors.Join(errs...)
}

func (w WorkloadConfig) agent(key string) (agent.Workload, error) {
	mode, err := strconv.ParseUint(w.Mode, 8, 32)
	if err != nil || mode == 0 || mode > 0o777 {
		return agent.Workload{}, fmt.Errorf("%s.mode: %q is no file mode: write it in octal and quotes, like \"0660\"", key, w.Mode)
	}
	return agent.Workload{Socket: w.Socket, TokenFile: w.TokenFile, Mode: fs.FileMode(mode), UID: w.UID, GID: w.GID, TTL: w.TTL.Duration},
		errors.Join(absolute(key+".socket", w.Socket), absolute(key+".tokenFile", w.TokenFile))
}

// absolute lets an empty path pass: that it is missing is said elsewhere.
func absolute(key, path string) error {
	if path != "" && !filepath.IsAbs(path) {
		return fmt.Errorf("%s: %q is not an absolute path", key, path)
	}
	return nil
}

// trustDomain accepts a bare name alone: go-spiffe would take a SPIFFE ID too, and with it a path.
func trustDomain(s string) (spiffeid.TrustDomain, error) {
	if s == "" {
		return spiffeid.TrustDomain{}, errors.New("trustDomain: required, such as \"mesh.example\"")
	}
	td, err := spiffeid.TrustDomainFromString(s)
	if err != nil || td.Name() != s {
		return spiffeid.TrustDomain{}, fmt.Errorf("trustDomain: %.255q is no trust domain name: lower-case letters, digits, dots, dashes and underscores", s)
	}
	return td, nil
}

func (c *Config) logLevel() (slog.Level, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return 0, fmt.Errorf("logLevel: %q is none: debug, info, warn or error", c.LogLevel)
	}
	return level, nil
}

func readBounded(file string) ([]byte, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s does not exist", file)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxConfigBytes {
		return nil, fmt.Errorf("%s is larger than %d MiB", file, maxConfigBytes>>20)
	}
	return data, nil
}
