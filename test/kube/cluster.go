// Package kube starts a real etcd and a real kube-apiserver for tests and programs that need a cluster's word: tokens,
// TokenReviews, watches, deletions. There is no kubelet: pods are objects bound to nodes by name, and never run.
package kube

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/meshca/meshca/test/parts"
)

// Issuer is the `iss` of every cluster's tokens; many clusters share one in the world, too.
const Issuer = "https://kubernetes.default.svc"

const (
	startLimit = 60 * time.Second
	stopGrace  = 5 * time.Second
)

// Cluster is a running cluster on loopback.
type Cluster struct {
	Admin
	// URL is the API server's, CAFile holds what its certificate is verified with.
	URL, CAFile string

	dir       string
	pki       *PKI
	server    Leaf
	port      int
	etcdPort  int
	etcd, api *parts.Process
}

// TokenKey is the file with the RSA key that the API server signs service accounts' tokens with, PKCS #1 in PEM. Who
// needs more of them than it can be asked for makes them with that.
func (c *Cluster) TokenKey() string { return c.pki.TokenKey }

// Start starts a cluster that ends with the test.
func Start(t testing.TB) *Cluster {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	c, err := Launch(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// Launch starts a cluster that keeps its files in dir, and returns when it answers. It is ended by Close, and by the end
// of this program.
func Launch(ctx context.Context, dir string) (*Cluster, error) {
	var failed error
	for range 3 { // a port that was free may be taken by the time it is used
		c, err := launch(ctx, dir)
		if err == nil {
			return c, nil
		}
		failed = err
		if ctx.Err() != nil {
			break
		}
	}
	return nil, failed
}

func launch(ctx context.Context, dir string) (*Cluster, error) {
	dir, err := os.MkdirTemp(dir, "cluster-")
	if err != nil {
		return nil, err
	}
	p, err := NewPKI(dir)
	if err != nil {
		return nil, err
	}
	server, err := p.Server("apiserver", pkix.Name{CommonName: "kube-apiserver"}, "127.0.0.1", "localhost", "kubernetes.default.svc")
	if err != nil {
		return nil, err
	}
	ports, err := freePorts(3)
	if err != nil {
		return nil, err
	}
	c := &Cluster{
		URL: "https://127.0.0.1:" + strconv.Itoa(ports[0]), CAFile: p.CAFile,
		dir: dir, pki: p, server: server, port: ports[0], etcdPort: ports[1],
	}
	kubeconfig, err := c.KubeconfigFor("admin", "system:masters")
	if err != nil {
		return nil, err
	}
	if c.Admin, err = NewAdmin(kubeconfig); err != nil {
		return nil, err
	}
	if err := c.startEtcd(ctx, ports[2]); err != nil {
		return nil, err
	}
	if err := c.StartAgain(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Cluster) startEtcd(ctx context.Context, peerPort int) error {
	path, err := parts.Find("etcd")
	if err != nil {
		return err
	}
	client, peer := "http://127.0.0.1:"+strconv.Itoa(c.etcdPort), "http://127.0.0.1:"+strconv.Itoa(peerPort)
	c.etcd, err = parts.Start(parts.Command{Path: path, Dir: c.dir, Args: []string{
		"--data-dir=" + filepath.Join(c.dir, "etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=" + client, "--advertise-client-urls=" + client,
		"--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer, "--initial-cluster=default=" + peer,
	}})
	if err != nil {
		return err
	}
	err = c.etcd.Await(ctx, func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", "127.0.0.1:"+strconv.Itoa(c.etcdPort))
		if err != nil {
			return err
		}
		return conn.Close()
	})
	if err != nil {
		c.etcd.Kill()
	}
	return err
}

// WithPodCertificates are the arguments by which StartAgain has the API server serve PodCertificateRequests and
// ClusterTrustBundles, in v1beta1. By default it serves neither.
func WithPodCertificates() []string {
	return []string{
		"--runtime-config=certificates.k8s.io/v1beta1=true", "--feature-gates=PodCertificateRequest=true,ClusterTrustBundle=true",
	}
}

// StartAgain starts the API server after Stop, at the same address, and returns when it answers. It may be given more
// arguments than it was started with before.
func (c *Cluster) StartAgain(ctx context.Context, more ...string) error {
	if c.api != nil {
		return errors.New("the API server runs already")
	}
	path, err := parts.Find("kube-apiserver")
	if err != nil {
		return err
	}
	api, err := parts.Start(parts.Command{Path: path, Dir: c.dir, Args: append([]string{
		"--etcd-servers=http://127.0.0.1:" + strconv.Itoa(c.etcdPort),
		"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--secure-port=" + strconv.Itoa(c.port),
		"--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.96.0.0/24",
		"--cert-dir=" + filepath.Join(c.dir, "generated"), "--client-ca-file=" + c.pki.CAFile,
		"--tls-cert-file=" + c.server.Cert, "--tls-private-key-file=" + c.server.Key,
		"--service-account-issuer=" + Issuer,
		"--service-account-key-file=" + c.pki.TokenKey, "--service-account-signing-key-file=" + c.pki.TokenKey,
		"--authorization-mode=RBAC", "--allow-privileged=true",
		"--disable-admission-plugins=ServiceAccount", // it would wait for controllers that are not here
	}, more...)})
	if err != nil {
		return err
	}
	err = api.Await(ctx, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		return c.Clientset.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
	if err != nil {
		api.Kill()
		return err
	}
	c.api = api
	return nil
}

// Stop ends the API server at once, as a crash would. etcd keeps what it had.
func (c *Cluster) Stop() {
	if c.api != nil {
		c.api.Kill()
		c.api = nil
	}
}

// Freeze stops the API server without closing its connections, as a broken network would; Thaw lets it go on.
func (c *Cluster) Freeze() error { return c.api.Signal(syscall.SIGSTOP) }

// Thaw undoes Freeze.
func (c *Cluster) Thaw() error { return c.api.Signal(syscall.SIGCONT) }

// Close ends all.
func (c *Cluster) Close() {
	c.Stop()
	if c.etcd != nil {
		c.etcd.Stop(stopGrace)
		c.etcd = nil
	}
}

// KubeconfigFor makes a client certificate for a user of these groups, and returns the path of a kubeconfig with it.
func (c *Cluster) KubeconfigFor(user string, groups ...string) (string, error) {
	return c.pki.Kubeconfig(c.URL, user, groups...)
}

func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		port, err := parts.FreePort()
		if err != nil {
			return nil, fmt.Errorf("looking for a free port: %w", err)
		}
		ports = append(ports, port)
	}
	return ports, nil
}
