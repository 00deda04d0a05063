// Package vault starts a real HashiCorp Vault for tests: one that keeps everything in memory, or one on raft storage that
// can be sealed, killed and started again.
package vault

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/meshca/meshca/test/parts"
)

const (
	startLimit = 60 * time.Second
	stopGrace  = 5 * time.Second
)

// Server is a running Vault on loopback.
type Server struct {
	// Address is its URL. CAFile verifies its certificate; empty for one that speaks plain HTTP.
	Address, CAFile string
	// RootToken is its administrator's, Client uses it.
	RootToken string
	Client    *api.Client

	dir     string
	listen  string
	args    []string
	unseal  string // key of a raft server
	process *parts.Process
}

// Dev starts a Vault in memory, with TLS and the plugin for Kubernetes auth, that ends with the test.
func Dev(t testing.TB) *Server {
	t.Helper()
	return ended(t, LaunchDev)
}

// Raft starts a Vault on raft storage, initialised and unsealed, that ends with the test.
func Raft(t testing.TB) *Server {
	t.Helper()
	return ended(t, LaunchRaft)
}

func ended(t testing.TB, launch func(context.Context, string) (*Server, error)) *Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	s, err := launch(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// LaunchDev is Dev for TestMain: it keeps its files in dir, and is ended by Close and by the end of this program.
func LaunchDev(ctx context.Context, dir string) (*Server, error) {
	plugins := filepath.Join(dir, "plugins")
	if err := InstallPlugin(plugins); err != nil {
		return nil, err
	}
	const token = "the-administrators-token"
	return again(ctx, func(port string) (*Server, error) {
		s := &Server{dir: dir, listen: port, RootToken: token, Address: "https://" + port, CAFile: filepath.Join(dir, "tls", "vault-ca.pem")}
		s.args = []string{"server", "-dev", "-dev-tls", "-dev-tls-cert-dir=" + filepath.Join(dir, "tls"), "-dev-no-store-token",
			"-dev-root-token-id=" + token, "-dev-listen-address=" + port, "-dev-plugin-dir=" + plugins, "-log-level=warn"}
		if err := os.MkdirAll(filepath.Join(dir, "tls"), 0o700); err != nil {
			return nil, err
		}
		return s, s.StartAgain(ctx)
	})
}

// LaunchRaft is Raft for whoever has no test: see LaunchDev.
func LaunchRaft(ctx context.Context, dir string) (*Server, error) {
	return again(ctx, func(port string) (*Server, error) {
		data, err := os.MkdirTemp(dir, "raft-")
		if err != nil {
			return nil, err
		}
		cluster, err := freeAddress()
		if err != nil {
			return nil, err
		}
		config := filepath.Join(data, "vault.hcl")
		text := fmt.Sprintf("storage \"raft\" {\n  path = %q\n  node_id = \"one\"\n}\nlistener \"tcp\" {\n  address = %q\n  cluster_address = %q\n  tls_disable = true\n}\n"+
			"api_addr = \"http://%s\"\ncluster_addr = \"http://%s\"\ndisable_mlock = true\n", data, port, cluster, port, cluster)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			return nil, err
		}
		s := &Server{dir: data, listen: port, Address: "http://" + port, args: []string{"server", "-config=" + config, "-log-level=warn"}}
		if err := s.StartAgain(ctx); err != nil {
			return nil, err
		}
		if err := s.initialise(ctx); err != nil {
			s.Close()
			return nil, err
		}
		return s, nil
	})
}

// again tries a few ports: one that was free may be taken by the time it is used.
func again(ctx context.Context, launch func(listen string) (*Server, error)) (*Server, error) {
	var failed error
	for range 3 {
		listen, err := freeAddress()
		if err != nil {
			return nil, err
		}
		s, err := launch(listen)
		if err == nil {
			return s, nil
		}
		failed = err
		if ctx.Err() != nil {
			break
		}
	}
	return nil, failed
}

// StartAgain starts the server after Kill, at the same address, and returns when it answers: sealed, if it is on raft.
func (s *Server) StartAgain(ctx context.Context) error {
	if s.process != nil {
		return errors.New("Vault runs already") //nolint:staticcheck // it is a name
	}
	path, err := parts.Find("vault")
	if err != nil {
		return err
	}
	// Only what it needs: whoever runs the tests may have a Vault of his own in the environment.
	p, err := parts.Start(parts.Command{Path: path, Args: s.args, Dir: s.dir, Env: []string{"HOME=" + s.dir, "PATH=" + os.Getenv("PATH"), "GOMAXPROCS=2"}})
	if err != nil {
		return err
	}
	if err := p.Await(ctx, s.answers); err != nil {
		p.Kill()
		return err
	}
	s.process = p
	if s.Client, err = s.client(); err != nil {
		s.Close()
	}
	return err
}

// answers asks whether it runs, in whatever state.
func (s *Server) answers(ctx context.Context) error {
	client, err := s.client()
	if err != nil {
		return err
	}
	h, err := client.Sys().HealthWithContext(ctx)
	if err != nil {
		return err
	}
	if s.CAFile != "" && h.Sealed {
		return errors.New("not unsealed yet")
	}
	return nil
}

func (s *Server) initialise(ctx context.Context) error {
	answer, err := s.Client.Sys().InitWithContext(ctx, &api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		return fmt.Errorf("initialising Vault: %w", err)
	}
	s.unseal, s.RootToken = answer.Keys[0], answer.RootToken
	if s.Client, err = s.client(); err != nil {
		return err
	}
	return s.Unseal(ctx)
}

// Unseal unseals a raft server, and returns when it is the active one.
func (s *Server) Unseal(ctx context.Context) error {
	if _, err := s.Client.Sys().UnsealWithContext(ctx, s.unseal); err != nil {
		return fmt.Errorf("unsealing Vault: %w", err)
	}
	return s.process.Await(ctx, func(ctx context.Context) error {
		h, err := s.Client.Sys().HealthWithContext(ctx)
		if err == nil && (h.Sealed || h.Standby) {
			err = errors.New("not active yet")
		}
		return err
	})
}

// Seal seals it.
func (s *Server) Seal(ctx context.Context) error { return s.Client.Sys().SealWithContext(ctx) }

// Kill ends it at once, as a crash would.
func (s *Server) Kill() {
	if s.process != nil {
		s.process.Kill()
		s.process = nil
	}
}

// Close ends it.
func (s *Server) Close() {
	if s.process != nil {
		s.process.Stop(stopGrace)
		s.process = nil
	}
}

// Listen is its address without a scheme.
func (s *Server) Listen() string { return s.listen }

func (s *Server) client() (*api.Client, error) {
	transport := &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}, DisableKeepAlives: true}
	config := &api.Config{Address: s.Address, HttpClient: &http.Client{Transport: transport, Timeout: 20 * time.Second}}
	if s.CAFile != "" {
		if err := config.ConfigureTLS(&api.TLSConfig{CACert: s.CAFile}); err != nil {
			return nil, err
		}
	}
	c, err := api.NewClient(config)
	if err != nil {
		return nil, err
	}
	c.ClearNamespace()
	c.SetToken(s.RootToken)
	return c, nil
}

// InstallPlugin puts the plugin for Kubernetes auth where Vault looks, under the name that it goes by.
func InstallPlugin(dir string) error {
	from, err := parts.Find("vault-plugin-auth-kubernetes")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	to := filepath.Join(dir, "kubernetes")
	if os.Link(from, to) == nil {
		return nil
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o700)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("looking for a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().String(), nil
}
