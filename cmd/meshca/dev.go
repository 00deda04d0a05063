package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/cmd/internal/strictyaml"
	"github.com/meshca/meshca/rotation"
)

const (
	devCluster = "dev"
	devIssuer  = "https://meshca-dev.invalid"
	// devTokenLife is what kubelet asks for by default; they are replaced at half-life.
	devTokenLife = time.Hour
)

// devAgent is the service account that the agent of `meshca dev` attests as.
var devAgent = workloadName{namespace: "meshca", account: "meshca-agent"}

// devOptions are the flags of `meshca dev`.
type devOptions struct {
	workloads   []string
	state       string
	trustDomain string
	listen, ops string
	agentOps    string
	policy      string
	upstream    string
	ttl         time.Duration
	logLevel    string
}

func devCommand() *cobra.Command {
	var o devOptions
	c := &cobra.Command{
		Use:   "dev --workload NAMESPACE/SERVICE-ACCOUNT ...",
		Short: "Run a CA and an agent here, without a cluster, to try meshca out",
		Long: "A CA and an agent in one process, for a laptop: a root on disk, a bolt store, and an issuer of tokens in\n" +
			"Kubernetes' form in place of a cluster. Tokens go through the same verification as a cluster's.\n" +
			"Each workload gets a socket at STATE/run/NAMESPACE/SERVICE-ACCOUNT.sock that speaks SDS.\n" +
			"With --upstream the root is elsewhere, such as in Vault.",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("%q is no flag", args[0])
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error { return dev(c.Context(), o, c.OutOrStdout(), c.ErrOrStderr()) },
	}
	f := c.Flags()
	f.StringArrayVar(&o.workloads, "workload", nil, "a workload, as namespace/service-account (repeat it for more)")
	f.StringVar(&o.state, "state", ".meshca", "directory for everything that it keeps")
	f.StringVar(&o.trustDomain, "trust-domain", "mesh.test", "SPIFFE trust domain")
	f.StringVar(&o.listen, "listen", "127.0.0.1:8443", "address of the CA's gRPC API (port 0: any)")
	f.StringVar(&o.ops, "ops", "127.0.0.1:9090", "address of the CA's /readyz and /metrics (port 0: any)")
	f.StringVar(&o.agentOps, "agent-ops", "127.0.0.1:9091", "address of the agent's /readyz and /metrics (port 0: any)")
	f.StringVar(&o.policy, "policy", "", "policy file (default: the plain ID for all)")
	f.StringVar(&o.upstream, "upstream", "", "file with the piece `upstream:` of a CA's configuration, as deploy/vault shows it (default: a root on disk, made here)")
	f.DurationVar(&o.ttl, "svid-ttl", ca.MaxTTL, "life of SVIDs")
	f.StringVar(&o.logLevel, "log-level", "warn", "debug, info, warn or error")
	return c
}

// workloadName is a service account, as --workload names it.
type workloadName struct{ namespace, account string }

func parseWorkload(s string) (workloadName, error) {
	ns, sa, ok := strings.Cut(s, "/")
	if !ok {
		return workloadName{}, usageError{fmt.Errorf("--workload %q: write it as namespace/service-account", s)}
	}
	if _, err := attestor.NewIdentity(devCluster, ns, sa); err != nil {
		return workloadName{}, usageError{fmt.Errorf("--workload %q: %w", s, err)}
	}
	return workloadName{ns, sa}, nil
}

// subject is what the workload's tokens say: one pod, on the one node. UIDs are digests of the names, so that they are
// the same after a restart, as a real pod's are.
func (w workloadName) subject() localissuer.Subject {
	uid := func(kind string) string {
		sum := sha256.Sum256([]byte(kind + "/" + w.namespace + "/" + w.account))
		return fmt.Sprintf("%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
	}
	return localissuer.Subject{
		Namespace: w.namespace, ServiceAccount: w.account, ServiceAccountUID: uid("serviceaccount"),
		Pod: w.account + "-0", PodUID: uid("pod"), Node: "dev", NodeUID: "00000000-0000-4000-8000-000000000dev",
	}
}

// devState is where `meshca dev` keeps what.
type devState struct{ dir string }

func (s devState) run(parts ...string) string {
	return filepath.Join(append([]string{s.dir, "run"}, parts...)...)
}
func (s devState) bundle() string      { return s.run("bundle.json") }
func (s devState) adminSocket() string { return s.run("admin.sock") }
func (s devState) agentAdmin() string  { return s.run("agent-admin.sock") }
func (s devState) keys() string        { return filepath.Join(s.dir, "jwks.json") }
func (s devState) socket(w workloadName) string {
	return s.run(w.namespace, w.account+".sock")
}
func (s devState) token(w workloadName) string {
	return filepath.Join(s.dir, "tokens", w.namespace, w.account)
}

// agentToken and agentDir lie where no workload's files can: a namespace does not begin with a dot.
func (s devState) agentToken() string { return filepath.Join(s.dir, "tokens", ".agent") }
func (s devState) agentDir() string   { return s.run(".agent") }

func dev(ctx context.Context, o devOptions, out, stderr io.Writer) error {
	switch {
	case len(o.workloads) == 0:
		return usageError{errors.New("name a workload at least, with --workload namespace/service-account")}
	case o.ttl <= 0: // a configuration file's 0 stands for the default, a flag's does not
		return usageError{fmt.Errorf("--svid-ttl %s is no life of an SVID: %s to %s", o.ttl, ca.MinTTL, ca.MaxTTL)}
	}
	var workloads []workloadName
	for _, s := range o.workloads {
		w, err := parseWorkload(s)
		if err != nil {
			return err
		}
		workloads = append(workloads, w)
	}
	log, err := newLog(stderr, o.logLevel)
	if err != nil {
		return usageError{err}
	}
	state := devState{o.state}
	if err := os.MkdirAll(state.run(), 0o700); err != nil {
		return err
	}
	issuer, err := localissuer.Open(state.dir, devIssuer)
	if err != nil {
		return err
	}
	jwks, err := issuer.JWKS()
	if err != nil {
		return err
	}
	if err := replaceFile(state.keys(), jwks, 0o644); err != nil {
		return err
	}
	config, err := devConfig(o, state)
	if err != nil {
		return err
	}
	if err := ensureRoot(out, config); err != nil {
		return err
	}
	d, err := open(ctx, config, log, io.Discard)
	if err != nil {
		return err
	}
	err = runDev(ctx, d, o, state, issuer, workloads, out, log)
	return errors.Join(err, d.close())
}

// devConfig is a configuration as serve would read it from a file.
func devConfig(o devOptions, state devState) (*Config, error) {
	upstream, err := devUpstream(o.upstream)
	if err != nil {
		return nil, usageError{err}
	}
	c := &Config{
		TrustDomain: o.trustDomain, Listen: o.listen, OpsAddress: o.ops, AdminSocket: state.adminSocket(), StateDir: state.dir,
		BundleFile: state.bundle(), Upstream: upstream, SVID: SVIDConfig{TTL: metav1.Duration{Duration: o.ttl}},
		PolicyFile: o.policy, LogLevel: o.logLevel, Audit: AuditConfig{File: filepath.Join(state.dir, "audit.log")},
		Clusters: []ClusterConfig{{Agents: []string{devAgent.namespace + "/" + devAgent.account}, Config: kubernetes.Config{
			Name: devCluster, Mode: kubernetes.JWKS, Issuer: devIssuer, Keys: kubernetes.KeysConfig{File: state.keys()}, Liveness: kubernetes.LivenessNone,
		}}},
	}
	if err := c.complete(); err != nil {
		return nil, usageError{err}
	}
	return c, nil
}

// devUpstream is the piece in the file; without a file, a root on disk.
func devUpstream(file string) (UpstreamConfig, error) {
	if file == "" {
		return UpstreamConfig{Disk: &DiskConfig{}}, nil
	}
	data, err := readBounded(file)
	if err != nil {
		return UpstreamConfig{}, fmt.Errorf("--upstream: %w", err)
	}
	var piece struct {
		Upstream UpstreamConfig `json:"upstream"`
	}
	if err := strictyaml.Decode(data, &piece); err != nil {
		return UpstreamConfig{}, fmt.Errorf("--upstream %s: it holds `upstream:` and nothing else: %w", file, err)
	}
	return piece.Upstream, nil
}

// ensureRoot makes a root on disk at the first start, and says so: for dev this is the explicit step.
func ensureRoot(out io.Writer, c *Config) error {
	if c.Upstream.Disk == nil {
		return nil
	}
	if _, err := os.Stat(c.Upstream.Disk.CertFile); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(c.storePath()); err == nil {
		return fmt.Errorf("%s holds a store but no root: put %s back, or remove the directory to start anew", c.StateDir, c.Upstream.Disk.CertFile)
	}
	root, err := disk.Create(c.Upstream.Disk.files(), disk.CreateOptions{TrustDomain: c.trustDomain})
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "made a root for %s: %s\n", c.trustDomain.Name(), root.Subject)
	return nil
}

// runDev runs the CA, the tokens' issuer and the agent until ctx ends or one of them fails.
func runDev(ctx context.Context, d *daemon, o devOptions, state devState, issuer *localissuer.Issuer, workloads []workloadName, out io.Writer, log *slog.Logger) error {
	listener, err := net.Listen("tcp", d.config.Listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	defer listener.Close()
	a, err := devAgentFor(d, o, state, listener.Addr().String(), workloads, log)
	if err != nil {
		return usageError{err}
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	keepToken := func(w workloadName, path, audience string) error {
		t := &devToken{issuer: issuer, path: path, subject: w.subject(), audience: audience}
		term, err := t.Renew(ctx)
		if err != nil {
			return err
		}
		g.Go(func() error { _ = rotation.Keep(ctx, t, rotation.KeepOptions{Have: &term}); return nil })
		return nil
	}
	if err := keepToken(devAgent, state.agentToken(), registration.AgentAudience); err != nil {
		return err
	}
	for _, w := range workloads {
		if err := keepToken(w, state.token(w), registration.WorkloadAudience); err != nil {
			return err
		}
	}
	g.Go(func() error { return d.runOn(ctx, listener) })
	g.Go(func() error {
		// The CA is a moment away; an agent that came sooner would have to try again.
		for d.serving.Ready() != nil && ctx.Err() == nil {
			time.Sleep(5 * time.Millisecond)
		}
		return ignoreEnd(ctx, a.Run(ctx), "agent")
	})
	greet(out, d, state, listener.Addr().String(), workloads)
	return g.Wait()
}

// devAgentFor makes the agent, which knows the CA by its bundle file as any agent does. The file is there before the
// agent looks: the bundle stands since the daemon was opened.
func devAgentFor(d *daemon, o devOptions, state devState, address string, workloads []workloadName, log *slog.Logger) (*agent.Agent, error) {
	bundle, _ := d.trust.Bundle()
	data, err := bundle.Marshal()
	if err != nil {
		return nil, err
	}
	if err := replaceFile(state.bundle(), data, 0o644); err != nil {
		return nil, err
	}
	c := agent.Config{
		TrustDomain: d.config.trustDomain, Cluster: devCluster, Server: address, TokenFile: state.agentToken(), BundleFile: state.bundle(),
		RuntimeDir: state.agentDir(), AdminSocket: state.agentAdmin(), OpsAddress: o.agentOps, Version: version, Log: log,
	}
	for _, w := range workloads {
		if err := os.MkdirAll(filepath.Dir(state.socket(w)), 0o755); err != nil {
			return nil, err
		}
		c.Workloads = append(c.Workloads, agent.Workload{Socket: state.socket(w), TokenFile: state.token(w)})
	}
	return agent.New(c)
}

func greet(out io.Writer, d *daemon, state devState, address string, workloads []workloadName) {
	fmt.Fprintf(out, "meshca dev: trust domain %s, CA at %s\n", d.config.trustDomain.Name(), address)
	for _, w := range workloads {
		fmt.Fprintf(out, "  spiffe://%s/ns/%s/sa/%s  at %s\n", d.config.trustDomain.Name(), w.namespace, w.account, state.socket(w))
	}
	fmt.Fprintf(out, "look at it:  certctl --socket %s status\n             certctl --agent=%s svid list\n", state.adminSocket(), state.agentAdmin())
}

// devToken is one token file, kept fresh as kubelet keeps a projected one.
type devToken struct {
	issuer   *localissuer.Issuer
	path     string
	subject  localissuer.Subject
	audience string
}

var _ rotation.Subject = (*devToken)(nil)

// Renew writes a new token.
func (t *devToken) Renew(context.Context) (rotation.Term, error) {
	token, err := t.issuer.Token(t.subject, t.audience, devTokenLife)
	if err != nil {
		return rotation.Term{}, err
	}
	if err := replaceFile(t.path, []byte(token), 0o600); err != nil {
		return rotation.Term{}, err
	}
	return rotation.Term{Life: devTokenLife, Left: devTokenLife, Received: time.Now()}, nil
}

// Due is half-life.
func (t *devToken) Due(term rotation.Term) time.Time { return rotation.HalfLife(term) }

// Expired leaves the file: the CA says best what is wrong with an old token.
func (t *devToken) Expired() {}
