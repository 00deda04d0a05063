package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/meshca/meshca/api/admin/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/test/mesh"
	"github.com/meshca/meshca/test/parts"
	"github.com/meshca/meshca/test/vault"
)

// stage is everything that the demo started.
type stage struct {
	dir       string
	temporary bool
	meshca    *parts.Process
	log       *os.File
	mesh      *mesh.Mesh
	vault     *vault.Server // nil: the root is on disk
}

const (
	trustDomain = "demo.test"
	// patience bounds each step of setting up.
	patience = 30 * time.Second
)

// workload is a side's service account, in the form that `meshca dev --workload` takes.
func workload(side string) string { return "demo/" + side }

func setUp(ctx context.Context, o options) (*stage, error) {
	envoy, err := parts.Find("envoy")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(o.meshca); err != nil {
		return nil, fmt.Errorf("%w: run `make build`", err)
	}
	s := &stage{dir: o.state}
	if s.dir == "" {
		// A short path: a unix socket's may have 107 bytes, and a hint that has it is to fit into 80 columns.
		if s.dir, err = os.MkdirTemp("", "demo"); err != nil {
			return nil, err
		}
		s.temporary = true
	}
	if err := s.start(ctx, o, envoy); err != nil {
		s.tearDown()
		if ctx.Err() != nil {
			return nil, errors.New("ended before it had started")
		}
		return nil, err
	}
	return s, nil
}

func (s *stage) start(ctx context.Context, o options, envoy string) error {
	for _, dir := range []string{s.dir, filepath.Join(s.dir, "envoy")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	var upstream string
	if o.upstream == upstreamVault {
		var err error
		if upstream, err = s.startVault(ctx); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	say("starting meshca dev")
	if err := s.startMeshca(ctx, o, upstream); err != nil {
		return err
	}
	var sides [2]mesh.Workload
	for i, side := range mesh.Sides {
		namespace, account, _ := strings.Cut(workload(side), "/")
		sides[i] = mesh.Workload{
			ID:     fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", trustDomain, namespace, account),
			Socket: filepath.Join(s.dir, "run", namespace, account+".sock"),
		}
	}
	say("starting two Envoys")
	var err error
	s.mesh, err = mesh.Start(ctx, mesh.Config{Envoy: envoy, Dir: filepath.Join(s.dir, "envoy"), Client: sides[0], Server: sides[1]})
	return err
}

// startVault starts a Vault and sets it up as deploy/vault tells, with a root and the one that can follow it. It returns
// the file with the upstream's piece of meshca's configuration.
func (s *stage) startVault(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	say("starting Vault, and setting it up as deploy/vault tells")
	var err error
	if s.vault, err = vault.LaunchDev(ctx, filepath.Join(s.dir, "vault")); err != nil {
		return "", err
	}
	d, err := vault.SetUp(ctx, s.vault, filepath.Join(s.dir, "vault", "setup"))
	if err != nil {
		return "", err
	}
	if err := d.NextRoot(ctx, "root-2"); err != nil {
		return "", err
	}
	file := filepath.Join(s.dir, "upstream.yaml")
	// Nobody else administers this mount, so root-2 is trusted when it appears: a rotation finds it without a name.
	return file, os.WriteFile(file, []byte(d.Upstream+"\n    autoTrust: true\n"), 0o600)
}

// startMeshca starts `meshca dev` and returns when its agent holds an SVID for each side.
func (s *stage) startMeshca(ctx context.Context, o options, upstream string) error {
	var err error
	if s.log, err = os.OpenFile(filepath.Join(s.dir, "meshca.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	args := []string{
		"dev", "--state", s.dir, "--trust-domain", trustDomain, "--svid-ttl", o.ttl.String(),
		"--listen", "127.0.0.1:0", "--ops", "127.0.0.1:0", "--agent-ops", "127.0.0.1:0",
	}
	if upstream != "" {
		args = append(args, "--upstream", upstream)
	}
	for _, side := range mesh.Sides {
		args = append(args, "--workload", workload(side))
	}
	if s.meshca, err = parts.Start(parts.Command{Path: o.meshca, Args: args, Log: s.log}); err != nil {
		return err
	}
	return s.meshca.Await(ctx, s.holdsSVIDs)
}

// holdsSVIDs asks the agent's admin socket whether both workloads have theirs.
func (s *stage) holdsSVIDs(ctx context.Context) error {
	conn, err := client.Open(ctx, s.agentSocket())
	if err != nil {
		return err
	}
	defer conn.Close()
	status, err := conn.Agent.GetAgentStatus(ctx, &meshcav1.GetAgentStatusRequest{})
	if err != nil {
		return err
	}
	fresh := 0
	for _, w := range status.GetWorkloads() {
		if w.GetState() == "fresh" {
			fresh++
		}
	}
	if fresh < len(mesh.Sides) {
		return fmt.Errorf("its agent holds %d of %d SVIDs", fresh, len(mesh.Sides))
	}
	return nil
}

func (s *stage) caSocket() string    { return filepath.Join(s.dir, "run", "admin.sock") }
func (s *stage) agentSocket() string { return filepath.Join(s.dir, "run", "agent-admin.sock") }

// hints are commands for a second terminal.
func (s *stage) hints() []string {
	return []string{
		"bin/certctl --socket " + s.caSocket() + " status",
		"bin/certctl --agent=" + s.agentSocket() + " svid list",
		"bin/certctl --socket " + s.caSocket() + " ca rotate root --watch",
	}
}

// root says where the CA's root is.
func (s *stage) root() string {
	if s.vault == nil {
		return "on disk"
	}
	return "in Vault at " + s.vault.Address + ": root-1, and root-2 to rotate to"
}

// tearDown stops what runs, proxies first, and removes what is temporary.
func (s *stage) tearDown() {
	if s.mesh != nil {
		s.mesh.Stop()
	}
	if s.meshca != nil {
		s.meshca.Stop(10 * time.Second)
	}
	if s.vault != nil {
		s.vault.Close()
	}
	if s.log != nil {
		_ = s.log.Close()
	}
	if s.temporary {
		_ = os.RemoveAll(s.dir)
	}
}

func say(what string) { fmt.Fprintln(os.Stderr, "demo:", what) }
