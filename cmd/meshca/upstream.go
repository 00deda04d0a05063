package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/ca/upstream/vault"
)

func (u *UpstreamConfig) check() error {
	switch {
	case u.Disk == nil && u.Vault == nil:
		return errors.New("upstream: name one, such as `upstream: {disk: {}}`")
	case u.Disk != nil && u.Vault != nil:
		return errors.New("upstream: both disk and vault are named, and exactly one signs")
	case u.Vault != nil:
		if err := u.Vault.Validate(); err != nil {
			return fmt.Errorf("upstream.vault: %w", err)
		}
	}
	return nil
}

// files are those that the upstream's piece names.
func (u *UpstreamConfig) files() []namedFile {
	if d := u.Disk; d != nil {
		all := []namedFile{
			{"upstream.disk.certFile", d.CertFile, true},
			{"upstream.disk.keyFile", d.KeyFile, true},
			{"upstream.disk.passphraseFile", d.PassphraseFile, false},
		}
		for i, path := range d.ExtraAnchors {
			all = append(all, namedFile{fmt.Sprintf("upstream.disk.extraAnchors[%d]", i), path, false})
		}
		return all
	}
	if u.Vault == nil {
		return nil
	}
	all := []namedFile{{"upstream.vault.caFile", u.Vault.CAFile, false}, {"upstream.vault.rootFile", u.Vault.RootFile, false}}
	secret := func(key, path string) { all = append(all, namedFile{"upstream.vault.auth." + key, path, false}) }
	auth := u.Vault.Auth
	secret("tokenFile", auth.TokenFile)
	if x := auth.AppRole; x != nil {
		secret("appRole.roleIDFile", x.RoleIDFile)
		secret("appRole.secretIDFile", x.SecretIDFile)
	}
	if x := auth.Kubernetes; x != nil {
		secret("kubernetes.tokenFile", x.TokenFile)
	}
	if x := auth.Cert; x != nil {
		secret("cert.certFile", x.CertFile)
		secret("cert.keyFile", x.KeyFile)
	}
	return all
}

// successors is the directory of the roots that replace the one that the configuration names.
func (c *Config) successors() string { return filepath.Join(c.StateDir, "roots") }

// openUpstreamFunc opens an upstream; observe is told of each call to one that is elsewhere.
type openUpstreamFunc func(c *Config, log *slog.Logger, observe func(vault.Call)) (ca.Upstream, error)

// openUpstream opens what signs the intermediate. A Vault's is to be run (Run) and closed.
func openUpstream(c *Config, log *slog.Logger, observe func(vault.Call)) (ca.Upstream, error) {
	if c.Upstream.Vault != nil {
		return openVault(c, log, observe)
	}
	return disk.Open(disk.Options{Root: c.Upstream.Disk.files(), Successors: c.successors(), TrustDomain: c.trustDomain})
}

func openVault(c *Config, log *slog.Logger, observe func(vault.Call)) (*vault.Upstream, error) {
	return vault.New(*c.Upstream.Vault, vault.Options{Life: c.Intermediate.TTL.Duration, Log: log, Observe: observe})
}

// checkLive tries the upstream as serve would use it, and tells what is wrong. It changes nothing.
func checkLive(ctx context.Context, out io.Writer, c *Config) error {
	if c.Upstream.Vault == nil {
		if _, err := openUpstream(c, nil, nil); err != nil {
			return err
		}
		fmt.Fprintln(out, "upstream.disk: the root can sign")
		return nil
	}
	u, err := openVault(c, nil, nil)
	if err != nil {
		return err
	}
	defer func() { _ = u.Close() }()
	failed := false
	for _, f := range u.Check(ctx) {
		level := "warning"
		if !f.Warning {
			level = "error"
			failed = true
		}
		fmt.Fprintf(out, "%s: %s: %s\n", level, f.What, f.Why)
		if f.Do != "" {
			fmt.Fprintln(out, f.Do)
		}
	}
	if failed {
		return fmt.Errorf("upstream.vault at %s cannot sign an intermediate, see above", c.Upstream.Vault.Address)
	}
	st := u.Status()
	fmt.Fprintf(out, "upstream.vault: the issuer %s can sign (logged in by %s at %s)\n", st.IssuerID, st.LoginBy, st.Address)
	return nil
}
