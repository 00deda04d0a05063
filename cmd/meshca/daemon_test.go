package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/upstream/disk"
)

// clusterIn is a cluster whose keys are in a file of dir; away, the file is not there.
func clusterIn(t *testing.T, dir, name string, away bool) ClusterConfig {
	t.Helper()
	keys := filepath.Join(dir, name+".json")
	if !away {
		tokens, err := localissuer.Open(dir, "https://"+name+".test")
		if err != nil {
			t.Fatal(err)
		}
		jwks, err := tokens.JWKS()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(keys, jwks, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return ClusterConfig{SameNamespaces: true, Config: kubernetes.Config{
		Name: name, Mode: kubernetes.JWKS, Issuer: "https://" + name + ".test", Keys: kubernetes.KeysConfig{File: keys}, Liveness: kubernetes.LivenessNone,
	}}
}

// configIn is a configuration with everything in dir and any free ports, and its root made.
func configIn(t *testing.T, dir string, clusters ...ClusterConfig) *Config {
	t.Helper()
	c := &Config{
		TrustDomain: "mesh.test", StateDir: dir, Listen: "127.0.0.1:0", OpsAddress: "127.0.0.1:0", AdminSocket: filepath.Join(dir, "admin.sock"),
		Audit: AuditConfig{File: filepath.Join(dir, "audit.log")}, Upstream: UpstreamConfig{Disk: &DiskConfig{}}, Clusters: clusters,
	}
	if err := c.complete(); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.Create(c.Upstream.Disk.files(), disk.CreateOptions{TrustDomain: c.trustDomain}); err != nil {
		t.Fatal(err)
	}
	return c
}

// opened is the CA of a configuration, put together and not yet run.
func opened(t *testing.T, c *Config) *daemon {
	t.Helper()
	d, err := open(t.Context(), c, slog.New(slog.DiscardHandler), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	endWith(t, d)
	return d
}

// endWith closes a CA that was not run when the test ends.
func endWith(t *testing.T, d *daemon) {
	t.Cleanup(func() {
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Error(err)
			return
		}
		_ = d.door.Serve(ended, l) // a door's workers end when it has served
		_ = d.close()              // some tests break what is closed
	})
}

// signing is a CA that has its credentials and asks its clusters, so that it is ready if they are there.
func signing(t *testing.T, c *Config) *daemon {
	t.Helper()
	d := opened(t, c)
	if _, err := line(d).Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.serving.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, cluster := range d.clusters {
		go func() { _ = cluster.Run(t.Context()) }()
	}
	time.Sleep(time.Second) // in a bubble: until the clusters were asked
	return d
}

// line is the only one of a CA that rolls out nothing.
func line(d *daemon) *ca.Line {
	lines, _ := d.authority.Lines()
	return lines[0]
}
